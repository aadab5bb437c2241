"""What this machine's PyTorch can do: devices, precisions, compiling."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from glasslm.config.schema import DeviceName, Precision
from glasslm.errors import InputError

BF16_FROM = 3_000_000  # parameters: below, on a CPU, casting costs more than it saves (docs/log.md)


def device(asked: DeviceName) -> DeviceName:
    """`asked`, if it is there, or the best one there is."""
    there: list[DeviceName] = ["cpu"]
    alone = "LOCAL_WORLD_SIZE" not in os.environ
    if (
        torch.backends.mps.is_available() and alone
    ):  # what ranks send each other, they cannot send from there
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if asked == "auto":
        return there[0]
    if asked not in there:
        raise InputError(
            f"--device {asked}: PyTorch finds no such device here, only {' and '.join(there)}: leave --device out, or "
            f"see to its driver and to a PyTorch made for it"
        )
    return asked


def precision(asked: Precision, device: DeviceName, parameters: int) -> Precision:
    """`asked`, if the device has it, or bf16 where that is faster, else fp32."""
    if asked == "auto":
        pays = device == "cuda" or parameters >= BF16_FROM
        return "bf16" if pays and has_bf16(device) else "fp32"
    if asked == "bf16" and device != "mps" and not has_bf16(device):
        raise InputError(
            f"--precision bf16: this machine's {device} has no bfloat16 arithmetic: use --precision fp32"
        )
    if asked == "fp64" and device == "mps":
        raise InputError("--precision fp64: mps has no float64: use --device cpu")
    return asked


def has_bf16(device: DeviceName) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones, as hardware does, not emulation."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return False
    can = torch.cpu.get_capabilities()
    return any(can.get(feature, False) for feature in ("amx_bf16", "avx512_bf16", "bf16"))


def free_bytes() -> int:
    """Free memory of the GPU."""
    return torch.cuda.mem_get_info()[0]


def compiler_missing(device: DeviceName) -> str:
    """What torch.compile lacks here, in words; empty if nothing."""
    if device == "cuda":
        if not importlib.util.find_spec("triton"):
            return "Triton is not installed"
        return "" if _finds("CC", "cc", "gcc", "clang") else "there is no C compiler"
    if device == "mps":
        return "it is not ready for mps"
    return "" if _finds("CXX", "c++", "g++", "clang++", "cl") else "there is no C++ compiler"


def _finds(variable: str, *names: str) -> bool:
    """Whether there is one of these programs, or the one that an environment variable names."""
    return any(name and shutil.which(name) for name in (os.environ.get(variable, ""), *names))
