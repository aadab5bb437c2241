"""The resources of a run on this machine: PyTorch, GPUs, CPU cores, processes of torchrun.

Nothing here imports PyTorch, except to ask for a GPU's free memory.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path

from glasslm.errors import InputError


def is_torch_installed() -> bool:
    """Whether PyTorch can be imported; it is not imported to find out."""
    return importlib.util.find_spec("torch") is not None


def count_ranks() -> int:
    """The number of processes that torchrun has started for this run; 1 without torchrun.

    WORLD_SIZE alone does not count, because job systems set it for other reasons.
    """
    by_torchrun = {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ.get("WORLD_SIZE", "1")) if by_torchrun else 1


@cache
def has_gpu() -> bool:
    """Whether this machine seems to have a GPU for PyTorch, judged without importing it."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    if sys.platform == "win32":
        return shutil.which("nvidia-smi") is not None
    devices = ("nvidiactl", "kfd", "dxg")  # NVIDIA, AMD, WSL
    return any(Path("/dev", name).exists() for name in devices)


def require_divisible(batch_size: int, ranks: int) -> None:
    """Raise InputError unless the processes of a group can share a batch evenly."""
    if batch_size % ranks:
        divisor = max(n for n in range(1, ranks) if batch_size % n == 0)
        multiple = -(-batch_size // ranks) * ranks
        raise InputError(
            f"{ranks} processes cannot share a batch of {batch_size} sequences evenly: choose "
            f"--batch-size as a multiple of {ranks}, for example {multiple}, or start {divisor} of "
            "them"
        )


def thread_count(requested: int) -> int:
    """The number of CPU threads: `requested`, or GLASSLM_THREADS, or the available cores.

    The processes of torchrun on this machine divide the cores. Raises InputError where
    GLASSLM_THREADS is not a positive whole number.
    """
    if requested:
        return requested
    setting = os.environ.get("GLASSLM_THREADS", "").strip()
    if setting:
        if not (setting.isascii() and setting.isdigit() and int(setting)):
            raise InputError(f"GLASSLM_THREADS is '{setting}': expected a whole number, 1 or more")
        return int(setting)
    return max(1, len(available_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def available_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def free_gpu_bytes() -> int:
    """Free memory of the GPU, in bytes."""
    from glasslm.engines.torch import hardware

    return hardware.free_gpu_bytes()
