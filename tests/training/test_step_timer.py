"""What a run is expected to take.

The time of a whole step from one turn of it, and steps that fit into a time.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.answer_targets import AnswerFormat
from glasslm.data.chat.conversation_rows import Conversations
from glasslm.data.dataset import Dataset, Split
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch, Update
from glasslm.errors import DivergedError, InputError
from glasslm.inference import generation
from glasslm.inference.sampling import Sampling
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.training import step_timer
from glasslm.training.evaluation_windows import (
    count_windows,
    evaluation_windows,
    final_windows,
    second_measurement_windows,
)
from glasslm.training.plan import FEW_STEPS, length_notes
from glasslm.training.preparation import Preparation
from glasslm.training.step_timer import (
    MIN_COMPILED_RUN_S,
    PLANNED_SLOWDOWN,
    StepTimer,
    fix_length,
    report_seconds,
    run_seconds,
    should_compile,
    with_steps,
)


def dataset(train_tokens: int = 10_000, val_tokens: int = 2000) -> Dataset:
    splits = [Split(np.zeros(count, np.uint16), count) for count in (train_tokens, val_tokens)]
    return Dataset(ByteTokenizer(), *splits, None, {}, "0" * 64)


def config(**flags: Any) -> RunConfig:
    return with_flags(RunConfig(), {"block_size": 8, "sample_interval": 0} | flags).resolve()


def prepared(**flags: Any) -> Preparation:
    """The preparation of a run, which begins now."""
    return Preparation(time.perf_counter(), config(**flags).train)


class SlowEngine:
    """Takes a second of a fake clock for the micro-batches that its threads compute at once."""

    name, device = "slow", "cpu"
    updates = 0

    def __init__(self, micro: int, threads: int) -> None:
        self.micro, self.threads, self.now = micro, threads, 0.0
        self.rows_at_once = micro * threads
        self.n_updates = 0

    def turns(self, rows: int) -> int:
        return math.ceil(math.ceil(rows / self.micro) / self.threads)

    def accumulate(self, batch: Batch, weight: float) -> float:
        assert weight == 1 / np.count_nonzero(batch.targets >= 0)
        self.now += self.turns(len(batch.rows))
        return 1.0

    def update(self, lr: float, skip_above: float = math.inf) -> Update:
        self.now += 0.25
        self.n_updates += 1
        return Update(1.0, True, True)

    def losses(self, tokens: Any, targets: Any) -> Any:
        self.now += len(tokens) / 4
        return np.zeros(targets.shape)

    def new_cache(self, rows: int, length: int) -> None:
        pass

    def logits(self, tokens: Any, cache: None, lengths: Any, every: bool) -> Any:
        self.now += len(tokens) / 2
        return np.zeros((*tokens.shape, 256))

    def state(self) -> Iterator[tuple[str, Any]]:
        yield "weight", np.zeros(1000, np.float32)


@given(batch=st.integers(1, 70), micro=st.integers(1, 20), threads=st.integers(1, 9))
def test_a_step_takes_as_many_turns_as_its_micro_batches_need(
    batch: int, micro: int, threads: int
) -> None:
    engine: Any = SlowEngine(min(micro, batch), threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: engine.now)
        measured = step_timer.time_steps(
            config(batch_size=batch, micro_batch_size=micro), engine, dataset(), prepared()
        )
    assert measured.step == engine.turns(batch) + 0.25
    assert measured.window == 0.25
    assert measured.sample == 0
    assert engine.now < 3.75 + 2 * min(
        batch, threads * micro
    )  # no more than one turn was computed at a time


def task_split() -> Split:
    """50 examples of a task, of which a window of 8 tokens holds two."""
    tokens = np.frombuffer(b"1=2\n" * 50, np.uint8)
    return Split(tokens, len(tokens), None, AnswerFormat(ord("="), ord("\n"), 4))


def chat_split() -> Split:
    """40 conversations of 5 tokens that share no row."""
    starts, answers = np.arange(41) * 5, np.ones(200, np.uint8)
    return Split(np.zeros(200, np.uint16), 200, Conversations(starts, answers, -1))


@pytest.mark.parametrize(
    ("make_split", "window", "windows"),
    [
        # The answers of a task are compared too: in the validation text and in as much training
        # text.
        (task_split, 0.25 + 0.5 + 0.5, 25),
        (chat_split, 0.25, 40),
    ],
)
def test_an_evaluation_is_timed_as_the_loop_makes_it(
    make_split: Callable[[], Split], window: float, windows: int
) -> None:
    engine: Any = SlowEngine(2, 2)
    split, run = make_split(), config(batch_size=4, max_steps=20, eval_interval=8)
    data = Dataset(ByteTokenizer(), split, split, None, {}, "0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: engine.now)
        timer = step_timer.time_steps(run, engine, data, prepared(), old_text=split)
    assert (timer.window, timer.val_windows) == (window, windows)
    # That of the base's text has no training text.
    assert (timer.old_window, timer.old_windows) == (min(window, 0.25 + 0.5), windows)
    only_windows = timer._replace(step=0, checkpoint=0, old_windows=0)
    evaluations, measured = 4, evaluation_windows(run, len(split.tokens)) or windows
    assert run_seconds(run, data, only_windows) == evaluations * measured * window


def test_a_run_takes_what_its_parts_take() -> None:
    """20 steps; evaluations at 0, 8, 16 and 20; samples at 0, 10, 20.

    At most 4 best ones and 2 more checkpoints.
    """
    run = config(
        max_steps=20, eval_interval=8, sample_interval=10, checkpoint_interval=10, batch_size=512
    )
    whole = dataset(val_tokens=801)  # 100 windows
    assert evaluation_windows(run, 801) is None
    parts = {"step": 20, "window": 4 * 100, "sample": 3, "checkpoint": 6}
    for part, count in parts.items():
        assert (
            run_seconds(run, whole, StepTimer(**{**dict.fromkeys(parts, 0.0), part: 1.0})) == count
        )
    sampled = dataset(
        val_tokens=80_001
    )  # 10,000 windows, the last and the best weights on all of them
    n_windows = evaluation_windows(run, 80_001)
    assert n_windows is not None
    assert run_seconds(run, sampled, StepTimer(0, 1, 0, 0)) == 4 * n_windows + 20_000
    for exist, are_measured in ((7, 7), (10**6, n_windows)):  # windows of the base's text
        old_text = StepTimer(0, 0, 0, 0, old_window=1, old_windows=exist)
        assert run_seconds(run, sampled, old_text) == 4 * are_measured


@given(
    budget=st.floats(1, 1e4),
    step=st.floats(1e-3, 10),
    window=st.floats(0, 0.1),
    val_tokens=st.integers(100, 10**6),
    spent=st.floats(0, 10),
)
def test_as_many_steps_as_fit_or_a_refusal_that_names_a_time_that_works(
    budget: float, step: float, window: float, val_tokens: int, spent: float
) -> None:
    """A run never takes more than 1.1 times its --max-time, and one step more would not fit."""
    data, costs = dataset(val_tokens=val_tokens), StepTimer(step, window, 0.1, 0.01)
    asked = config(max_time=f"{budget:.6f}", max_steps=1)
    budget_s = float(f"{budget:.6f}")
    if spent + run_seconds(asked, data, costs, 0) > 1.1 * budget_s:
        with pytest.raises(InputError, match="too short for one step") as refused:
            fix_length(asked, data, costs, spent)
        named = re.search(r"Give --max-time (.*?) or more", str(refused.value))
        assert named
        length = fix_length(config(max_time=named[1], max_steps=1), data, costs, spent)
        assert length.config.train.max_steps >= 1
        return
    length = fix_length(asked, data, costs, spent)
    fitted, n_final = length.config, length.final_windows
    assert fitted.train.max_time == asked.train.max_time
    assert length.seconds == run_seconds(fitted, data, costs, n_final)
    assert spent + length.seconds <= 1.1 * budget_s
    measured = second_measurement_windows(fitted, val_tokens, n_final)
    if measured and n_final is not None:
        assert measured < count_windows(fitted, val_tokens)
    steps = fitted.train.max_steps
    more = with_steps(fitted, steps + 1)
    left_s = budget_s - spent - report_seconds(costs, budget_s)
    planned = costs._replace(step=PLANNED_SLOWDOWN * step)
    assert run_seconds(more, data, planned, n_final) > left_s


# Seconds of a step and of a window, windows of the split, and --max-time; then the expected steps
# and windows of the final measurement (None: the whole split).
LENGTHS = [
    # 60 s, 25,000 windows of 2.7 ms: twice the whole split would take 137 s.
    (0.02, 0.0027, 25_000, 60, (1_500, 2_700), 980),
    (0.02, 0.0027, 250, 60, (2_000, 2_700), None),  # a small split stays whole
    (0.02, 0.0027, 25_000, 3600, (50_000, 65_000), None),  # there is time for all of it
    (2.0, 0.2, 25_000, 60, (5, 25), 32),  # slow: the evaluations during training must do
    (2.0, 0.2, 25_000, 20, (1, 3), 32),
]


@pytest.mark.parametrize(("step", "window", "windows", "budget", "steps", "measured"), LENGTHS)
def test_the_final_measurement_takes_at_most_a_tenth_of_a_time_limit(
    step: float,
    window: float,
    windows: int,
    budget: int,
    steps: tuple[int, int],
    measured: int | None,
) -> None:
    asked = config(max_time=f"{budget}s", batch_size=4, eval_interval=1000)
    data = dataset(val_tokens=8 * windows + 1)
    length = fix_length(asked, data, StepTimer(step, window, 0, 0.01), spent_s=0.5)
    assert steps[0] <= length.config.train.max_steps <= steps[1]
    assert 0.5 + length.seconds <= 1.1 * budget
    if measured is None:
        assert length.final_windows is None
        return
    assert length.final_windows is not None
    assert measured <= length.final_windows <= 1.2 * measured
    notes = "\n".join(length_notes(length, 8 * windows + 1))
    assert f"of {windows:,} validation windows" in notes
    assert "glasslm evaluate RUN --split val" in notes
    assert ("allows only" in notes) == (length.config.train.max_steps < FEW_STEPS)


def test_a_time_too_short_for_one_step_is_refused() -> None:
    costs = StepTimer(5.0, 0.1, 0, 0)
    with pytest.raises(InputError, match=r"one step.*\n.*--max-time 16s or more"):
        fix_length(config(max_time="6s", max_steps=1), dataset(), costs, 1.0)


def test_without_a_limit_the_measurement_never_outlasts_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rule does not depend on the clock, and small splits are measured whole."""
    assert final_windows(config(max_steps=1), 20_000, 256) is None  # a measurement of seconds
    monkeypatch.setattr("glasslm.training.evaluation_windows.SHORT_FLOPS", 0.0)
    costs = StepTimer(1.0, 0.1, 0, 0)
    short = config(max_steps=10, batch_size=4)
    for windows, is_whole in ((30, True), (60, True), (61, False), (10_000, False)):
        data = dataset(val_tokens=8 * windows + 1)
        length = fix_length(short, data, costs, 0)
        assert (length.final_windows is None) == is_whole
        assert length == fix_length(short, data, costs, 1000.0)
        assert bool(length_notes(length, 8 * windows + 1)) == (not is_whole)
    assert fix_length(short, data, costs, 0, None).final_windows is None  # as a caller wishes
    assert fix_length(short, data, costs, 0, 77).final_windows == 77


@pytest.mark.parametrize("flags", [{"max_time": "20s"}, {"max_steps": 10}])
def test_preference_tuning_has_no_final_measurement(
    flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation takes all that is held out, however long the text is."""
    monkeypatch.setattr("glasslm.training.evaluation_windows.SHORT_FLOPS", 0.0)
    text, costs = dataset(val_tokens=80_001), StepTimer(1.0, 0.1, 0, 0, held_out=0.5)
    tuned = config(batch_size=4, preferences="pairs.jsonl", **flags)
    length = fix_length(tuned, text, costs, 0)
    assert length.final_windows is None
    assert not [note for note in length_notes(length, 80_001) if "final loss" in note]
    other = fix_length(config(batch_size=4, **flags), text, costs._replace(held_out=None), 0)
    assert other.final_windows is not None


def test_a_long_run_comes_with_the_flag_that_makes_it_fit() -> None:
    costs = StepTimer(20.0, 0.0, 0, 0)
    hours = fix_length(config(max_steps=1000), dataset(), costs, 0)
    assert "5h 33m: --max-time 1h" in "\n".join(length_notes(hours, 2000))
    assert not length_notes(fix_length(config(max_steps=100), dataset(), costs, 0), 2000)


def test_epochs_beat_the_steps_and_steps_stay_without_them() -> None:
    costs = StepTimer(1, 1, 1, 1)
    assert fix_length(config(max_steps=7), dataset(), costs, 0).config.train.max_steps == 7
    asked = config(epochs=2, batch_size=10)
    length = fix_length(asked, dataset(train_tokens=801), costs, 0)
    assert length.config.train.max_steps == 20  # 100 windows


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_either_engine_is_timed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part takes some time, and none, by far, more than was spent.

    The updates are those of three steps.
    """
    monkeypatch.setattr(step_timer, "REPORT_REPETITIONS", 10)  # as it is without shorten_runs
    monkeypatch.setattr(step_timer, "REPORT_FACTOR", 150.0)
    if engine == "torch":
        pytest.importorskip("torch")
    compute = ComputeConfig(engine=engine, device="cpu", precision="fp32", threads=1)
    small = config(
        d_model=32, n_layers=2, n_heads=2, batch_size=8, micro_batch_size=2, sample_interval=5
    )
    engine = make_engine(small, 256, compute, training=True)
    engine.load(initial_weights(parameter_table(small.model, 256), 0))
    data = dataset()
    started_at = time.perf_counter()
    measured = step_timer.time_steps(small, engine, data, prepared())
    assert engine.updates == 3
    parts = measured._replace(val_windows=0)
    assert all(0 < part < 200 * (time.perf_counter() - started_at) for part in parts if part)
    assert 0 < run_seconds(small, data, measured) < math.inf


def test_a_model_that_has_diverged_is_timed_too() -> None:
    wild = config(d_model=32, n_layers=2, n_heads=2, sample_interval=5)
    engine = make_engine(wild, 256, ComputeConfig(engine="numpy", threads=1), training=True)
    first = initial_weights(parameter_table(wild.model, 256), 0)
    engine.load((name, np.full_like(array, np.nan)) for name, array in first)
    with np.errstate(all="ignore"):
        assert step_timer.time_steps(wild, engine, dataset(), prepared()).sample > 0
        with pytest.raises(DivergedError):  # it could not generate
            list(generation.generate(
                engine, ByteTokenizer(), [""], model_config=wild.model, max_new_tokens=1,
                sampling=Sampling(),
            ))  # fmt: skip


def test_timed_steps_change_no_weight_at_any_rate() -> None:
    wild = config(d_model=32, n_layers=2, n_heads=2, sample_interval=5, lr=1e9)
    engine = make_engine(wild, 256, ComputeConfig(engine="numpy", threads=1), training=True)
    first = dict(initial_weights(parameter_table(wild.model, 256), 0))
    engine.load(first.items())
    assert step_timer.time_steps(wild, engine, dataset(), prepared()).sample > 0
    weights = dict(engine.state())
    for name, array in first.items():
        np.testing.assert_array_equal(weights[name], array)


def test_a_time_limit_is_planned_from_as_many_steps_as_fit_into_a_hundredth_of_it() -> None:
    def steps(max_time: str | None, rows: int = 4) -> int:
        engine: Any = SlowEngine(4, threads=1)  # a turn of 4 rows takes 1 s, an update 0.25 s
        timed = config(batch_size=rows, micro_batch_size=4, max_time=max_time)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: engine.now)
            step_timer.time_steps(timed, engine, dataset(), prepared())
        return int(engine.n_updates)

    assert [steps(limit) for limit in (None, "10m", "20m", "5h")] == [3, 6, 11, 50]
    assert steps("20m", rows=32) == 11  # one of 8 turns is computed


@pytest.fixture
def _can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timer, "can_compile", lambda compute: True)


@pytest.mark.usefixtures("_can_compile")
@pytest.mark.parametrize("device", MIN_COMPILED_RUN_S)
def test_compiling_pays_in_long_runs(device: Any) -> None:
    compute = ComputeConfig(engine="torch", device=device, precision="fp32")
    repaid = MIN_COMPILED_RUN_S[device]
    assert not should_compile(compute, repaid)
    assert should_compile(compute, 1.01 * repaid)


@pytest.mark.usefixtures("_can_compile")
def test_compiling_never_pays_where_it_was_decided_or_is_not_ready() -> None:
    for decided in ("on", "off"):
        compute = ComputeConfig(engine="torch", device="cpu", compile=decided)  # type: ignore[arg-type]
        assert not should_compile(compute, math.inf)
    assert not should_compile(ComputeConfig(engine="torch", device="mps"), 1e9)


def test_compiling_needs_pytorch_and_a_compiler_and_a_whole_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not should_compile(ComputeConfig(engine="numpy", device="cpu"), math.inf)
    pytest.importorskip("torch")
    from glasslm.engines.torch import hardware

    compute = ComputeConfig(engine="torch", device="cpu")
    monkeypatch.setattr(hardware, "missing_compiler", lambda device: "")
    assert should_compile(compute, math.inf)
    assert not should_compile(dataclasses.replace(compute, parallel="fsdp"), math.inf)
    monkeypatch.setattr(hardware, "missing_compiler", lambda device: "there is no C++ compiler")
    assert not should_compile(compute, math.inf)
