"""Values that are not finite, spikes, divergence and text learned by heart.

What becomes of a run, in both engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import cli
from glasslm.config.schema import ComputeConfig
from glasslm.data.batch_sampler import BatchSampler
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch, Losses, Update
from glasslm.errors import DamagedError, DivergedError
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.report import run_report
from glasslm.runs import checkpoint
from glasslm.runs.checkpoint import Best
from glasslm.training import launch
from glasslm.training.guard import (
    MAX_NONFINITE_STEPS,
    MIN_HISTORY,
    WINDOW_STEPS,
    Guard,
    GuardState,
    Limits,
    spike_limit,
)
from glasslm.training.loop import Loop
from glasslm.training.outcome import Outcome
from small_runs import (
    comparable_results,
    ignore_message,
    logged_lines,
    noisy_batches,
    read_json,
    small_config,
    train_command,
    without_report,
    write_text,
)

ENGINES = ["numpy", "torch"]
SPIKING: dict[str, Any] = {
    "max_steps": 100,
    "eval_interval": 25,
    "checkpoint_interval": 25,
    "sample_interval": 0,
    "micro_batch_size": 8,
    "lr": 0.02,
}
BAD_STEP = 80  # more than the guard's least memory, and none at which anything else is due


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def compute(engine: str) -> ComputeConfig:
    if engine == "torch":
        pytest.importorskip("torch")
    return ComputeConfig(engine=engine, threads=1)  # type: ignore[arg-type]


def train(text: Path, run_dir: Path, engine: str, **flags: Any) -> Outcome:
    with without_report():
        return launch.train(
            small_config(text, **flags), compute(engine), run_dir, notify=ignore_message
        )


def resume(run_dir: Path, engine: str) -> Outcome:
    with without_report():
        return launch.resume(run_dir, compute(engine), notify=ignore_message)


# -- values that are not finite --------------------------------------------------------------------


def spoil_gradient(
    self: Loop, original: Callable[[Batch, float], Losses], batch: Batch, weight: float
) -> Losses:
    original(batch, math.nan)
    return Losses(1.0, {})


def spoil_loss(
    self: Loop, original: Callable[[Batch, float], Losses], batch: Batch, weight: float
) -> Losses:
    """As where a logit overflows only in the forward pass.

    The gradient looks fine and is not to be trusted.
    """
    return original(batch, weight)._replace(cross_entropy=math.nan)


def spoil_both(
    self: Loop, original: Callable[[Batch, float], Losses], batch: Batch, weight: float
) -> Losses:
    return original(batch, math.nan)


@contextmanager
def inject_fault(fault: Any, steps: Callable[[int], bool]) -> Iterator[None]:
    """What the engine computes in these steps (from 1) is spoilt."""
    advance = Loop.advance

    def advance_with_fault(self: Loop) -> Any:
        if not steps(self.step + 1):
            return advance(self)
        original = self.engine.accumulate
        self.engine.accumulate = lambda batch, weight: fault(self, original, batch, weight)  # type: ignore[method-assign]
        try:
            return advance(self)
        finally:
            del self.engine.accumulate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "advance", advance_with_fault)
        yield


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", [spoil_gradient, spoil_loss, spoil_both])
def test_a_step_that_is_not_finite_never_reaches_the_weights(
    fault: Any, engine: str, text: Path, tmp_path: Path
) -> None:
    """It is skipped, counted and told, and healthy steps follow."""
    with inject_fault(fault, lambda step: step == 7):
        run = train(
            text, tmp_path / "run", engine, checkpoint_interval=1, max_steps=12, sample_interval=0
        ).run_dir
    before, after, later = (dict(checkpoint.load(run, step).state()) for step in (6, 7, 8))
    assert all(array.tobytes() == after[name].tobytes() for name, array in before.items())
    assert any(array.tobytes() != after[name].tobytes() for name, array in later.items())
    assert [checkpoint.load(run, step).position.updates for step in (6, 7, 8, 12)] == [6, 6, 7, 11]
    (warning,) = logged_lines(run, "warning")
    assert (warning["code"], warning["step"]) == ("nonfinite", 7)
    assert next(line for line in logged_lines(run, "step") if line["step"] == 7)["skipped"]
    assert logged_lines(run, "end")[0]["status"] == "finished"


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", [spoil_gradient, spoil_loss])
def test_several_in_a_row_end_the_run_with_a_report(
    fault: Any, engine: str, text: Path, tmp_path: Path
) -> None:
    config = small_config(text, max_steps=20, sample_interval=0)
    with inject_fault(fault, lambda step: step > 7):
        ended = launch.train(config, compute(engine), tmp_path / "run", notify=ignore_message)
    assert ended.status == "diverged"
    assert logged_lines(ended.run_dir, "end")[0]["step"] == 7 + MAX_NONFINITE_STEPS
    assert [line["code"] for line in logged_lines(ended.run_dir, "warning")] == [
        "nonfinite",
        "diverged",
    ]
    # The report reads files only: one engine and one fault are enough.
    if (engine, fault) == ("numpy", spoil_loss):
        report = run_report.write_after_training(ended, ignore_message)
        assert report is not None
        assert "diverged" in report.read_text(encoding="utf-8")
    assert (
        resume(ended.run_dir, engine).status == "finished"
    )  # the fault is mended, and the run may go on


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_that_are_none_are_named(
    engine: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that is altered under a run's hands."""
    original = BatchSampler.batch

    def altered_batch(self: BatchSampler, tokens: Any, step: int, rows: Any) -> Any:
        inputs, targets = original(self, tokens, step, rows)
        if step == 4:
            targets[2, 3] = 60_000
        return inputs, targets

    monkeypatch.setattr(BatchSampler, "batch", altered_batch)
    with pytest.raises(DamagedError, match=r"step 5 holds token 60000"):
        train(text, tmp_path / "run", engine, sample_interval=0)
    assert logged_lines(tmp_path / "run", "end")[0]["status"] == "failed"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ("blocks.1.attention.q.weight", r"first .* in blocks\.1\.attention(\.weights)?$"),
        ("blocks.0.feedforward.down.weight", r"first .* in blocks\.0\.feedforward$"),
        ("norm.weight", "first .* in norm$"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide")
def test_the_first_bad_layer_is_named(weight: str, says: str, engine: str, text: Path) -> None:
    import re

    config = small_config(text).resolve()
    machine = make_engine(config, 30, compute(engine), training=True)
    weights = dict(initial_weights(parameter_table(config.model, 30), seed=1))
    weights[weight] = np.full_like(weights[weight], np.inf)
    machine.load(weights.items())
    tokens = np.arange(8 * 32).reshape(8, 32) % 30
    batch = Batch(tokens, tokens, 4, np.arange(8))
    message = Guard(config, 30).nonfinite_warning(machine, batch)
    assert re.search(says, message), message
    assert "step 5" in message
    machine.load(initial_weights(parameter_table(config.model, 30), seed=1))
    assert "everything is finite" in Guard(config, 30).nonfinite_warning(machine, batch)


def test_a_gradient_that_alone_is_not_finite_is_named(text: Path) -> None:
    config = small_config(text).resolve()

    class Backwards:
        micro_batch_size = 4

        def inspect(self, batch: Batch, names: list[str]) -> dict[str, Any]:
            assert len(batch.tokens) <= 4
            bad = "gradient/blocks.0.feedforward.up.weight", "gradient/embedding.weight"
            return {name: np.array([math.nan if name in bad else 1.0]) for name in names}

    tokens = np.zeros((8, 4), np.int64)
    message = Guard(config, 30).nonfinite_warning(
        Backwards(), Batch(tokens, tokens, 0, np.arange(8))
    )  # type: ignore[arg-type]
    assert (
        "the first non-finite value is in the gradient of blocks.0.feedforward.up.weight" in message
    )


# -- spikes ----------------------------------------------------------------------------------------


def test_the_rule_is_six_deviations_above_the_last_128_finite_values() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3, 0.1, 400)
    judge = Guard(small_config(Path("text")), 30)
    for number, value in enumerate(values):
        window = values[max(0, number - WINDOW_STEPS) : number]
        expected = math.inf if number < MIN_HISTORY else window.mean() + 6 * window.std(ddof=1)
        assert judge.limits.loss == pytest.approx(expected, rel=1e-12)
        judge.judge_step(number, float(value), Update(1.0, True, True), judge.limits)
        judge.judge_step(
            number, math.nan, Update(math.inf, True, True), judge.limits
        )  # stays out of the window
    assert spike_limit([2.0] * 100) == pytest.approx(
        2.012
    )  # what stands still does not spike by rounding
    again = Guard(
        small_config(Path("text")),
        30,
        GuardState.from_json(json.loads(json.dumps(dataclasses.asdict(judge.state)))),
    )
    assert again.limits == judge.limits
    assert again.judge_step(1, 3.9, Update(1.0, True, True), again.limits) == "spike"
    assert again.judge_step(1, 3.3, Update(1.0, True, True), again.limits) == "fine"
    assert again.judge_step(1, 3.3, Update(1.1, True, True), Limits(9, 1.05)) == "spike"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("action", ["log", "skip", "rollback"])
def test_a_spike_is_told_with_its_batch_and_answered(
    action: str, engine: str, text: Path, tmp_path: Path
) -> None:
    flags = SPIKING | {"on_spike": action, "eval_interval": 4, "checkpoint_interval": 25}
    with noisy_batches(BAD_STEP), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_is_best", lambda self: False)  # checkpoints at their interval alone
        states: dict[int, dict[str, bytes]] = {}
        original = Loop.do_step

        def counted_step(self: Loop) -> None:
            original(self)
            if self.step in (75, 79, 80):
                states[self.step] = {name: array.tobytes() for name, array in self.engine.state()}

        patch.setattr(Loop, "do_step", counted_step)
        run = train(text, tmp_path / "run", engine, **flags).run_dir
    (warning,) = logged_lines(run, "warning")
    assert (warning["code"], warning["step"]) == ("spike", BAD_STEP)
    assert f"--replay {BAD_STEP}" in warning["message"]
    (path,) = (run / "spikes").iterdir()
    record = read_json(path)
    assert (path.name, record["step"], record["action"]) == ("000080.json", BAD_STEP, action)
    assert record["loss"] > record["limits"]["loss"]
    assert record["tokens"] == np.random.default_rng(BAD_STEP - 1).integers(0, 18, (8, 32)).tolist()
    assert [len(row) for row in record["texts"]] == [32] * 8
    same_as = {"log": None, "skip": 79, "rollback": 75}[action]
    for step in (75, 79):
        assert (states[80] == states[step]) == (step == same_as), (action, step)
    skipped = [line["step"] for line in logged_lines(run, "step") if line.get("skipped")]
    assert skipped == ([] if action == "log" else [BAD_STEP])
    assert logged_lines(run, "end")[0]["status"] == "finished"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_rolls_back_is_resumed_to_the_bit(
    engine: str, text: Path, tmp_path: Path
) -> None:
    """Also after interruptions: a roll-back never uses the checkpoint of an interruption."""
    flags = SPIKING | {"on_spike": "rollback", "eval_interval": 100}
    with noisy_batches(BAD_STEP, 93):
        whole = train(text, tmp_path / "whole", engine, **flags).run_dir
        assert [line["step"] for line in logged_lines(whole, "warning")] == [BAD_STEP, 93]
        for step in (77, 79, 84):
            advance = Loop.advance

            def advance_with_signal(self: Loop, at: int = step, original: Any = advance) -> Any:
                if self.step + 1 == at:
                    signal.raise_signal(signal.SIGTERM)
                return original(self)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Loop, "advance", advance_with_signal)
                cut = tmp_path / "cut"
                ended = (
                    resume(cut, engine)
                    if cut.exists()
                    else train(text, cut, engine, **flags | {"keep": 1})
                )
                assert ended.status == "interrupted"
        assert resume(cut, engine).status == "finished"
        killed = tmp_path / "killed"  # before the checkpoint of step 100
        shutil.copytree(whole, killed)
        shutil.rmtree(killed / "checkpoints" / "000100")
        assert resume(killed, engine).status == "finished"
    assert comparable_results(killed, 100) == comparable_results(whole, 100)
    assert comparable_results(cut, 100) == comparable_results(whole, 100)


@pytest.mark.parametrize(
    ("engine", "seed"), [("numpy", 0), ("numpy", 1), ("numpy", 2), ("torch", 0)]
)
def test_a_healthy_run_is_left_alone(engine: str, seed: int, text: Path, tmp_path: Path) -> None:
    run = train(
        text,
        tmp_path / "run",
        engine,
        **SPIKING | {"seed": seed, "max_steps": 200},
    ).run_dir
    assert logged_lines(run, "warning") == []
    assert not (run / "spikes").exists()


# -- divergence and learning by heart --------------------------------------------------------------


DIVERGING: dict[str, Any] = {
    "lr": 1,
    "max_steps": 300,
    "warmup_steps": 0,
    "eval_interval": 50,
    "sample_interval": 0,
}


@pytest.mark.usefixtures("no_figures")
def test_a_rate_a_hundred_times_too_high_is_called_divergence(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status, the exit code and the report, from the command itself."""
    assert cli.main(train_command(text, tmp_path / "run", **DIVERGING, engine="numpy")) == 3
    assert "lower --lr" in capsys.readouterr().err
    assert logged_lines(tmp_path / "run", "end")[0]["status"] == "diverged"
    assert logged_lines(tmp_path / "run", "warning")[-1]["code"] == "diverged"
    assert "diverged" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_such_a_rate_is_called_divergence_with_pytorch_too(text: Path, tmp_path: Path) -> None:
    ended = train(text, tmp_path / "run", "torch", **DIVERGING)
    assert (ended.status, ended.exit_code) == ("diverged", 3)
    assert logged_lines(tmp_path / "run", "warning")[-1]["code"] == "diverged"


def test_hope_ends_a_nat_above_guessing_and_above_the_start() -> None:
    config = small_config(Path("text"))
    fine = Update(1.0, True, True)
    for first, most in ((2.0, math.log(30) + 1), (5.0, 6.0), (math.nan, math.log(30) + 1)):
        judge = Guard(config, 30)
        judge.record_evaluation(0, first, None, 1, is_last=False)
        for step in range(MIN_HISTORY):
            judge.judge_step(step, most - 0.01, fine, judge.limits)
        for step in range(MIN_HISTORY // 2 - 1):
            judge.judge_step(step, most + 0.01, fine, judge.limits)
        with pytest.raises(DivergedError, match="lower --lr"):
            judge.judge_step(0, most + 0.5, fine, judge.limits)
        with pytest.raises(DivergedError, match="validation loss"):
            Guard(config, 30, judge.state).record_evaluation(
                9, most + 0.01, Best(0, 2.0), 1, is_last=True
            )
        Guard(config, 30, judge.state).record_evaluation(
            9, most + 0.01, Best(0, 2.0), 1, is_last=False
        )


def test_a_text_learned_by_heart_is_no_divergence() -> None:
    """The last training losses are below the start: the validation loss may be any."""
    fine = Update(1.0, True, True)
    for last_loss, is_fine in ((0.1, True), (5.5, False)):
        judge = Guard(small_config(Path("text")), 30)
        judge.record_evaluation(0, 5.0, None, 1, is_last=False)
        for step in range(MIN_HISTORY):
            judge.judge_step(step, 0.1, fine, judge.limits)
        judge.judge_step(MIN_HISTORY, last_loss, fine, judge.limits)
        with contextlib.nullcontext() if is_fine else pytest.raises(DivergedError):
            judge.record_evaluation(MIN_HISTORY, 7.0, Best(0, 5.0), 1, is_last=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_learning_by_heart_is_told_once_with_numbers(engine: str, tmp_path: Path) -> None:
    """A few lines of noise can only be learned by heart."""
    letters = np.random.default_rng(0).choice(list("abcdefghij \n"), 1500)
    text = tmp_path / "noise.txt"
    text.write_text("".join(letters), encoding="utf-8")
    flags = {
        "max_steps": 300,
        "eval_interval": 20,
        "checkpoint_interval": 300,
        "sample_interval": 0,
        "micro_batch_size": 8,
    }
    run = train(text, tmp_path / "run", engine, **flags).run_dir
    (warning,) = logged_lines(run, "warning")
    assert warning["code"] == "overfit"
    evaluations = [line for line in logged_lines(run, "eval") if line["step"] <= warning["step"]]
    best = min(evaluations, key=lambda line: line["loss"])
    assert f"of step {best['step']}" in warning["message"]
    assert f"{evaluations[-1]['loss']:.4f}" in warning["message"]
    assert "--patience" in warning["message"]


@pytest.mark.usefixtures("no_figures")
def test_the_report_shows_what_was_warned_of(text: Path, tmp_path: Path) -> None:
    with noisy_batches(BAD_STEP):
        run = train(text, tmp_path / "run", "numpy", **SPIKING).run_dir
    run_report.write(run)
    assert f"--replay {BAD_STEP}" in (run / "report.html").read_text(encoding="utf-8")
