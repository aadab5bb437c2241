"""Devices, precisions and compilers of imaginary machines, made by monkeypatch."""

from pathlib import Path
from typing import Any

import pytest

from glasslm.errors import InputError

torch = pytest.importorskip("torch")

from glasslm.engines.torch import hardware  # noqa: E402 - needs PyTorch


@pytest.fixture(params=[(), ("mps",), ("cuda",)], ids=["cpu", "mps", "cuda"])
def available(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices of a machine, the best one first."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: "cuda" in request.param)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: "mps" in request.param)
    return [*request.param, "cpu"]


def test_auto_is_the_best_available_device(available: list[str]) -> None:
    assert hardware.choose_device("auto") == available[0]


@pytest.mark.parametrize("requested", ["cpu", "mps", "cuda"])
def test_a_missing_device_is_refused_with_the_available_ones(
    requested: Any, available: list[str]
) -> None:
    if requested in available:
        assert hardware.choose_device(requested) == requested
        return
    with pytest.raises(InputError) as refusal:
        hardware.choose_device(requested)
    message = str(refusal.value)
    assert message.startswith(
        f"--device {requested}: PyTorch finds no such device here, only {' and '.join(available)}: "
    )
    assert "leave --device out" in message


@pytest.mark.parametrize(("device", "is_large", "expected"), [
    ("cpu", False, "fp32"),
    ("cpu", True, "bf16"),
    ("cuda", False, "bf16"),
])  # fmt: skip
def test_auto_is_bf16_where_it_is_faster(
    device: Any, is_large: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    assert hardware.choose_precision("auto", device, is_large=is_large) == expected
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    assert hardware.choose_precision("auto", device, is_large=is_large) == "fp32"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bf16_is_refused_where_the_hardware_lacks_it(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation
    )
    with pytest.raises(
        InputError, match=f"--precision bf16: .*{device}.* no bfloat16 .*: use --precision fp32"
    ):
        hardware.choose_precision("bf16", device, is_large=True)
    assert hardware.choose_precision("fp16", device, is_large=False) == "fp16"
    assert hardware.choose_precision("fp32", device, is_large=True) == "fp32"


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bf16_is_a_feature_of_the_cpu(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {feature: True})
    assert hardware.has_bf16("cpu")
    assert hardware.choose_precision("bf16", "cpu", is_large=False) == "bf16"


def test_mps_has_no_float64() -> None:
    with pytest.raises(InputError, match=r"--precision fp64: mps .*--device cpu"):
        hardware.choose_precision("fp64", "mps", is_large=False)
    assert hardware.choose_precision("fp64", "cpu", is_large=False) == "fp64"


def test_the_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert hardware.missing_compiler("cpu") == "there is no C++ compiler"
    compiler = tmp_path / "my-compiler"
    compiler.touch(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert hardware.missing_compiler("cpu") == ""
    assert "mps" in hardware.missing_compiler("mps")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert hardware.missing_compiler("cuda") == "Triton is not installed"


@pytest.mark.gpu
def test_a_gpu_has_free_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert 0 < hardware.free_gpu_bytes() <= torch.cuda.get_device_properties(0).total_memory
