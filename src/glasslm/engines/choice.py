"""The choice of engine, device and precision, with its reason, where a setting is `auto`.

Nothing here imports PyTorch unless PyTorch may be going to compute, because the import takes
seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from glasslm.config.schema import ComputeConfig, EngineName, Precision, RunConfig
from glasslm.engines.resources import count_ranks, has_gpu, is_torch_installed
from glasslm.errors import InputError

# Parameters from which on PyTorch trains faster on a CPU (docs/log.md has the crossing).
TORCH_TRAINING_MIN_PARAMETERS = 3_000_000
# The same for PyTorch that is compiled and computes in bfloat16, in runs that repay compiling.
COMPILED_TRAINING_MIN_PARAMETERS = 500_000
# The same for generation and evaluation, where NumPy starts seconds earlier.
TORCH_INFERENCE_MIN_PARAMETERS = 30_000_000
HAS_GPU = "there is a GPU"
NUMPY_MICRO_BATCH_TOKENS = 1024  # their activations stay in a CPU's cache
TORCH_MICRO_BATCH_TOKENS = 8192  # they keep a GPU busy
# Positions from which on PyTorch's fused attention, compiled for a CPU, is as fast as two products
# and a softmax, which need memory for T x T weights (docs/log.md).
COMPILED_FUSED_MIN_LENGTH = 1024


def choose_engine(
    compute: ComputeConfig, parameters: int, training: bool, *, compiled: bool = False
) -> tuple[ComputeConfig, str]:
    """`compute` with engine, device and precision decided, and the reason for the engine.

    The reason is empty where --engine names the engine. `compiled`: PyTorch would be compiled for
    this training, and is faster from fewer parameters on. Raises InputError for flags that exclude
    each other, and for a device, library or precision that this machine does not have.
    """
    _require_possible_parallel(compute)
    engine, reason = compute.engine, ""
    if engine == "auto":
        engine, reason = _auto_engine(compute, parameters, training, compiled)
    if engine == "numpy":
        _require_numpy_supports(compute, training)
        numpy_precision: Precision = "fp32" if compute.precision == "auto" else compute.precision
        return dataclasses.replace(
            compute, engine=engine, device="cpu", precision=numpy_precision
        ), reason
    if not is_torch_installed():
        flag, cure = "--engine torch", "use --engine numpy"
        if compute.engine == "auto":
            flag, cure = torch_only_setting(compute, training), "leave it out"
        raise InputError(
            f"{flag} needs PyTorch, which is not installed: `pip install torch`, or {cure}"
        )
    from glasslm.engines.torch import hardware

    device = hardware.choose_device(compute.device)
    # Inference stays in fp32, so that a model gives the same text on every machine.
    precision: Precision = "fp32"
    if training or compute.precision != "auto":
        min_parameters = _min_training_parameters(compiled)
        precision = hardware.choose_precision(
            compute.precision, device, is_large=parameters >= min_parameters
        )
    is_undecided = compute.engine == "auto" and not torch_only_setting(compute, training)
    if is_undecided and training and device == "cpu" and precision == "fp32":
        numpy_compute, _ = choose_engine(
            dataclasses.replace(compute, engine="numpy"), parameters, training
        )
        return (
            numpy_compute,
            f"{_describe_size(parameters)}; PyTorch has no GPU here and would use fp32",
        )
    if device == "cpu" and reason == HAS_GPU:  # which PyTorch does not find
        reason = _describe_threshold(parameters, _min_training_parameters(compiled), compiled)
    return dataclasses.replace(compute, engine=engine, device=device, precision=precision), reason


def _require_possible_parallel(compute: ComputeConfig) -> None:
    if compute.parallel == "fsdp" and compute.compile == "on":
        raise InputError(
            "--compile on does not go with --parallel fsdp: a model that is sharded over "
            "processes is not compiled. Leave one of them out"
        )
    if compute.parallel != "auto" and count_ranks() == 1:
        raise InputError(
            f"--parallel {compute.parallel} needs several processes, and this is a single one. "
            f"Start them with `torchrun --nproc-per-node 2 -m glasslm train --parallel "
            f"{compute.parallel}`"
        )


def _min_training_parameters(compiled: bool) -> int:
    """Parameters from which on PyTorch, and with it bfloat16, trains faster on a CPU."""
    return COMPILED_TRAINING_MIN_PARAMETERS if compiled else TORCH_TRAINING_MIN_PARAMETERS


def _describe_threshold(parameters: int, threshold: int, compiled: bool) -> str:
    engine = "compiled torch" if compiled else "torch"
    return f"{_describe_size(parameters)}; {engine} from {threshold / 1e6:.3g}M"


def _auto_engine(
    compute: ComputeConfig, parameters: int, training: bool, compiled: bool
) -> tuple[EngineName, str]:
    """The engine that --engine auto chooses here, and the reason."""
    if flag := torch_only_setting(compute, training):
        return "torch", f"{flag} needs PyTorch"
    if compute.precision == "fp64":
        return "numpy", "float64 is for checks"
    threshold = _min_training_parameters(compiled) if training else TORCH_INFERENCE_MIN_PARAMETERS
    size = _describe_threshold(parameters, threshold, compiled)
    if not is_torch_installed():
        too_large = parameters >= TORCH_TRAINING_MIN_PARAMETERS
        return "numpy", "PyTorch is not installed" if too_large else size
    if training and compute.device == "auto" and has_gpu():
        return "torch", HAS_GPU
    return "torch" if parameters >= threshold else "numpy", size


def compute_from_record(
    compute: ComputeConfig, record: Mapping[str, Any]
) -> tuple[ComputeConfig, list[str]]:
    """`compute` with its open flags as run.json recorded them, and a note for each that cannot be.

    A resumed run gives the same bits only if it is computed in the same way.
    """
    flags: dict[str, Any] = {}
    if count_ranks() > 1:
        flags["parallel"] = record.get("parallel", "auto")
    flags |= {"deterministic": record.get("deterministic", False), "engine": record["engine"]}
    notes = []
    if record["engine"] == "torch" and not is_torch_installed():
        flags["engine"] = "numpy"
        notes.append("this run used PyTorch, which is not installed here: it continues in NumPy")
    elif record["engine"] == "numpy" and torch_only_setting(compute, training=True):
        flags["engine"] = "torch"
    engine = flags["engine"] if compute.engine == "auto" else compute.engine
    if engine == record["engine"]:
        flags["precision"] = record["precision"]
        if record["device"] == "cpu":
            flags["device"] = "cpu"
        if engine == "torch" and record.get("processes", 1) == count_ranks():
            flags["threads"] = record.get("threads", 0)
    elif record["precision"] == "fp64":
        flags["precision"] = "fp64"
    open_values = {"parallel": "auto", "deterministic": False, "engine": "auto",
                   "precision": "auto", "device": "auto", "threads": 0}  # fmt: skip
    compute = dataclasses.replace(
        compute, **{k: v for k, v in flags.items() if getattr(compute, k) == open_values[k]}
    )
    return _adapt_to_machine(compute, record, notes)


def _adapt_to_machine(
    compute: ComputeConfig, record: Mapping[str, Any], notes: list[str]
) -> tuple[ComputeConfig, list[str]]:
    """`compute` without bfloat16 or a compiler where the run had them and this machine has not."""
    if compute.engine != "torch":
        if compute.compile == "auto":
            compute = dataclasses.replace(compute, compile="off")
        return compute, notes
    from glasslm.engines.torch import hardware

    device = hardware.choose_device(compute.device)
    if compute.precision == "bf16" == record["precision"] and hardware.lacks_bf16(device):
        notes.append("this run used bf16, which this machine does not have: it continues in fp32")
        compute = dataclasses.replace(compute, precision="fp32")
    if compute.compile == "auto":
        compile_again = record.get("compiled", False) and can_compile(
            dataclasses.replace(compute, device=device)
        )
        compute = dataclasses.replace(compute, compile="on" if compile_again else "off")
    return compute, notes


def resolve_micro_batch_size(config: RunConfig, engine: EngineName) -> int:
    """Rows computed together: as configured, or as many as suit the engine.

    The number of threads has no influence, because NumPy's bits depend on this size. Where the
    batch has two rows or more, there is work for two threads.
    """
    if engine == "numpy":
        tokens, shares = NUMPY_MICRO_BATCH_TOKENS, 2
    else:
        tokens, shares = TORCH_MICRO_BATCH_TOKENS, count_ranks()
    largest = math.ceil(config.train.batch_size / shares)
    if config.train.micro_batch_size:
        return min(
            config.train.micro_batch_size, config.train.batch_size if engine == "numpy" else largest
        )
    return min(max(1, tokens // config.model.block_size), largest)


def torch_only_setting(compute: ComputeConfig, training: bool) -> str:
    """The first setting that only PyTorch can honour, as text; empty if there is none."""
    if compute.device in ("cuda", "mps"):
        return f"--device {compute.device}"
    if compute.precision in ("bf16", "fp16"):
        return f"--precision {compute.precision}"
    if compute.compile == "on":
        return "--compile on"
    if training and count_ranks() > 1:
        return f"a group of {count_ranks()} processes"
    return ""


def _require_numpy_supports(compute: ComputeConfig, training: bool) -> None:
    if flag := torch_only_setting(compute, training):
        raise InputError(
            f"--engine numpy and {flag} do not go together: the NumPy engine computes on the CPU, "
            "in one process, in fp32 or fp64, and is not compiled. Leave out one of them"
        )


def _describe_size(parameters: int) -> str:
    if parameters >= 1e6:
        return f"{parameters / 1e6:.1f}M parameters"
    return f"{parameters:,} parameters"


def can_compile(compute: ComputeConfig) -> bool:
    """Whether the chosen engine can be compiled here. A model sharded over ranks cannot."""
    if compute.engine != "torch" or compute.parallel == "fsdp":
        return False
    from glasslm.engines.torch import hardware

    return not hardware.missing_compiler(compute.device)
