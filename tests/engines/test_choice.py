"""Which engine computes where, in which precision and why; and what is refused, in one line that names the cure."""

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
    TRAIN_WITH_TORCH,
    USE_TORCH,
    as_recorded,
    choose,
    ranks,
    require_divisible,
)
from glasslm.engines.factory import make_engine
from glasslm.errors import InputError
from small_runs import words, write_text

FEW, MANY = TRAIN_WITH_TORCH - 1, TRAIN_WITH_TORCH
AUTO = ComputeConfig()


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun, and no GPU in sight, whatever the machine that runs these tests has."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(choice, "gpu_in_sight", lambda: False)


@pytest.fixture
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Any:
    """hardware.py on a machine that has a CPU alone, which multiplies bfloat16 as fast as it likes."""
    pytest.importorskip("torch")
    from glasslm.engines.torch import hardware

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    return hardware


# -- auto -------------------------------------------------------------------------------------------------------------


def test_numpy_trains_small_models_and_torch_large_ones(hardware: Any) -> None:
    numpy, why = choose(AUTO, FEW, training=True)
    assert (numpy.engine, numpy.device, numpy.precision) == ("numpy", "cpu", "fp32")
    assert why == "3.0M parameters are few"
    torch, why = choose(AUTO, MANY, training=True)
    assert (torch.engine, torch.device, torch.precision) == ("torch", "cpu", "bf16")
    assert why == "3.0M parameters are many"


def test_numpy_serves_larger_models_than_it_trains(hardware: Any) -> None:
    assert choose(AUTO, USE_TORCH - 1, training=False)[0].engine == "numpy"
    assert choose(AUTO, USE_TORCH, training=False)[0].engine == "torch"


def test_a_gpu_is_taken_for_training(hardware: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "gpu_in_sight", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    chosen, why = choose(AUTO, FEW, training=True)
    assert (chosen.engine, chosen.device, chosen.precision, why) == (
        "torch",
        "cuda",
        "bf16",
        "there is a GPU",
    )
    assert choose(AUTO, FEW, training=False)[0].engine == "numpy"
    chosen, why = choose(ComputeConfig(device="cpu"), FEW, training=True)
    assert (chosen.engine, why) == ("numpy", "3.0M parameters are few")


def test_a_gpu_that_torch_does_not_know_is_none(
    hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "gpu_in_sight", lambda: True)
    chosen, why = choose(AUTO, FEW, training=True)
    assert (chosen.engine, chosen.device) == ("numpy", "cpu")
    assert why == "PyTorch sees no GPU here and would compute 3.0M parameters in fp32, too"
    assert choose(AUTO, MANY, training=True)[0].engine == "torch"


def test_a_cpu_without_bfloat16_gains_nothing_by_torch(
    hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    assert choose(AUTO, MANY, training=True)[0].engine == "numpy"
    assert choose(ComputeConfig(engine="torch"), MANY, training=True)[0].precision == "fp32"


@pytest.mark.parametrize(
    ("asked", "flag"),
    [
        ({"device": "mps"}, "--device mps"),
        ({"precision": "fp16"}, "--precision fp16"),
        ({"compile": "on"}, "--compile on"),
    ],
)
def test_a_flag_that_only_torch_honours_chooses_it(
    asked: dict[str, Any], flag: str, hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    chosen, why = choose(ComputeConfig(**asked), FEW, training=True)
    assert (chosen.engine, why) == ("torch", f"{flag} asks for it")
    assert dataclasses.replace(chosen, **asked) == chosen


def test_a_group_of_processes_needs_torch(hardware: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": 4,
        "RANK": 0,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 4,
        "MASTER_ADDR": "a",
    }.items():
        monkeypatch.setenv(name, str(value))
    assert choose(AUTO, FEW, training=True)[0].engine == "torch"
    assert choose(ComputeConfig(parallel="fsdp"), FEW, training=True)[0].parallel == "fsdp"
    with pytest.raises(
        InputError, match="--engine numpy and a group of 4 processes do not go together"
    ):
        choose(ComputeConfig(engine="numpy"), FEW, training=True)


def test_checks_in_float64_are_for_numpy(hardware: Any) -> None:
    chosen, why = choose(ComputeConfig(precision="fp64"), MANY, training=True)
    assert (chosen.engine, chosen.precision, why) == ("numpy", "fp64", "float64 is for checks")


@pytest.mark.usefixtures("_no_torch")
def test_numpy_does_what_it_can_without_torch() -> None:
    chosen, why = choose(AUTO, MANY, training=True)
    assert (chosen.engine, why) == ("numpy", "PyTorch is not installed")
    assert choose(AUTO, FEW, training=True)[1] == "3.0M parameters are few"


def test_what_is_chosen_is_chosen_again(hardware: Any) -> None:
    for parameters in (FEW, MANY):
        chosen, _ = choose(AUTO, parameters, training=True)
        assert choose(chosen, parameters, training=True) == (chosen, "")


def test_torch_is_not_imported_where_numpy_computes() -> None:
    """Not to train, nor to use a larger model, nor to say why."""
    program = """
import json, sys
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines import choice
from glasslm.engines.factory import make_engine
choice.gpu_in_sight = lambda: False
names = [make_engine(RunConfig(), 65, ComputeConfig(), training).name for training in (True, False)]
names += [choice.choose(ComputeConfig(), choice.USE_TORCH - 1, training=False)[0].engine]
print(json.dumps([names, "torch" in sys.modules]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=60,
    )
    assert json.loads(done.stdout) == [["numpy"] * 3, False], done.stderr


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_torch")
@pytest.mark.parametrize(
    ("asked", "flag", "cure"),
    [
        ({"engine": "torch"}, "--engine torch", "use --engine numpy"),
        ({"engine": "torch", "device": "cuda"}, "--engine torch", "use --engine numpy"),
        ({"device": "cuda"}, "--device cuda", "do without"),
        ({"precision": "bf16"}, "--precision bf16", "do without"),
    ],
)
def test_torch_is_missing(asked: dict[str, Any], flag: str, cure: str) -> None:
    said = refusal(asked)
    assert said == f"{flag} needs PyTorch, which is not installed: `pip install torch`, or {cure}"


@pytest.mark.parametrize(
    ("asked", "flag"),
    [
        ({"device": "cuda"}, "--device cuda"),
        ({"device": "mps"}, "--device mps"),
        ({"precision": "bf16"}, "--precision bf16"),
        ({"precision": "fp16"}, "--precision fp16"),
        ({"compile": "on"}, "--compile on"),
    ],
)
def test_numpy_cannot(asked: dict[str, Any], flag: str) -> None:
    said = refusal({"engine": "numpy"} | asked)
    assert said.startswith(f"--engine numpy and {flag} do not go together: ")
    assert "on the CPU" in said
    assert said.endswith("Leave out one of them")


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp64"])
def test_numpy_can(precision: Any) -> None:
    chosen, _ = choose(
        ComputeConfig(engine="numpy", device="cpu", precision=precision), MANY, training=True
    )
    assert chosen.precision == ("fp32" if precision == "auto" else precision)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("engine", ["auto", "numpy", "torch"])
def test_one_process_is_no_group(parallel: str, engine: str) -> None:
    said = refusal({"parallel": parallel, "engine": engine})
    assert said.startswith(f"--parallel {parallel} ")
    assert f"torchrun --nproc-per-node 2 -m glasslm train --parallel {parallel}" in said


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
    """And nothing is made of it."""
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    command = words(write_text(tmp_path / "text.txt"), tmp_path / "run")
    assert cli.main([*map(str, command), *flags.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glasslm")]
    assert line.startswith("glasslm train: --")
    assert not (tmp_path / "run").exists()


def refusal(asked: dict[str, Any]) -> str:
    """The one line in which `asked` is refused."""
    with pytest.raises(InputError) as caught:
        choose(ComputeConfig(**asked), FEW, training=True)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_resume_takes_what_the_run_had_where_it_can(
    hardware: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {
        "engine": "torch", "device": "cpu", "precision": "bf16", "compiled": True, "threads": 5, "processes": 1,
        "parallel": "auto", "deterministic": True,
    }  # fmt: skip
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    monkeypatch.setattr(hardware, "compiler_missing", lambda device: "")
    same, notes = as_recorded(AUTO, record)
    assert (same.engine, same.device, same.precision, same.compile) == (
        "torch",
        "cpu",
        "bf16",
        "on",
    )
    assert (same.threads, same.deterministic, notes) == (5, True, [])
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    monkeypatch.setattr(hardware, "compiler_missing", lambda device: "there is none")
    other, notes = as_recorded(AUTO, record)
    assert (other.precision, other.compile) == ("fp32", "off")
    assert "bf16" in notes[0]
    asked, notes = as_recorded(ComputeConfig(engine="numpy"), record)
    assert (asked.engine, asked.precision, asked.compile, asked.threads, notes) == (
        "numpy",
        "auto",
        "off",
        0,
        [],
    )
    assert as_recorded(AUTO, record | {"processes": 2})[0].threads == 0


def test_a_job_system_that_counts_processes_is_not_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert ranks() == 1
