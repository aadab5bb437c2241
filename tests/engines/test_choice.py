"""The choice of engine, device and precision, its reasons, and its refusals in one line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines import choice
from glasslm.engines.choice import (
    COMPILED_TRAINING_MIN_PARAMETERS,
    TORCH_INFERENCE_MIN_PARAMETERS,
    TORCH_TRAINING_MIN_PARAMETERS,
    choose_engine,
    compute_from_record,
)
from glasslm.engines.factory import make_engine
from glasslm.engines.resources import count_ranks, require_divisible
from glasslm.errors import InputError
from small_runs import train_command, write_text

FEW, MANY = TORCH_TRAINING_MIN_PARAMETERS - 1, TORCH_TRAINING_MIN_PARAMETERS
AUTO = ComputeConfig()


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun and no GPU, whatever the machine that runs these tests has."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(choice, "has_gpu", lambda: False)


@pytest.fixture
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Any:
    """hardware.py on a machine with a CPU only, which has fast bfloat16."""
    pytest.importorskip("torch")
    from glasslm.engines.torch import hardware

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    return hardware


# -- auto ------------------------------------------------------------------------------------------


def test_numpy_trains_small_models_and_torch_large_ones(hardware: Any) -> None:
    numpy, reason = choose_engine(AUTO, FEW, training=True)
    assert (numpy.engine, numpy.device, numpy.precision) == ("numpy", "cpu", "fp32")
    assert reason == "3.0M parameters; torch from 3M"
    torch, reason = choose_engine(AUTO, MANY, training=True)
    assert (torch.engine, torch.device, torch.precision) == ("torch", "cpu", "bf16")
    assert reason == "3.0M parameters; torch from 3M"


def test_compiled_bfloat16_trains_smaller_models(
    hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a run is long enough to be compiled, on a CPU with bfloat16 products."""
    threshold = COMPILED_TRAINING_MIN_PARAMETERS
    torch, reason = choose_engine(AUTO, threshold, training=True, compiled=True)
    assert (torch.engine, torch.device, torch.precision) == ("torch", "cpu", "bf16")
    assert reason == "500,000 parameters; compiled torch from 0.5M"
    smaller, _ = choose_engine(AUTO, threshold - 1, training=True, compiled=True)
    fp32, _ = choose_engine(ComputeConfig(precision="fp32"), threshold, True, compiled=True)
    named, _ = choose_engine(ComputeConfig(engine="numpy"), threshold, True, compiled=True)
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    plain, _ = choose_engine(AUTO, threshold, training=True, compiled=True)
    assert [c.engine for c in (smaller, fp32, named, plain)] == 4 * ["numpy"]


def test_numpy_serves_larger_models_than_it_trains(hardware: Any) -> None:
    threshold = TORCH_INFERENCE_MIN_PARAMETERS
    assert choose_engine(AUTO, threshold - 1, training=False)[0].engine == "numpy"
    assert choose_engine(AUTO, threshold, training=False)[0].engine == "torch"


def test_a_gpu_is_taken_for_training(hardware: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    compute, reason = choose_engine(AUTO, FEW, training=True)
    assert (compute.engine, compute.device, compute.precision, reason) == (
        "torch",
        "cuda",
        "bf16",
        "there is a GPU",
    )
    assert choose_engine(AUTO, FEW, training=False)[0].engine == "numpy"
    compute, reason = choose_engine(ComputeConfig(device="cpu"), FEW, training=True)
    assert (compute.engine, reason) == ("numpy", "3.0M parameters; torch from 3M")


def test_a_gpu_that_torch_does_not_know_is_none(
    hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "has_gpu", lambda: True)
    compute, reason = choose_engine(AUTO, FEW, training=True)
    assert (compute.engine, compute.device) == ("numpy", "cpu")
    assert reason == "3.0M parameters; PyTorch has no GPU here and would use fp32"
    compute, reason = choose_engine(AUTO, MANY, training=True)
    assert (compute.engine, reason) == ("torch", "3.0M parameters; torch from 3M")


def test_a_cpu_without_bfloat16_gains_nothing_by_torch(
    hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    assert choose_engine(AUTO, MANY, training=True)[0].engine == "numpy"
    assert choose_engine(ComputeConfig(engine="torch"), MANY, training=True)[0].precision == "fp32"


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"device": "mps"}, "--device mps"),
        ({"precision": "fp16"}, "--precision fp16"),
        ({"compile": "on"}, "--compile on"),
    ],
)
def test_a_flag_that_only_torch_honours_chooses_it(
    flags: dict[str, Any], flag: str, hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    compute, reason = choose_engine(ComputeConfig(**flags), FEW, training=True)
    assert (compute.engine, reason) == ("torch", f"{flag} needs PyTorch")
    assert dataclasses.replace(compute, **flags) == compute


def test_a_group_of_processes_needs_torch(hardware: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": 4,
        "RANK": 0,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 4,
        "MASTER_ADDR": "a",
    }.items():
        monkeypatch.setenv(name, str(value))
    assert choose_engine(AUTO, FEW, training=True)[0].engine == "torch"
    assert choose_engine(ComputeConfig(parallel="fsdp"), FEW, training=True)[0].parallel == "fsdp"
    with pytest.raises(
        InputError, match="--engine numpy and a group of 4 processes do not go together"
    ):
        choose_engine(ComputeConfig(engine="numpy"), FEW, training=True)


def test_checks_in_float64_are_for_numpy(hardware: Any) -> None:
    compute, reason = choose_engine(ComputeConfig(precision="fp64"), MANY, training=True)
    assert (compute.engine, compute.precision, reason) == ("numpy", "fp64", "float64 is for checks")


@pytest.mark.usefixtures("_no_torch")
def test_numpy_does_what_it_can_without_torch() -> None:
    compute, reason = choose_engine(AUTO, MANY, training=True)
    assert (compute.engine, reason) == ("numpy", "PyTorch is not installed")
    assert choose_engine(AUTO, FEW, training=True)[1] == "3.0M parameters; torch from 3M"


def test_a_choice_is_chosen_again(hardware: Any) -> None:
    for parameters in (FEW, MANY):
        compute, _ = choose_engine(AUTO, parameters, training=True)
        assert choose_engine(compute, parameters, training=True) == (compute, "")


def test_torch_is_not_imported_where_numpy_computes() -> None:
    """Neither for training, nor for inference with a larger model, nor for the reason."""
    program = """
import json, sys
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines import choice
from glasslm.engines.factory import make_engine
choice.has_gpu = lambda: False
names = [make_engine(RunConfig(), 65, ComputeConfig(), training).name for training in (True, False)]
parameters = choice.TORCH_INFERENCE_MIN_PARAMETERS - 1
names += [choice.choose_engine(ComputeConfig(), parameters, training=False)[0].engine]
print(json.dumps([names, "torch" in sys.modules]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    process = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=60,
    )
    assert json.loads(process.stdout) == [["numpy"] * 3, False], process.stderr


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_torch")
@pytest.mark.parametrize(
    ("flags", "flag", "cure"),
    [
        ({"engine": "torch"}, "--engine torch", "use --engine numpy"),
        ({"engine": "torch", "device": "cuda"}, "--engine torch", "use --engine numpy"),
        ({"device": "cuda"}, "--device cuda", "leave it out"),
        ({"precision": "bf16"}, "--precision bf16", "leave it out"),
    ],
)
def test_torch_is_missing(flags: dict[str, Any], flag: str, cure: str) -> None:
    message = refusal(flags)
    assert (
        message == f"{flag} needs PyTorch, which is not installed: `pip install torch`, or {cure}"
    )


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"device": "cuda"}, "--device cuda"),
        ({"device": "mps"}, "--device mps"),
        ({"precision": "bf16"}, "--precision bf16"),
        ({"precision": "fp16"}, "--precision fp16"),
        ({"compile": "on"}, "--compile on"),
    ],
)
def test_numpy_cannot(flags: dict[str, Any], flag: str) -> None:
    message = refusal({"engine": "numpy"} | flags)
    assert message.startswith(f"--engine numpy and {flag} do not go together: ")
    assert "on the CPU" in message
    assert message.endswith("Leave out one of them")


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp64"])
def test_numpy_can(precision: Any) -> None:
    compute, _ = choose_engine(
        ComputeConfig(engine="numpy", device="cpu", precision=precision), MANY, training=True
    )
    assert compute.precision == ("fp32" if precision == "auto" else precision)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("engine", ["auto", "numpy", "torch"])
def test_one_process_is_no_group(parallel: str, engine: str) -> None:
    message = refusal({"parallel": parallel, "engine": engine})
    assert message.startswith(f"--parallel {parallel} ")
    assert f"torchrun --nproc-per-node 2 -m glasslm train --parallel {parallel}" in message


def test_a_batch_is_shared_evenly() -> None:
    for batch_size, processes in ((16, 1), (16, 2), (12, 4), (3, 3)):
        require_divisible(batch_size, processes)
    with pytest.raises(
        InputError,
        match=r"3 processes cannot share a batch of 16 .* for example 18, or start 2 of them",
    ):
        require_divisible(16, 3)
    with pytest.raises(InputError, match="for example 8, or start 4 of them"):
        require_divisible(4, 8)


def test_there_is_no_compiler(
    hardware: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        InputError, match=r"--compile on: there is no C\+\+ compiler.*--compile off"
    ):
        make_engine(RunConfig(), 65, ComputeConfig(compile="on"), training=True)


@pytest.mark.parametrize(
    "flags",
    [
        "--engine torch --device cuda",
        "--device mps",
        "--engine numpy --device cuda",
        "--engine numpy --precision bf16",
        "--parallel fsdp",
        "--engine torch --precision bf16",
    ],
)
def test_the_command_says_it_in_one_line(
    flags: str,
    hardware: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No run folder is created."""
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    command = train_command(write_text(tmp_path / "text.txt"), tmp_path / "run")
    assert cli.main([*map(str, command), *flags.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glasslm")]
    assert line.startswith("glasslm train: --")
    assert not (tmp_path / "run").exists()


def refusal(flags: dict[str, Any]) -> str:
    """The message, one line, that refuses these flags."""
    with pytest.raises(InputError) as caught:
        choose_engine(ComputeConfig(**flags), FEW, training=True)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_resume_takes_what_the_run_had_where_it_can(
    hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {
        "engine": "torch", "device": "cpu", "precision": "bf16", "compiled": True, "threads": 5,
        "processes": 1, "parallel": "auto", "deterministic": True,
    }  # fmt: skip
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    monkeypatch.setattr(hardware, "missing_compiler", lambda device: "")
    same, notes = compute_from_record(AUTO, record)
    assert (same.engine, same.device, same.precision, same.compile) == (
        "torch",
        "cpu",
        "bf16",
        "on",
    )
    assert (same.threads, same.deterministic, notes) == (5, True, [])
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    monkeypatch.setattr(hardware, "missing_compiler", lambda device: "there is none")
    other, notes = compute_from_record(AUTO, record)
    assert (other.precision, other.compile) == ("fp32", "off")
    assert "bf16" in notes[0]
    monkeypatch.setattr(hardware, "choose_device", lambda requested: "cuda")
    monkeypatch.setattr(hardware, "has_bf16", lambda device: device == "cpu")
    on_gpu, notes = compute_from_record(AUTO, record | {"device": "cuda"})
    assert (on_gpu.precision, "bf16" in notes[0]) == ("fp32", True)
    assert choose_engine(on_gpu, MANY, training=True)[0].precision == "fp32"
    monkeypatch.setattr(hardware, "choose_device", lambda requested: "mps")
    assert compute_from_record(AUTO, record | {"device": "mps"})[0].precision == "bf16"
    numpy, notes = compute_from_record(ComputeConfig(engine="numpy"), record)
    assert (numpy.engine, numpy.precision, numpy.compile, numpy.threads, notes) == (
        "numpy",
        "auto",
        "off",
        0,
        [],
    )
    assert compute_from_record(AUTO, record | {"processes": 2})[0].threads == 0


def test_a_job_system_that_counts_processes_is_not_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert count_ranks() == 1
