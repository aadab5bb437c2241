"""The Python functions: train and load, in the words of the README."""

import ast
import dataclasses
import inspect
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glasslm
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.errors import DivergedError, InputError
from glasslm.runs.run_folder import Run
from glasslm.training import launch
from glasslm.training.loop import Loop
from small_runs import SMALL, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return glasslm.train(
        text_file=text, run_dir=folder, threads=1, **SMALL | {"max_steps": 60, "eval_interval": 20}
    )


def test_train_returns_the_run_with_its_history(run: Run) -> None:
    history = run.history
    assert history.steps == list(range(1, 61))
    assert history.eval_steps == [0, 20, 40, 60]
    assert len(history.train_losses) == len(history.grad_norms) == len(history.lrs) == 60
    assert None not in history.train_losses
    assert history.val_losses[-1] == history.best_val_loss == run.best_val_loss
    assert history.best_val_loss is not None
    assert history.best_val_loss < 1.5
    assert (run.path / "run.json").is_file()
    assert "<svg" in run._repr_html_()  # in a notebook


def test_load_gives_a_model_that_writes_and_scores(run: Run) -> None:
    model = glasslm.load(run.path, threads=1)
    written = model.generate("the ", max_new_tokens=40, temperature=0.8, seed=3)
    assert len(written) == 40
    assert written == model.generate("the ", max_new_tokens=40, temperature=0.8, seed=3)
    assert written != model.generate("the ", max_new_tokens=40, temperature=0.8, seed=4)
    logits = model.logits("the ki")
    assert logits.dtype == np.float32
    assert logits.shape == (model.tokenizer.vocab_size,)
    assert model.tokenizer.decode([int(logits.argmax())]) == "n"
    losses = model.losses("the king sees a dog.")
    assert losses.shape == (19,)
    assert losses.mean() < model.losses("gnik eht sees a .god").mean()
    assert model.config.model.d_model == 32


def test_logits_and_losses_agree(run: Run) -> None:
    """-log softmax of the logits after each beginning is the loss of what comes next."""
    model = glasslm.load(run.path)
    passage = "my sister likes"
    for i, loss in enumerate(model.losses(passage), 1):
        logits = model.logits(passage[:i]).astype(np.float64)
        target = int(model.tokenizer.encode(passage[i])[0])
        assert np.log(np.exp(logits).sum()) - logits[target] == pytest.approx(loss, abs=1e-4)


def test_checkpoints_by_name_and_by_step(run: Run) -> None:
    untrained, best = glasslm.load(run.path, 0), glasslm.load(run.path, "best")
    assert (untrained.step, glasslm.load(run.path, "latest").step) == (0, 60)
    assert untrained.losses("the king").mean() > best.losses("the king").mean() + 1
    for wrong in (7, "newest"):
        with pytest.raises(InputError):
            glasslm.load(run.path, wrong)


def test_what_the_command_line_refuses_is_a_value_error(text: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'max_steps'"):
        glasslm.train(text_file=text, max_step=5)
    with pytest.raises(ValueError, match="capstone-10m"):
        glasslm.train(text_file=text, preset="huge")
    with pytest.raises(ValueError, match="numpy"):
        glasslm.train(text_file=text, engine="jax")
    with pytest.raises(ValueError, match="nothing"):
        glasslm.load("nothing")


def test_train_takes_all_settings_of_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field of ComputeConfig is an argument, as docs/api.md says."""
    settings = {"engine": "torch", "device": "cpu", "precision": "bf16", "threads": 2}
    settings |= {"compile": "off", "parallel": "fsdp", "deterministic": True}
    assert settings.keys() == {field.name for field in dataclasses.fields(ComputeConfig)}

    class Called(Exception):
        pass

    def train(config: RunConfig, compute: ComputeConfig, *_: Any, **record: Any) -> None:
        assert vars(compute) == settings
        assert "compile='off', parallel='fsdp', deterministic=True" in record["command"]
        raise Called

    monkeypatch.setattr(launch, "train", train)
    with pytest.raises(Called):
        glasslm.train(**settings)
    with pytest.raises(InputError, match="compile is 'maybe'"):
        glasslm.train(compile="maybe")


def test_an_unknown_setting_names_those_that_may_be_given() -> None:
    with pytest.raises(InputError, match="known are ") as refusal:
        glasslm.train(zzzzzz=1)
    words = re.findall(r"\w+", str(refusal.value))
    assert {"d_model", "lr", "reward"} <= set(words)
    assert not {"ops_sha256", "document_end_id", "preferences_sha256"} & set(words)


def test_a_diverged_run_raises(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(self: Loop, stop_at: object = None) -> str:
        raise DivergedError("no")

    monkeypatch.setattr(Loop, "run", diverge)
    with pytest.raises(DivergedError, match="run"):
        glasslm.train(text_file=text, run_dir=tmp_path / "run", **SMALL)


def test_it_makes_the_report_too_and_remembers_how_it_was_called(run: Run, text: Path) -> None:
    assert (run.path / "report.html").stat().st_size > 1000
    called = ast.parse(run.record["command"], mode="eval").body
    assert isinstance(called, ast.Call)
    assert ast.unparse(called.func) == "glasslm.train"
    recorded_arguments = {word.arg: ast.literal_eval(word.value) for word in called.keywords}
    expected = SMALL | {
        "text_file": str(text),
        "run_dir": str(run.path),
        "max_steps": 60,
        "eval_interval": 20,
    }
    assert recorded_arguments.items() >= expected.items()
    parameters = inspect.signature(glasslm.train).parameters
    assert recorded_arguments.keys() >= parameters.keys() - {
        "flags",
        "ops",
    }  # no file of operations


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_is_a_keyboard_interrupt(
    number: signal.Signals, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM is what the program makes of it, once all is saved."""
    original = Loop.advance

    def advance(self: Loop) -> Any:
        if self.step == 4:
            signal.raise_signal(number)
        return original(self)

    class Ended(BaseException):
        pass

    def end(*_: Any) -> None:
        raise Ended

    monkeypatch.setattr(Loop, "advance", advance)
    previous_handler = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Ended):
            glasslm.train(text_file=text, run_dir=tmp_path / "run", threads=1, **SMALL)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    assert Run(tmp_path / "run").history.status == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "000005" / "manifest.json").is_file()


def test_training_needs_no_torch(text: Path, tmp_path: Path) -> None:
    """Neither does importing it, and importing the package loads nothing but itself."""
    code = (
        "import sys, glasslm\n"
        "assert not {'numpy', 'torch'} & set(sys.modules), 'import glasslm is not light'\n"
        f"run = glasslm.train(text_file={str(text)!r}, run_dir={str(tmp_path / 'run')!r}, "
        "max_steps=2, d_model=16, "
        "n_layers=1, n_heads=2, block_size=16, batch_size=2)\n"
        "glasslm.load(run.path).generate('the', max_new_tokens=5)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
