"""Which engine computes, on which device and in which precision, and why: `auto` made into words and reasons.

Nothing here imports PyTorch unless it is going to compute, because that takes seconds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from glasslm.config.schema import ComputeConfig, EngineName, ModelConfig, Precision, RunConfig
from glasslm.errors import InputError

TRAIN_WITH_TORCH = (
    3_000_000  # parameters: above, PyTorch trains faster on a CPU (docs/log.md has the crossing)
)
NUMPY_TOKENS, TORCH_TOKENS = (
    1024,
    8192,
)  # of a micro-batch: what stays in a CPU's cache, what keeps a GPU busy
FLASH_FROM = (
    512  # positions, from which on tiles are as fast as whole rows of weights (docs/log.md)
)
USE_TORCH = 30_000_000  # to generate and evaluate, where NumPy starts seconds earlier


def choose(compute: ComputeConfig, parameters: int, training: bool) -> tuple[ComputeConfig, str]:
    """`compute` with engine, device and precision decided, and the reason for the engine.

    Raises InputError where what was asked for is not there, or does not go together.
    """
    if compute.parallel == "fsdp" and compute.compile == "on":
        raise InputError(
            "--compile on: a model that --parallel fsdp cuts over processes is not compiled: leave one out"
        )
    if compute.parallel != "auto" and ranks() == 1:
        raise InputError(
            f"--parallel {compute.parallel} spreads a run over processes, and this is a single one: torchrun starts "
            f"them, as in `torchrun --nproc-per-node 2 -m glasslm train --parallel {compute.parallel}`"
        )
    engine, why = (
        (compute.engine, "") if compute.engine != "auto" else _engine(compute, parameters, training)
    )
    if engine == "numpy":
        _require_numpy_can(compute, training)
        exactly: Precision = "fp32" if compute.precision == "auto" else compute.precision
        return dataclasses.replace(compute, engine=engine, device="cpu", precision=exactly), why
    if not torch_installed():
        asked, instead = "--engine torch", "use --engine numpy"
        if compute.engine == "auto":
            asked, instead = asks_for_torch(compute, training), "do without"
        raise InputError(
            f"{asked} needs PyTorch, which is not installed: `pip install torch`, or {instead}"
        )
    from glasslm.engines.torch import hardware

    device = hardware.device(compute.device)
    precision: Precision = (
        "fp32"  # what is used says the same on every machine; only training is in a hurry
    )
    if training or compute.precision != "auto":
        precision = hardware.precision(compute.precision, device, parameters)
    undecided = compute.engine == "auto" and not asks_for_torch(compute, training)
    if undecided and training and device == "cpu" and precision == "fp32":
        numpy, _ = choose(dataclasses.replace(compute, engine="numpy"), parameters, training)
        return numpy, f"PyTorch sees no GPU here and would compute {_size(parameters)} in fp32, too"
    return dataclasses.replace(compute, engine=engine, device=device, precision=precision), why


def _engine(compute: ComputeConfig, parameters: int, training: bool) -> tuple[EngineName, str]:
    if asked := asks_for_torch(compute, training):
        return "torch", f"{asked} asks for it"
    size = _size(parameters)
    if compute.precision == "fp64":
        return "numpy", "float64 is for checks"
    if not torch_installed():
        return (
            "numpy",
            "PyTorch is not installed" if parameters >= TRAIN_WITH_TORCH else f"{size} are few",
        )
    if training and compute.device == "auto" and gpu_in_sight():
        return "torch", "there is a GPU"
    if parameters >= (TRAIN_WITH_TORCH if training else USE_TORCH):
        return "torch", f"{size} are many"
    return "numpy", f"{size} are few"


def as_recorded(compute: ComputeConfig, record: dict[str, Any]) -> tuple[ComputeConfig, list[str]]:
    """What `compute` leaves open as run.json has it, where that is possible, and what is not: for the same bits."""
    flags: dict[str, Any] = {"parallel": record.get("parallel", "auto")} if ranks() > 1 else {}
    flags |= {"deterministic": record.get("deterministic", False), "engine": record["engine"]}
    notes = []
    if record["engine"] == "torch" and not torch_installed():
        flags["engine"] = "numpy"
        notes.append(
            "this run was computed by PyTorch, which is not installed here: the NumPy engine goes on"
        )
    elif record["engine"] == "numpy" and asks_for_torch(compute, training=True):
        flags["engine"] = "torch"
    engine = flags["engine"] if compute.engine == "auto" else compute.engine
    if engine == record["engine"]:
        flags |= {"precision": record["precision"]} | (
            {"device": "cpu"} if record["device"] == "cpu" else {}
        )
        if engine == "torch" and record.get("processes", 1) == ranks():
            flags["threads"] = record.get("threads", 0)
    elif record["precision"] == "fp64":
        flags["precision"] = "fp64"
    left_open = {"parallel": "auto", "deterministic": False, "engine": "auto", "precision": "auto", "device": "auto",
                 "threads": 0}  # fmt: skip
    compute = dataclasses.replace(
        compute, **{k: v for k, v in flags.items() if getattr(compute, k) == left_open[k]}
    )
    return _possible_here(compute, record, notes)


def _possible_here(
    compute: ComputeConfig, record: dict[str, Any], notes: list[str]
) -> tuple[ComputeConfig, list[str]]:
    """Without what the run had and this machine lacks: narrow numbers, a compiler."""
    if compute.engine != "torch":
        return dataclasses.replace(
            compute, compile="off"
        ) if compute.compile == "auto" else compute, notes
    from glasslm.engines.torch import hardware

    device = hardware.device(compute.device)
    if (
        compute.precision == "bf16" == record["precision"]
        and device == "cpu"
        and not hardware.has_bf16(device)
    ):
        notes.append("this run was computed in bf16, which this machine lacks: it goes on in fp32")
        compute = dataclasses.replace(compute, precision="fp32")
    if compute.compile == "auto":
        again = record.get("compiled", False) and can_compile(
            dataclasses.replace(compute, device=device)
        )
        compute = dataclasses.replace(compute, compile="on" if again else "off")
    return compute, notes


def attends_by_tiles(c: ModelConfig, T: int) -> bool:
    """Whether the NumPy engine's attention over T positions goes by tiles, which drop no probabilities."""
    return c.attention == "flash" or (
        c.attention == "auto" and T >= FLASH_FROM and not c.attention_dropout
    )


def micro_batch_size(config: RunConfig, engine: EngineName) -> int:
    """Rows computed together: as configured, or as many as suit the engine.

    Never by the number of threads, because NumPy's bits depend on it; two threads have work where the batch allows it.
    """
    at_once, shares = (NUMPY_TOKENS, 2) if engine == "numpy" else (TORCH_TOKENS, ranks())
    largest = math.ceil(config.train.batch_size / shares)
    if config.train.micro_batch_size:
        return min(
            config.train.micro_batch_size, config.train.batch_size if engine == "numpy" else largest
        )
    return min(max(1, at_once // config.model.block_size), largest)


def device_free_bytes() -> int:
    """Free memory of the GPU."""
    from glasslm.engines.torch import hardware

    return hardware.free_bytes()


def asks_for_torch(compute: ComputeConfig, training: bool) -> str:
    """The flag that only PyTorch can honour."""
    if compute.device in ("cuda", "mps"):
        return f"--device {compute.device}"
    if compute.precision in ("bf16", "fp16"):
        return f"--precision {compute.precision}"
    if compute.compile == "on":
        return "--compile on"
    if training and ranks() > 1:
        return f"a group of {ranks()} processes"
    return ""


def _require_numpy_can(compute: ComputeConfig, training: bool) -> None:
    if asked := asks_for_torch(compute, training):
        raise InputError(
            f"--engine numpy and {asked} do not go together: the NumPy engine computes on the CPU, in one process, in "
            "fp32 or fp64, and is not compiled. Leave out one of them"
        )


def _size(parameters: int) -> str:
    return (
        f"{parameters / 1e6:.1f}M parameters" if parameters >= 1e6 else f"{parameters:,} parameters"
    )


def can_compile(compute: ComputeConfig) -> bool:
    """Whether the engine chosen can be compiled here. A model cut over ranks (fsdp) is not."""
    if compute.engine != "torch" or compute.parallel == "fsdp":
        return False
    from glasslm.engines.torch import hardware

    return not hardware.compiler_missing(compute.device)


def torch_installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def ranks() -> int:
    """How many processes torchrun has started for this run; 1 without it, whatever a job system has left behind."""
    by_torchrun = {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ.get("WORLD_SIZE", "1")) if by_torchrun else 1


@cache
def gpu_in_sight() -> bool:
    """Whether this machine seems to have a GPU that PyTorch may know, found out without importing it."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    if sys.platform == "win32":
        return shutil.which("nvidia-smi") is not None
    return any(
        Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg")
    )  # NVIDIA, AMD, WSL


def require_divisible(batch_size: int, ranks: int) -> None:
    """Raise InputError unless the processes of a group can share a batch evenly."""
    if batch_size % ranks:
        fitting = max(n for n in range(1, ranks) if batch_size % n == 0)
        raise InputError(
            f"{ranks} processes cannot share a batch of {batch_size} sequences evenly: choose --batch-size as a "
            f"multiple of {ranks}, for example {-(-batch_size // ranks) * ranks}, or start {fitting} of them"
        )


def thread_count(asked: int) -> int:
    """`asked`, or GLASSLM_THREADS, or the cores this process may use, divided among the processes of torchrun here.

    Raises InputError where GLASSLM_THREADS is no number.
    """
    if asked:
        return asked
    from_environment = os.environ.get("GLASSLM_THREADS", "").strip()
    if from_environment:
        if not (
            from_environment.isascii() and from_environment.isdigit() and int(from_environment)
        ):
            raise InputError(
                f"GLASSLM_THREADS is '{from_environment}': expected a whole number, 1 or more"
            )
        return int(from_environment)
    return max(1, len(cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))
