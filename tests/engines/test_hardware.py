"""What this machine's PyTorch is said to have: devices, precisions, a compiler; machines are made up by monkeypatch."""

from pathlib import Path
from typing import Any

import pytest

from glasslm.errors import InputError

torch = pytest.importorskip("torch")

from glasslm.engines.torch import hardware  # noqa: E402 - needs PyTorch
from glasslm.engines.torch.hardware import BF16_FROM  # noqa: E402


@pytest.fixture(params=[(), ("mps",), ("cuda",)], ids=["cpu", "mps", "cuda"])
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices of a machine, the best one first."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: "cuda" in request.param)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: "mps" in request.param)
    return [*request.param, "cpu"]


def test_auto_is_the_best_device_there_is(there: list[str]) -> None:
    assert hardware.device("auto") == there[0]


@pytest.mark.parametrize("asked", ["cpu", "mps", "cuda"])
def test_a_device_is_had_or_refused_with_those_that_are_there(asked: Any, there: list[str]) -> None:
    if asked in there:
        assert hardware.device(asked) == asked
        return
    with pytest.raises(InputError) as caught:
        hardware.device(asked)
    said = str(caught.value)
    assert said.startswith(
        f"--device {asked}: PyTorch finds no such device here, only {' and '.join(there)}: "
    )
    assert "leave --device out" in said


@pytest.mark.parametrize(("device", "parameters", "chosen"), [
    ("cpu", BF16_FROM - 1, "fp32"), ("cpu", BF16_FROM, "bf16"), ("cuda", 1, "bf16"),
])  # fmt: skip
def test_bf16_is_automatic_where_it_pays(
    device: Any, parameters: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    assert hardware.precision("auto", device, parameters) == chosen
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    assert hardware.precision("auto", device, parameters) == "fp32"


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
        hardware.precision("bf16", device, 10**9)
    assert hardware.precision("fp16", device, 1) == "fp16"
    assert hardware.precision("fp32", device, 10**9) == "fp32"


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bf16_is_a_feature_of_the_cpu(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {feature: True})
    assert hardware.has_bf16("cpu")
    assert hardware.precision("bf16", "cpu", 1) == "bf16"


def test_mps_has_no_float64() -> None:
    with pytest.raises(InputError, match=r"--precision fp64: mps .*--device cpu"):
        hardware.precision("fp64", "mps", 1)
    assert hardware.precision("fp64", "cpu", 1) == "fp64"


def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert hardware.compiler_missing("cpu") == "there is no C++ compiler"
    mine = tmp_path / "my-compiler"
    mine.touch(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert hardware.compiler_missing("cpu") == ""
    assert "mps" in hardware.compiler_missing("mps")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert hardware.compiler_missing("cuda") == "Triton is not installed"


@pytest.mark.gpu
def test_a_gpu_has_free_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert 0 < hardware.free_bytes() <= torch.cuda.get_device_properties(0).total_memory
