"""The BLAS kernel is recorded, and one that is slower than the processor's own is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from glasslm.config.schema import ComputeConfig
from glasslm.runs import blas
from glasslm.runs.blas import BlasRecord, format_blas, loaded_blas, slow_kernel_warning

AVX512 = "fma avx avx2 avx512f avx512dq avx512cd avx512bw avx512vl"
AVX2 = "sse2 fma avx avx2"


def kernel_of(name: str, library: str = "openblas") -> BlasRecord:
    return BlasRecord(library=library, version="0.3.31", kernel=name, threads=2)


def write_cpuinfo(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n", "utf-8")
    return path


@pytest.mark.parametrize(
    ("forced", "kernel", "flags", "instructions"),
    [
        ("Haswell", "Haswell", AVX512, "AVX-512"),
        ("zen", "Zen", AVX512, "AVX-512"),
        ("Nehalem", "Nehalem", AVX512, "AVX-512"),
        ("Nehalem", "Nehalem", AVX2, "AVX2"),
        ("Sandybridge", "Sandybridge", AVX2, "AVX2"),
        ("Prescott", "Prescott", "sse2 avx", "AVX"),
        # nothing is lost
        ("", "Haswell", AVX512, ""),
        ("SkylakeX", "SkylakeX", AVX512, ""),
        ("Cooperlake", "Cooperlake", AVX512, ""),
        ("Haswell", "SkylakeX", AVX512, ""),  # the library did not follow
        ("Haswell", "Haswell", AVX2, ""),
        ("Zen", "Zen", AVX2, ""),
        ("Haswell", "Haswell", "fma avx avx2 avx512f", ""),  # without what the kernels need
        ("Nehalem", "Nehalem", "sse2", ""),
    ],
)
def test_a_forced_kernel_that_is_slower_is_named_with_its_cure(
    forced: str, kernel: str, flags: str, instructions: str, tmp_path: Path
) -> None:
    warning = slow_kernel_warning(
        kernel_of(kernel), {"OPENBLAS_CORETYPE": forced}, write_cpuinfo(tmp_path, flags)
    )
    if not instructions:
        assert warning == ""
        return
    for part in (f"OPENBLAS_CORETYPE={forced}", kernel, instructions, "Unset OPENBLAS_CORETYPE"):
        assert part in warning


def test_nothing_is_said_where_nothing_is_known(tmp_path: Path) -> None:
    forced = {"OPENBLAS_CORETYPE": "Haswell"}
    cpuinfo = write_cpuinfo(tmp_path, AVX512)
    assert slow_kernel_warning(None, forced, cpuinfo) == ""
    assert slow_kernel_warning(kernel_of("Haswell", "mkl"), forced, cpuinfo) == ""
    assert slow_kernel_warning(kernel_of("Haswell"), forced, tmp_path / "missing") == ""
    cpuinfo.write_text("Features : fp asimd\n", "utf-8")  # ARM
    assert slow_kernel_warning(kernel_of("Haswell"), forced, cpuinfo) == ""


def test_only_a_numpy_run_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "slow_kernel_warning", lambda *_: "slow")
    messages: list[str] = []
    for engine in get_args(Literal["torch", "numpy"]):
        blas.warn_of_slow_kernel(ComputeConfig(engine=engine), messages.append)
    assert messages == ["warning: slow"]


def test_the_library_is_described() -> None:
    found: Any = loaded_blas()
    if found is not None:
        assert found["threads"] >= 1
        assert found["library"] in format_blas(found)
    assert format_blas(kernel_of("Zen")) == "openblas 0.3.31 Zen"
    assert format_blas(None) == "an unknown BLAS"
