"""Whole runs: begun by one engine and ended by the other, interrupted and resumed, and read by either."""

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
from glasslm.training import launch
from glasslm.training.launch import Outcome
from small_runs import essence, logged, no_report, quiet, read_json, small, write_text

torch = pytest.importorskip("torch")

from both_engines import TOLERANCE, assert_near  # noqa: E402 - needs PyTorch

from glasslm.engines.torch import engine as torch_engine  # noqa: E402
from small_runs import interrupted_at  # noqa: E402

NUMPY = ComputeConfig(engine="numpy", threads=1)
TORCH = ComputeConfig(engine="torch", device="cpu", precision="fp32", threads=1)
ENGINES = {"numpy": NUMPY, "torch": TORCH}
STEPS = 12
QUICK = {
    "max_steps": STEPS,
    "sample_interval": 0,
}  # a sample of 200 tokens takes longer than these steps


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def train(text: Path, run_dir: Path, compute: ComputeConfig, **flags: Any) -> Outcome:
    with no_report():
        return launch.train(small(text, **QUICK | flags), compute, run_dir, say=quiet)


def resume(
    run_dir: Path, compute: ComputeConfig = ComputeConfig(), said: list[str] | None = None
) -> Outcome:  # noqa: B008
    with no_report():
        return launch.resume(run_dir, compute, say=quiet if said is None else said.append)


def cut(text: Path, run_dir: Path, step: int, compute: ComputeConfig, **flags: Any) -> Path:
    """A run that is interrupted in the middle of a step."""
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(step, patch)
        assert train(text, run_dir, compute, **flags).status == "interrupted"
    return run_dir


def cut_again(run_dir: Path, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(step, patch, signal.SIGTERM)
        assert resume(run_dir).status == "interrupted"


def last_state(run_dir: Path, step: int = STEPS) -> dict[str, Any]:
    folder = run_dir / "checkpoints" / f"{step:06d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def precisely(compute: ComputeConfig, precision: Any) -> ComputeConfig:
    return dataclasses.replace(compute, precision=precision)


# -- from one engine to the other -------------------------------------------------------------------------------------

DROPPING: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each engine, from its first step to its last, in float64."""
    folder = tmp_path_factory.mktemp("runs")
    flags = DROPPING | {"sample_interval": 12}
    return {
        name: train(text, folder / name, precisely(compute, "fp64"), **flags).run_dir
        for name, compute in ENGINES.items()
    }


def test_both_engines_train_the_same_model(uninterrupted: dict[str, Path]) -> None:
    """Weights, moments, losses and what is written in between; what differs is who computed it."""
    one, other = uninterrupted["numpy"], uninterrupted["torch"]
    assert_near(last_state(other), last_state(one), TOLERANCE["fp64"])
    for kind in ("step", "eval", "checkpoint"):
        for line, same in zip(logged(one, kind), logged(other, kind), strict=True):
            del line["timing"], same["timing"]
            numbers = {key: value for key, value in line.items() if isinstance(value, float)}
            assert {key: same[key] for key in numbers} == pytest.approx(numbers, rel=1e-9)
            assert same | numbers == line
    assert logged(one, "sample") == logged(other, "sample")
    assert [len(line["text"]) for line in logged(one, "sample")] == [200, 200]
    assert (run_folder.Run(one).record["engine"], run_folder.Run(other).record["engine"]) == (
        "numpy",
        "torch",
    )


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("muon", "fp64"), ("adamw", "fp64"), ("sgd", "fp32")]
)
@pytest.mark.parametrize("first", ENGINES)
def test_what_one_engine_began_the_other_ends(
    first: str, optimizer: str, precision: Any, text: Path, tmp_path: Path
) -> None:
    """The weights of a run that one engine computed alone. The second takes the precision over from the record."""
    second: Any = "torch" if first == "numpy" else "numpy"
    flags = {"optimizer": optimizer} | DROPPING
    whole = train(text, tmp_path / "whole", precisely(ENGINES[first], precision), **flags).run_dir
    run = cut(text, tmp_path / "run", 4, precisely(ENGINES[first], precision), **flags)
    assert resume(run, ComputeConfig(engine=second, device="cpu", threads=1)).status == "finished"
    assert_near(last_state(run), last_state(whole), TOLERANCE[precision])
    assert [line["step"] for line in logged(run, "step")] == list(range(1, STEPS + 1))


# -- interruption and resume, by PyTorch alone ------------------------------------------------------------------------

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
    """Bit for bit, though it was interrupted twice, and resumed without a word about the engine."""
    whole = train(text, tmp_path / "whole", TORCH, **VARIANTS[variant])
    steps = logged(whole.run_dir, "end")[0]["step"]
    run = cut(text, tmp_path / "cut", 4, TORCH, **VARIANTS[variant])
    cut_again(run, 9)
    last = resume(run)
    assert (last.status, last.sample) == ("finished", whole.sample)
    assert essence(run, steps) == essence(whole.run_dir, steps)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_narrow_run_is_resumed_bit_for_bit(
    precision: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where float16's scale is on its way down from too high a start, and up again."""
    monkeypatch.setattr(torch_engine, "LARGEST_SCALE", 2.0**30)
    monkeypatch.setattr(torch_engine, "GROWTH_INTERVAL", 5)
    compute = precisely(TORCH, precision)
    whole = train(text, tmp_path / "whole", compute, **DROPPING).run_dir
    run = cut(text, tmp_path / "run", 6, compute, **DROPPING)
    states = [read_json(run / "checkpoints" / f"{step:06d}" / "state.json") for step in (0, 6)]
    scales = [state["loss_scale"] for state in states]
    assert (scales == [1.0, 1.0]) if precision == "bf16" else (scales[0] == 2**30 > scales[1] > 1)
    assert (states[1]["updates"] < 6) == (precision == "fp16")
    assert not logged(run, "warning")
    cut_again(run, 9)
    assert resume(run).status == "finished"
    assert essence(run, STEPS) == essence(whole, STEPS)


def test_the_run_says_who_computed_it(text: Path, tmp_path: Path) -> None:
    run = train(text, tmp_path / "run", precisely(TORCH, "bf16"), max_steps=1).run_dir
    said = {
        key: read_json(run / "run.json")[key]
        for key in ("engine", "device", "precision", "compiled", "threads")
    }
    assert said == {
        "engine": "torch",
        "device": "cpu",
        "precision": "bf16",
        "compiled": False,
        "threads": 1,
    }
    assert {array.dtype for array in last_state(run, 1).values()} == {np.dtype(np.float32)}


def engines_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Engine, int]]:
    """The engines that launch.py makes from now on, and the threads that it asks for; they get one each."""
    made: list[tuple[Engine, int]] = []
    right = launch.make_engine

    def make(config: RunConfig, vocab_size: int, compute: ComputeConfig, training: bool) -> Engine:
        engine = right(config, vocab_size, dataclasses.replace(compute, threads=1), training)
        made.append((engine, compute.threads))
        return engine

    monkeypatch.setattr(launch, "make_engine", make)
    return made


@pytest.mark.parametrize(
    "compute",
    [TORCH, precisely(TORCH, "bf16"), precisely(TORCH, "fp64"), NUMPY, precisely(NUMPY, "fp64")],
)
def test_resume_takes_the_recorded_engine_by_itself(
    compute: ComputeConfig, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its precision, and for PyTorch the number of threads, on which the bits of a sum depend."""
    monkeypatch.setenv("GLASSLM_THREADS", "2")
    made = engines_made(monkeypatch)
    run = cut(text, tmp_path / "run", 3, dataclasses.replace(compute, threads=5), max_steps=4)
    said: list[str] = []
    assert resume(run, said=said).status == "finished"
    (first, _), (engine, threads) = made
    assert (engine.name, engine.device, engine.precision) == (
        compute.engine,
        "cpu",
        first.precision,
    )
    assert threads == (5 if compute.engine == "torch" else 2)
    assert not [line for line in said if "note" in line]


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_without_pytorch_numpy_goes_on_and_says_so(
    precision: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same precision, where NumPy has it."""
    run = cut(text, tmp_path / "run", 8, precisely(TORCH, precision))
    whole = train(text, tmp_path / "whole", precisely(TORCH, precision)).run_dir
    monkeypatch.setattr(choice, "torch_installed", lambda: False)
    made = engines_made(monkeypatch)
    said: list[str] = []
    assert resume(run, said=said).status == "finished"
    ((engine, _),) = made
    assert (engine.name, engine.precision) == ("numpy", "fp64" if precision == "fp64" else "fp32")
    assert [
        line for line in said if "PyTorch" in line and "not installed" in line and "NumPy" in line
    ]
    if precision != "bf16":
        assert_near(last_state(run), last_state(whole), TOLERANCE[precision])


# -- what is done with a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ENGINES)
def test_the_same_prompt_and_seed_give_the_same_text_from_both(
    by: str, uninterrupted: dict[str, Path]
) -> None:
    """Longer than the context, so that the text is read afresh on the way; whoever trained the model."""
    one, other = (
        glasslm.load(uninterrupted[by], engine=engine, device="cpu", precision="fp64")  # type: ignore[arg-type]
        for engine in ENGINES
    )
    assert (one.engine.name, other.engine.name) == ("numpy", "torch")
    for temperature in (0.0, 1.0):
        expected = one.generate("the old king ", 60, temperature=temperature)
        assert other.generate("the old king ", 60, temperature=temperature) == expected
        assert len(expected) == 60
    np.testing.assert_allclose(other.logits("a dog"), one.logits("a dog"), rtol=1e-6)
    np.testing.assert_allclose(
        other.losses("a dog sees my sister."), one.losses("a dog sees my sister."), rtol=1e-9
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
choice.gpu_in_sight = lambda: False
code = cli.main(sys.argv[1:])
assert "torch" not in sys.modules, "PyTorch was imported"
sys.exit(code)
"""


def without_torch(*words: Any, first: str = "") -> str:
    """What the program says on stderr, in a process that fails when it has imported PyTorch."""
    command = [sys.executable, "-c", first + WITHOUT_TORCH, *map(str, words)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "the", "--max-new-tokens", 5], ["evaluate"]]
)
def test_a_run_of_pytorch_is_used_without_importing_it(
    command: list[Any], uninterrupted: dict[str, Path]
) -> None:
    """Which takes seconds."""
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
    loading = "from glasslm.engines.torch import engine\n"  # which such a check does notice
    assert "PyTorch was imported" in without_torch("corpus", "list", first=loading)
