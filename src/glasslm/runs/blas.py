"""The BLAS library of NumPy: which of its kernels computes, and a warning of a kernel that is slow.

OpenBLAS has a kernel for each family of processors and chooses one when it is loaded. The variable
OPENBLAS_CORETYPE overrides the choice. Kernels differ in speed and in the last bits of a product.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np  # noqa: F401  (loads the library that threadpoolctl finds)

from glasslm.config.schema import ComputeConfig
from glasslm.text import Notify

CORETYPE = "OPENBLAS_CORETYPE"
# The instructions of a kernel by its name in OpenBLAS, the widest first, and the flags of a
# processor in /proc/cpuinfo that has them. Any other x86 kernel uses SSE.
KERNELS = {
    "AVX-512": ("skylakex", "cooperlake", "sapphirerapids"),
    "AVX2": ("haswell", "zen"),
    "AVX": ("sandybridge", "bulldozer", "piledriver", "steamroller", "excavator"),
}
CPU_FLAGS = {
    "AVX-512": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "AVX2": {"avx2", "fma"},
    "AVX": {"avx"},
}


class BlasRecord(TypedDict):
    """The BLAS library that computes NumPy's products. Empty where it does not say."""

    library: str
    version: str
    kernel: str
    threads: int  # of the library; the NumPy engine computes with one in each of its own threads


def loaded_blas() -> BlasRecord | None:
    """The BLAS library in this process; None where threadpoolctl knows none, as on macOS."""
    import threadpoolctl

    for info in threadpoolctl.threadpool_info():
        if info["user_api"] == "blas":
            return BlasRecord(
                library=str(info["internal_api"]),
                version=str(info.get("version") or ""),
                kernel=str(info.get("architecture") or ""),
                threads=int(info["num_threads"]),
            )
    return None


def format_blas(blas: Mapping[str, object] | None) -> str:
    """The library, version and kernel as text, such as "openblas 0.3.31 SkylakeX"."""
    words = [str((blas or {}).get(name) or "") for name in ("library", "version", "kernel")]
    return " ".join(filter(None, words)) or "an unknown BLAS"


def warn_of_slow_kernel(compute: ComputeConfig, notify: Notify) -> None:
    """Notify where OPENBLAS_CORETYPE makes a NumPy run slower than this processor allows."""
    if compute.engine == "numpy" and (warning := slow_kernel_warning(loaded_blas(), os.environ)):
        notify(f"warning: {warning}")


def slow_kernel_warning(
    blas: BlasRecord | None,
    environment: Mapping[str, str],
    cpuinfo: Path = Path("/proc/cpuinfo"),  # of Linux
) -> str:
    """A warning that the kernel is slower than the processor's own, with the cure; or ""."""
    forced = environment.get(CORETYPE, "")
    if not forced or blas is None or blas["library"] != "openblas":
        return ""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    flags_line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags_line is None:  # not an x86 processor
        return ""
    flags, kernel = set(flags_line[1].split()), blas["kernel"].lower()
    for instructions, kernels in KERNELS.items():
        if kernel in kernels:
            return ""
        if CPU_FLAGS[instructions] <= flags:
            return (
                f"{CORETYPE}={forced} makes NumPy compute with the kernel {blas['kernel']}, but "
                f"this processor has {instructions}: products may take twice as long. "
                f"Unset {CORETYPE}"
            )
    return ""
