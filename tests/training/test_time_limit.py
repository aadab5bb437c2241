"""--max-time holds while the machine gets slower: the end of a run shrinks, then its steps end.

A fake clock advances with the work of the engine, so no assertion depends on the machine.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from glasslm.engines import factory
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.errors import InputError
from glasslm.lab.verification import reproduction
from glasslm.report import run_report
from glasslm.runs.metrics import timing_of
from glasslm.runs.run_folder import Run
from glasslm.training import engine_preparation, launch, step_timer
from glasslm.training.evaluation_windows import count_windows
from glasslm.training.loop import Loop
from glasslm.training.outcome import Outcome
from small_runs import (
    COMPUTE,
    ignore_message,
    logged_lines,
    read_json,
    small_config,
    without_report,
    write_text,
)

STEP_S, WINDOW_S, REPORT_S = 1.0, 0.01, 3.0  # on the machine as it is when the plan is made
BUDGET_S, BATCH_SIZE = 60.0, 8


class SlowingClock:
    """Seconds that pass only while an engine works, times the speed of the moment."""

    def __init__(self) -> None:
        self.now, self.steps, self.windows, self.trained = 0.0, 0, 0, False
        self.slow_after, self.factor, self.slow_final = 0, 1.0, 1.0

    @property
    def speed(self) -> float:
        """Multiples of the first times; slow after some steps, or after all of them."""
        if self.trained:
            return self.slow_final
        return self.factor if self.steps > self.slow_after else 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SlowingClock:
    clock = SlowingClock()
    accumulate, losses, advance = NumpyEngine.accumulate, NumpyEngine.losses, Loop.advance
    measure_again = Loop._measure_again

    def slow_accumulate(self: NumpyEngine, batch: Batch, weight: float) -> Any:
        clock.now += STEP_S * len(batch.rows) / BATCH_SIZE * clock.speed
        return accumulate(self, batch, weight)

    def slow_losses(self: NumpyEngine, tokens: Any, targets: Any) -> Any:
        clock.now += WINDOW_S * len(tokens) * clock.speed
        return losses(self, tokens, targets)

    def slow_python() -> None:
        clock.now += REPORT_S / step_timer.REPORT_FACTOR

    def counted_advance(self: Loop) -> Any:
        clock.steps += 1
        return advance(self)

    def final_measurement(self: Loop, n_windows: int) -> None:
        clock.trained = True
        measure_again(self, n_windows)

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(NumpyEngine, "accumulate", slow_accumulate)
    monkeypatch.setattr(NumpyEngine, "losses", slow_losses)
    monkeypatch.setattr(step_timer, "_sort_numbers", slow_python)
    monkeypatch.setattr(Loop, "advance", counted_advance)
    monkeypatch.setattr(Loop, "_measure_again", final_measurement)
    return clock


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def train_limited(text: Path, run_dir: Path) -> Outcome:
    """A run whose split of 400 windows, measured twice, takes more than a tenth of its time."""
    config = small_config(
        text, block_size=4, val_fraction=0.5, eval_interval=20, sample_interval=0,
        batch_size=BATCH_SIZE, max_time=f"{BUDGET_S:g}s",
    )  # fmt: skip
    with without_report():
        return launch.train(config, COMPUTE, run_dir, notify=ignore_message)


@pytest.mark.parametrize(
    ("slow_after", "factor", "slow_final", "status"),
    [
        (0, 1.0, 1.0, "finished"),
        (20, 1.25, 1.25, "finished"),  # the final measurement is shortened
        (20, 2.0, 2.0, "time"),
        (5, 5.0, 5.0, "time"),
        (0, 1.0, 5.0, "finished"),  # the final measurement itself becomes slow: it is left out
    ],
)
def test_a_run_on_a_machine_that_gets_slower_ends_in_time(
    slow_after: int, factor: float, slow_final: float, status: str,
    text: Path, tmp_path: Path, clock: SlowingClock,
) -> None:  # fmt: skip
    clock.slow_after, clock.factor, clock.slow_final = slow_after, factor, slow_final
    outcome = train_limited(text, tmp_path / "run")
    run = Run(outcome.run_dir)
    report_s = REPORT_S * max(factor, 1.0)
    assert clock.now + report_s <= 1.1 * BUDGET_S
    assert (run.history.status, outcome.exit_code) == (status, 0)
    max_steps = run.config.train.max_steps
    assert (run.length == max_steps) == (status == "finished")
    assert outcome.samples_s <= 1.1 * BUDGET_S - clock.now
    evals = logged_lines(run.path, "eval")
    assert not any(line["whole"] for line in evals)
    assert all(line["stderr"] > 0 for line in evals)
    assert evals[-1]["step"] == run.length or evals[-1]["best"]
    planned = read_json(run.path / "run.json")["final_windows"]
    assert planned < count_windows(run.config, run.record["data"]["val_tokens"])
    assert (evals[-1]["tokens"] == 4 * planned) == (factor == slow_final == 1.0)
    warnings = [line["message"] for line in logged_lines(run.path, "warning")]
    assert any("ends training after step" in message for message in warnings) == (status == "time")
    if evals[-1]["tokens"] == evals[0]["tokens"]:
        assert any("leaves no time to measure" in message for message in warnings)


@pytest.mark.parametrize(
    ("text_s", "engine_s", "first_s", "step_s", "refused_at", "longest"),
    [
        (70, 0, 0, 1, 70, "reading the text 1m 10s"),
        (10, 60, 0, 1, 70, "starting the numpy engine 1m 00s"),
        (0, 40, 30, 1, 71, "starting the numpy engine 40s"),  # and 31 s for the first step
        (0, 45, 0, 16, 61, "starting the numpy engine 45s"),  # a second step, timed in halves
        (0, 40, 0, 12, 58, "starting the numpy engine 40s"),  # the third step
    ],
)
def test_a_limit_that_is_too_short_is_refused_as_soon_as_it_shows(
    text_s: float, engine_s: float, first_s: float, step_s: float, refused_at: float, longest: str,
    text: Path, tmp_path: Path, clock: SlowingClock, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No stage follows the one that leaves no time; the message says what took it."""
    make_engine, open_run_inputs = factory.make_engine, launch.open_run_inputs
    accumulate = NumpyEngine.accumulate

    def slow_inputs(*args: Any) -> Any:
        clock.now += text_s
        return open_run_inputs(*args)

    def slow_start(*args: Any, **kwargs: Any) -> Any:
        clock.now += engine_s
        return make_engine(*args, **kwargs)

    def slow_first(self: NumpyEngine, batch: Batch, weight: float) -> Any:
        nonlocal first_s
        clock.now, first_s = clock.now + first_s, 0.0
        return accumulate(self, batch, weight)

    monkeypatch.setattr(launch, "open_run_inputs", slow_inputs)
    monkeypatch.setattr(engine_preparation, "make_engine", slow_start)
    monkeypatch.setattr(NumpyEngine, "accumulate", slow_first)
    clock.factor = step_s
    clock.slow_after = -1
    with pytest.raises(InputError, match="--max-time 60s is too short") as refusal:
        train_limited(text, tmp_path / "run")
    assert clock.now == pytest.approx(refused_at, abs=0.5)
    assert f"({longest}" in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("factor", [1.0, 1.2, 2.0])
def test_it_is_repeated_exactly_and_never_goes_on(
    factor: float, text: Path, tmp_path: Path, clock: SlowingClock
) -> None:
    """The repetition has no limit; it ends at the step, and measures the windows, of the run."""
    clock.slow_after, clock.factor = 20, factor
    run = train_limited(text, tmp_path / "run").run_dir
    clock.factor = clock.slow_final = 100.0
    with pytest.raises(InputError, match="nothing left to do"):
        launch.resume(run, COMPUTE, notify=ignore_message)
    with without_report():
        repetition = reproduction.reproduce(Run(run), tmp_path / "again", None, "", ignore_message)
    assert repetition.is_identical
    assert repetition.steps == Run(run).length


def test_steps_that_are_slow_once_end_nothing(
    text: Path, tmp_path: Path, clock: SlowingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of twice their time, as after another program's start, are not a slow machine."""
    advance = Loop.advance

    def hiccup(self: Loop) -> Any:
        clock.now += STEP_S if 10 <= clock.steps < 13 else 0.0
        return advance(self)

    monkeypatch.setattr(Loop, "advance", hiccup)
    outcome = train_limited(text, tmp_path / "run")
    assert outcome.status == "finished"
    assert clock.now + REPORT_S <= 1.1 * BUDGET_S
    assert timing_of(logged_lines(outcome.run_dir, "step")[-1])["elapsed_s"] > 0  # type: ignore[arg-type]


def test_a_report_that_has_no_time_is_shorter_and_says_so(
    text: Path, tmp_path: Path, clock: SlowingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = train_limited(text, tmp_path / "run")
    shares: list[float] = []
    monkeypatch.setattr(
        run_report, "write", lambda run_dir, time_share: shares.append(time_share) or run_dir
    )
    messages: list[str] = []
    for samples_s in (float("inf"), -1.0):
        outcome = Outcome(**vars(outcome) | {"samples_s": samples_s})
        run_report.write_after_training(outcome, messages.append)
    assert shares == [1.0, 0.0]
    assert messages[0] == "writing the report"
    assert f"`glasslm report {outcome.run_dir}` makes all of it" in messages[1]
