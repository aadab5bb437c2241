"""The devices, precisions and compiler that PyTorch has on this machine, and its denormals."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from glasslm.config.schema import DeviceName, Precision
from glasslm.errors import InputError


def choose_device(requested: DeviceName) -> DeviceName:
    """The requested device, or the best one for "auto". Raises InputError if it is missing."""
    available: list[DeviceName] = ["cpu"]
    is_single_process = "LOCAL_WORLD_SIZE" not in os.environ
    # Processes of a group cannot send each other tensors on mps.
    if torch.backends.mps.is_available() and is_single_process:
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if requested == "auto":
        return available[0]
    if requested not in available:
        raise InputError(
            f"--device {requested}: PyTorch finds no such device here, only "
            f"{' and '.join(available)}: leave --device out, or install its driver and a PyTorch "
            "built for it"
        )
    return requested


def choose_precision(requested: Precision, device: DeviceName, *, is_large: bool) -> Precision:
    """The requested precision; for "auto" bf16 where it is faster, else fp32.

    On a CPU, casting a model that is not large to bfloat16 costs more than it saves. Raises
    InputError if the device cannot compute in the requested precision.
    """
    if requested == "auto":
        is_worthwhile = device == "cuda" or is_large
        return "bf16" if is_worthwhile and has_bf16(device) else "fp32"
    if requested == "bf16" and lacks_bf16(device):
        raise InputError(
            f"--precision bf16: this machine's {device} has no bfloat16 arithmetic: "
            "use --precision fp32"
        )
    if requested == "fp64" and device == "mps":
        raise InputError("--precision fp64: mps has no float64: use --device cpu")
    return requested


def has_bf16(device: DeviceName) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, faster than float32 ones."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return False
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def lacks_bf16(device: DeviceName) -> bool:
    """Whether the device cannot compute in bf16. mps can, without being faster."""
    return device != "mps" and not has_bf16(device)


def free_gpu_bytes() -> int:
    """Free memory of the GPU, in bytes."""
    return torch.cuda.mem_get_info()[0]


def missing_compiler(device: DeviceName) -> str:
    """A phrase for what torch.compile lacks on this machine; empty if nothing."""
    if device == "cuda":
        if not importlib.util.find_spec("triton"):
            return "Triton is not installed"
        return "" if _has_program("CC", "cc", "gcc", "clang") else "there is no C compiler"
    if device == "mps":
        return "it is not ready for mps"
    return "" if _has_program("CXX", "c++", "g++", "clang++", "cl") else "there is no C++ compiler"


def _has_program(variable: str, *names: str) -> bool:
    """Whether one of these programs exists, or the one that an environment variable names."""
    return any(name and shutil.which(name) for name in (os.environ.get(variable, ""), *names))


@contextmanager
def flush_denormals() -> Iterator[None]:
    """A context in which denormals become zero: gradients near zero slow a CPU step 30 times.

    It affects the calling thread, and threads that start in it: PyTorch's start with its first
    large sum.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # the setting belongs to the thread, which others use too


@flush_denormals()
def start_threads(count: int) -> None:
    """Start PyTorch's CPU threads, which flush denormals; with `count` 0 as many as it chooses."""
    if count:
        torch.set_num_threads(count)
    torch.zeros(1 << 20).sum()  # a thread takes the mode that is set when it starts
