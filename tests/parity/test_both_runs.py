"""Whole runs: started by one engine and finished by the other, resumed, and used by either."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import glasslm
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines import choice
from glasslm.engines.protocol import Engine
from glasslm.runs import run_folder
from glasslm.training import engine_preparation, launch, sample_line
from glasslm.training.outcome import Outcome
from small_runs import (
    comparable_results,
    ignore_message,
    logged_lines,
    read_json,
    small_config,
    without_report,
    write_text,
)

torch = pytest.importorskip("torch")

from both_engines import TOLERANCE, assert_near  # noqa: E402 - needs PyTorch

from glasslm.engines.torch import hardware  # noqa: E402
from glasslm.engines.torch import precision as torch_precision  # noqa: E402
from small_runs import interrupt_at  # noqa: E402

NUMPY = ComputeConfig(engine="numpy", threads=1)
TORCH = ComputeConfig(engine="torch", device="cpu", precision="fp32", threads=1)
ENGINES = {"numpy": NUMPY, "torch": TORCH}
STEPS = 12
# Without samples: one of 200 tokens takes longer than these steps.
QUICK = {"max_steps": STEPS, "sample_interval": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True)
def _bf16_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow bf16 on a CPU without its instructions, where PyTorch emulates it exactly."""
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)


def train(text: Path, run_dir: Path, compute: ComputeConfig, **flags: Any) -> Outcome:
    with without_report():
        return launch.train(
            small_config(text, **QUICK | flags), compute, run_dir, notify=ignore_message
        )


def resume(
    run_dir: Path, compute: ComputeConfig | None = None, messages: list[str] | None = None
) -> Outcome:
    compute = compute or ComputeConfig()
    with without_report():
        return launch.resume(
            run_dir, compute, notify=ignore_message if messages is None else messages.append
        )


def interrupt_run(
    text: Path, run_dir: Path, step: int, compute: ComputeConfig, **flags: Any
) -> Path:
    """The folder of a run that is interrupted in the middle of a step."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(step, patch)
        assert train(text, run_dir, compute, **flags).status == "interrupted"
    return run_dir


def interrupt_again(run_dir: Path, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(step, patch, signal.SIGTERM)
        assert resume(run_dir).status == "interrupted"


def last_state(run_dir: Path, step: int = STEPS) -> dict[str, Any]:
    folder = run_dir / "checkpoints" / f"{step:06d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def with_precision(compute: ComputeConfig, precision: Any) -> ComputeConfig:
    return dataclasses.replace(compute, precision=precision)


# -- from one engine to the other ------------------------------------------------------------------

DROPPING: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each engine, from its first step to its last, in float64."""
    folder = tmp_path_factory.mktemp("runs")
    flags = DROPPING | {"sample_interval": 12}
    return {
        name: train(text, folder / name, with_precision(compute, "fp64"), **flags).run_dir
        for name, compute in ENGINES.items()
    }


def test_both_engines_train_the_same_model(uninterrupted: dict[str, Path]) -> None:
    """Weights, moments, losses and samples; only the recorded engine differs."""
    by_numpy, by_torch = uninterrupted["numpy"], uninterrupted["torch"]
    assert_near(last_state(by_torch), last_state(by_numpy), TOLERANCE["fp64"])
    for kind in ("step", "eval", "checkpoint"):
        for line, same in zip(
            logged_lines(by_numpy, kind), logged_lines(by_torch, kind), strict=True
        ):
            del line["timing"], same["timing"]
            numbers = {key: value for key, value in line.items() if isinstance(value, float)}
            assert {key: same[key] for key in numbers} == pytest.approx(numbers, rel=1e-9)
            assert same | numbers == line
    assert logged_lines(by_numpy, "sample") == logged_lines(by_torch, "sample")
    samples = [len(line["text"]) for line in logged_lines(by_numpy, "sample")]
    assert samples == [sample_line.SAMPLE_TOKENS] * 2
    assert (
        run_folder.Run(by_numpy).record["engine"],
        run_folder.Run(by_torch).record["engine"],
    ) == (
        "numpy",
        "torch",
    )


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("muon", "fp64"), ("adamw", "fp64"), ("sgd", "fp32")]
)
@pytest.mark.parametrize("first", ENGINES)
def test_one_engine_finishes_the_run_of_the_other(
    first: str, optimizer: str, precision: Any, text: Path, tmp_path: Path
) -> None:
    """The weights are those of one engine. The second takes the precision from the record."""
    second: Any = "torch" if first == "numpy" else "numpy"
    flags = {"optimizer": optimizer} | DROPPING
    whole = train(
        text, tmp_path / "whole", with_precision(ENGINES[first], precision), **flags
    ).run_dir
    run = interrupt_run(
        text, tmp_path / "run", 4, with_precision(ENGINES[first], precision), **flags
    )
    assert resume(run, ComputeConfig(engine=second, device="cpu", threads=1)).status == "finished"
    assert_near(last_state(run), last_state(whole), TOLERANCE[precision])
    assert [line["step"] for line in logged_lines(run, "step")] == list(range(1, STEPS + 1))


# -- interruption and resume, by PyTorch alone -----------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "muon, dropout": DROPPING,
    "adamw, epochs": {"optimizer": "adamw", "epochs": 0.7, "dropout": 0.1, "micro_batch_size": 3},
    "sgd, one micro-batch": {"optimizer": "sgd", "micro_batch_size": 8, "schedule": "wsd"},
    "samples, of validation too": {
        "block_size": 4,
        "val_fraction": 0.5,
        "eval_interval": 3,
        "sample_interval": 6,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    variant: str, text: Path, tmp_path: Path
) -> None:
    """Bit for bit, after two interruptions, and with no flag that names the engine."""
    whole = train(text, tmp_path / "whole", TORCH, **VARIANTS[variant])
    steps = logged_lines(whole.run_dir, "end")[0]["step"]
    run = interrupt_run(text, tmp_path / "cut", 4, TORCH, **VARIANTS[variant])
    interrupt_again(run, 9)
    last = resume(run)
    assert (last.status, last.sample) == ("finished", whole.sample)
    assert comparable_results(run, steps) == comparable_results(whole.run_dir, steps)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_narrow_run_is_resumed_bit_for_bit(
    precision: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while float16's loss scale falls from too high a start and rises again."""
    monkeypatch.setattr(torch_precision, "MAX_LOSS_SCALE", 2.0**30)
    monkeypatch.setattr(torch_precision, "SCALE_GROWTH_UPDATES", 5)
    compute = with_precision(TORCH, precision)
    whole = train(text, tmp_path / "whole", compute, **DROPPING).run_dir
    run = interrupt_run(text, tmp_path / "run", 6, compute, **DROPPING)
    states = [read_json(run / "checkpoints" / f"{step:06d}" / "state.json") for step in (0, 6)]
    scales = [state["loss_scale"] for state in states]
    assert (scales == [1.0, 1.0]) if precision == "bf16" else (scales[0] == 2**30 > scales[1] > 1)
    assert (states[1]["updates"] < 6) == (precision == "fp16")
    assert not logged_lines(run, "warning")
    interrupt_again(run, 9)
    assert resume(run).status == "finished"
    assert comparable_results(run, STEPS) == comparable_results(whole, STEPS)


def test_the_run_records_its_engine(text: Path, tmp_path: Path) -> None:
    run = train(text, tmp_path / "run", with_precision(TORCH, "bf16"), max_steps=1).run_dir
    record = {
        key: read_json(run / "run.json")[key]
        for key in ("engine", "device", "precision", "compiled", "threads")
    }
    assert record == {
        "engine": "torch",
        "device": "cpu",
        "precision": "bf16",
        "compiled": False,
        "threads": 1,
    }
    assert {array.dtype for array in last_state(run, 1).values()} == {np.dtype(np.float32)}


def record_engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Engine, int]]:
    """The engines made from now on, and the threads that runs request; each gets one."""
    engines: list[tuple[Engine, int]] = []
    right = launch.make_engine

    def make(config: RunConfig, vocab_size: int, compute: ComputeConfig, training: bool) -> Engine:
        engine = right(config, vocab_size, dataclasses.replace(compute, threads=1), training)
        engines.append((engine, compute.threads))
        return engine

    monkeypatch.setattr(launch, "make_engine", make)
    monkeypatch.setattr(engine_preparation, "make_engine", make)
    return engines


@pytest.mark.parametrize(
    "compute",
    [
        TORCH,
        with_precision(TORCH, "bf16"),
        with_precision(TORCH, "fp64"),
        NUMPY,
        with_precision(NUMPY, "fp64"),
    ],
)
def test_resume_takes_the_recorded_engine_by_itself(
    compute: ComputeConfig, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also its precision, and for PyTorch the threads, on which the bits of a sum depend."""
    monkeypatch.setenv("GLASSLM_THREADS", "2")
    engines = record_engines(monkeypatch)
    run = interrupt_run(
        text, tmp_path / "run", 3, dataclasses.replace(compute, threads=5), max_steps=4
    )
    messages: list[str] = []
    assert resume(run, messages=messages).status == "finished"
    (first, _), (engine, threads) = engines
    assert (engine.name, engine.device, engine.precision) == (
        compute.engine,
        "cpu",
        first.precision,
    )
    assert threads == (5 if compute.engine == "torch" else 2)
    assert not [line for line in messages if "note" in line]


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_without_pytorch_numpy_continues_and_says_so(
    precision: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same precision if NumPy has it."""
    run = interrupt_run(text, tmp_path / "run", 8, with_precision(TORCH, precision))
    whole = train(text, tmp_path / "whole", with_precision(TORCH, precision)).run_dir
    monkeypatch.setattr(choice, "is_torch_installed", lambda: False)
    engines = record_engines(monkeypatch)
    messages: list[str] = []
    assert resume(run, messages=messages).status == "finished"
    ((engine, _),) = engines
    assert (engine.name, engine.precision) == ("numpy", "fp64" if precision == "fp64" else "fp32")
    assert [
        line
        for line in messages
        if "PyTorch" in line and "not installed" in line and "NumPy" in line
    ]
    if precision != "bf16":
        assert_near(last_state(run), last_state(whole), TOLERANCE[precision])


# -- inference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_by", ENGINES)
def test_the_same_prompt_and_seed_give_the_same_text_from_both(
    trained_by: str, uninterrupted: dict[str, Path]
) -> None:
    """The text is longer than the context, so that it is read anew on the way."""
    by_numpy, by_torch = (
        glasslm.load(uninterrupted[trained_by], engine=engine, device="cpu", precision="fp64")  # type: ignore[arg-type]
        for engine in ENGINES
    )
    assert (by_numpy.engine.name, by_torch.engine.name) == ("numpy", "torch")
    for temperature in (0.0, 1.0):
        expected = by_numpy.generate("the old king ", 60, temperature=temperature)
        assert by_torch.generate("the old king ", 60, temperature=temperature) == expected
        assert len(expected) == 60
    np.testing.assert_allclose(by_torch.logits("a dog"), by_numpy.logits("a dog"), rtol=1e-6)
    np.testing.assert_allclose(
        by_torch.losses("a dog sees my sister."),
        by_numpy.losses("a dog sees my sister."),
        rtol=1e-9,
    )


def test_rows_of_unequal_length_give_the_texts_that_each_gives_alone(
    uninterrupted: dict[str, Path],
) -> None:
    model = glasslm.load(uninterrupted["torch"], engine="torch", device="cpu", precision="fp64")
    prompts = ["the", "a dog sees the old king.\nmy sister likes", ""]
    together: dict[int, str] = dict.fromkeys(range(3), "")
    for piece in model.pieces(prompts, 40):
        together[piece.prompt] += piece.text
    assert list(together.values()) == [
        "".join(piece.text for piece in model.pieces([prompt], 40)) for prompt in prompts
    ]


WITHOUT_TORCH = """
import sys
from glasslm import cli
from glasslm.engines import choice
choice.has_gpu = lambda: False
code = cli.main(sys.argv[1:])
assert "torch" not in sys.modules, "PyTorch was imported"
sys.exit(code)
"""


def without_torch(*words: Any, first: str = "") -> str:
    """The stderr of a command, empty if it succeeds; it fails if it has imported PyTorch."""
    command = [sys.executable, "-c", first + WITHOUT_TORCH, *map(str, words)]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    return process.stderr if process.returncode else ""


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "the", "--max-new-tokens", 5], ["evaluate"]]
)
def test_a_run_of_pytorch_is_used_without_importing_it(
    command: list[Any], uninterrupted: dict[str, Path]
) -> None:
    """The import takes seconds."""
    assert without_torch(command[0], uninterrupted["torch"], *command[1:]) == ""


def test_a_small_model_is_trained_without_importing_pytorch(text: Path, tmp_path: Path) -> None:
    flags = [
        "--text-file",
        text,
        "--max-steps",
        1,
        "--d-model",
        16,
        "--block-size",
        32,
        "--sample-interval",
        0,
    ]
    assert without_torch("train", *flags, "--run-dir", tmp_path / "run") == ""
    assert read_json(tmp_path / "run" / "run.json")["engine"] == "numpy"
    loading = "from glasslm.engines.torch import engine\n"  # the check notices it
    assert "PyTorch was imported" in without_torch("corpus", "list", first=loading)
