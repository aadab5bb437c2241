"""The expected duration of a run: its parts are timed on the first batch and multiplied.

The plan shows it before the first step, and --max-time becomes a number of steps.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration
from glasslm.data.batch_sampler import make_sampler
from glasslm.data.dataset import Dataset, Split
from glasslm.data.token_file import Tokens
from glasslm.engines.choice import can_compile
from glasslm.engines.protocol import Engine
from glasslm.errors import DivergedError, InputError
from glasslm.inference import generation
from glasslm.inference.evaluation import Windows, split_windows
from glasslm.inference.exact_answers import score_windows
from glasslm.inference.sampling import Sampling
from glasslm.training.evaluation_windows import (
    FINAL_PASSES,
    FINAL_SHARE,
    count_windows,
    evaluation_windows,
    final_windows,
    max_evaluation_windows,
    second_measurement_windows,
)
from glasslm.training.long_call import EngineCalls
from glasslm.training.preference.objective import Objective
from glasslm.training.preference.opening import make_objective
from glasslm.training.preparation import TOLERANCE, Preparation, explain_refusal
from glasslm.training.sample_line import SAMPLE_TOKENS
from glasslm.training.training_batch import count_targets, training_batch

TIMED_SAMPLE_TOKENS = 20  # tokens of the sample that is timed
# Steps are timed three times, and with --max-time for this share of it: three of them differed by a
# quarter from one start to the next (docs/log.md).
TIMING_SHARE, MAX_TIMED_STEPS = 0.01, 50
# A plan for --max-time takes a step for so many times as long as measured: a run that the limit cut
# at four fifths of its steps lost 0.012 nats, and one that ended a tenth early 0.003 (docs/log.md).
PLANNED_SLOWDOWN = 1.1
DISK_BYTES_PER_S = 100e6  # a slow disk
CHECKPOINT_S = 0.05  # fixed cost of a checkpoint
REPORT_S = 3.0  # to write the report of a run, on an idle machine
# A report takes 100 times as long as this many repetitions of _sort_numbers (docs/log.md). The
# factor has a margin: a machine that is busy is not equally busy at each moment.
REPORT_REPETITIONS, REPORT_FACTOR = 10, 150.0
REPORT_SHARE = 0.3  # of --max-time, at most
# Compiling takes 10 to 30 s on a CPU at any depth. It saves about an eighth of each step there and
# a third or more on a GPU (docs/log.md). Shorter runs, in seconds, do not gain by it. From NumPy to
# compiled PyTorch in bfloat16 a step gains a third, and there the steps that fit are compared.
MIN_COMPILED_RUN_S = {"cpu": 240.0, "cuda": 180.0}


class StepTimer(NamedTuple):
    """Seconds of the parts of a run, and how many windows there are to evaluate."""

    step: float
    window: float  # one validation window
    sample: float
    checkpoint: float
    report: float = REPORT_S
    held_out: float | None = None  # one evaluation of preference tuning; None: of windows
    old_window: float = 0.0  # one window of the base's text
    old_windows: int = 0  # of the base's whole validation split
    val_windows: int | None = None  # of the whole validation split; None: those of a text


def time_steps(
    config: RunConfig,
    engine: Engine,
    dataset: Dataset,
    preparation: Preparation,
    old_text: Split | None = None,
) -> StepTimer:
    """Time a step, an evaluation and a sample. Changes the moments, and no weight: the rate is 0.

    `old_text`: the validation split of the base run, which evaluations measure too.

    An engine computes `rows_at_once` rows side by side; a larger batch takes several such turns, of
    which one is timed. Raises InputError as soon as the times so far show that --max-time is too
    short for one step.
    """
    turns = math.ceil(config.train.batch_size / engine.rows_at_once)
    rows = min(config.train.batch_size, engine.rows_at_once)
    sampler = make_sampler(config, dataset)
    batch = training_batch(sampler, dataset.train.tokens, step=0, rows=rows)
    accumulate = partial(engine.accumulate, batch, 1 / count_targets(batch))
    engine_calls = EngineCalls(engine, config, dataset.tokenizer.vocab_size)

    def sample() -> None:
        pieces = generation.generate(
            engine,
            dataset.tokenizer,
            [""],
            model_config=config.model,
            max_new_tokens=TIMED_SAMPLE_TOKENS,
            sampling=Sampling(),
        )
        with contextlib.suppress(DivergedError):  # the loop reports the divergence of the run
            for _ in pieces:
                pass

    objective = None
    if config.preference.is_active:  # the first weights are the current ones here
        objective = make_objective(config, engine, lambda: engine, dataset)

    def step() -> float:
        if objective:
            return time_call(lambda: _tune(engine, objective, config))
        turn = time_call(lambda: engine_calls.run(accumulate, config.tokens_per_step))
        return turns * turn + time_call(lambda: engine.update(0.0))

    def require_time(known: StepTimer) -> None:
        shortest_s = run_seconds(with_steps(config, 1), dataset, known, n_final=0)
        preparation.end_stage("measuring the speed", shortest_s)

    first = step()  # also allocates memory and loads libraries: the next ones may be much shorter
    ends_at = time.perf_counter() + _timing_seconds(config)
    size = sum(array.nbytes for _, array in engine.state())
    timer = StepTimer(0.0, 0.0, 0.0, checkpoint=size / DISK_BYTES_PER_S + CHECKPOINT_S)
    require_time(timer)
    second = step()
    require_time(timer._replace(step=min(first, second)))
    steps_s = [first, second, step()]
    while time.perf_counter() < ends_at and len(steps_s) < MAX_TIMED_STEPS:
        steps_s.append(step())
    timer = timer._replace(step=statistics.median(steps_s))
    require_time(timer)
    require_time(timer := _time_evaluation(timer, config, engine, dataset, old_text))
    if objective:
        timer = timer._replace(held_out=time_call(lambda: objective.evaluate(lambda: None)))
    if config.train.sample_interval:
        timer = timer._replace(sample=time_call(sample) * SAMPLE_TOKENS / TIMED_SAMPLE_TOKENS)
    return timer._replace(report=REPORT_FACTOR * time_call(_sort_numbers))


def _timing_seconds(config: RunConfig) -> float:
    """How long steps are timed; 0 without --max-time."""
    max_time = config.train.max_time
    return TIMING_SHARE * parse_duration(max_time) if max_time else 0.0


def _time_evaluation(
    timer: StepTimer, config: RunConfig, engine: Engine, dataset: Dataset, old_text: Split | None
) -> StepTimer:
    """`timer` with the windows of the validation splits, and the seconds of one of each."""
    byte_lengths = dataset.tokenizer.scored_bytes

    def time_windows(windows: Windows, train_tokens: Tokens | None) -> float:
        rows = min(config.train.batch_size, engine.rows_at_once, len(windows))
        score = partial(
            score_windows, engine, windows, byte_lengths, train_tokens=train_tokens, rows=rows,
            max_windows=rows,
        )  # fmt: skip
        return min(time_call(score) for _ in range(2)) / rows

    windows = split_windows(dataset.val, config.model)
    window_s = time_windows(windows, dataset.train.tokens)
    timer = timer._replace(window=window_s, val_windows=len(windows))
    if old_text is None:
        return timer
    windows = split_windows(old_text, config.model)
    return timer._replace(old_window=time_windows(windows, None), old_windows=len(windows))


def _tune(engine: Engine, objective: Objective, config: RunConfig) -> None:
    """One step of preference tuning."""
    batch = objective.prepare_step(0, lambda: None).batch
    engine.accumulate(batch, 1 / batch.targets.size)
    engine.update(0.0)


def _sort_numbers() -> None:
    """Work of one thread in Python, as that of a report: it gets slower with it."""
    for _ in range(REPORT_REPETITIONS):
        sorted(str(number) for number in range(20_000))


def should_compile(compute: ComputeConfig, expected_s: float) -> bool:
    """Whether to compile a run that takes `expected_s` seconds uncompiled.

    `compute` has its engine and device chosen.
    """
    min_run_s = MIN_COMPILED_RUN_S.get(compute.device, math.inf)
    return compute.compile == "auto" and expected_s > min_run_s and can_compile(compute)


def time_call(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_seconds(
    config: RunConfig, dataset: Dataset, timer: StepTimer, n_final: int | None = None
) -> float:
    """The expected seconds of the loop: steps, evaluations, samples and checkpoints.

    Each evaluation is counted with a checkpoint, which a new best loss writes. `n_final`: windows
    of the final measurement; None for the whole split.
    """
    train, val_tokens = config.train, len(dataset.val.tokens)
    steps = train.max_steps
    evaluations = 1 + math.ceil(steps / train.eval_interval)
    sampled_windows = evaluation_windows(config, val_tokens)
    windows, held_out_s = 0, 0.0
    if timer.held_out is None:
        all_windows = timer.val_windows or count_windows(config, val_tokens)
        windows = evaluations * (sampled_windows or all_windows)
        windows += FINAL_PASSES * (second_measurement_windows(config, val_tokens, n_final) or 0)
    else:
        held_out_s = evaluations * timer.held_out
    old_windows = evaluations * min(timer.old_windows, max_evaluation_windows(config))
    samples = 1 + math.ceil(steps / train.sample_interval) if train.sample_interval else 0
    checkpoints = evaluations + steps // train.checkpoint_interval
    return (
        steps * timer.step
        + windows * timer.window
        + old_windows * timer.old_window
        + held_out_s
        + samples * timer.sample
        + checkpoints * timer.checkpoint
    )


class RunLength(NamedTuple):
    """A config with its number of steps fixed, and how its final measurement is made."""

    config: RunConfig
    final_windows: int | None  # None: the whole split
    seconds: float  # expected, of the loop
    timer: StepTimer


def fix_length(
    config: RunConfig,
    dataset: Dataset,
    timer: StepTimer,
    spent_s: float,
    n_final: int | Literal["auto"] | None = "auto",
    stages: str = "",
) -> RunLength:
    """The number of steps from epochs or max_time, and the windows of the final measurement.

    `spent_s` of max_time is used already, by `stages`. Raises InputError if max_time is too short
    for one step.
    """
    train = config.train
    if train.epochs is not None:
        sampler = make_sampler(config, dataset)
        config = with_steps(config, sampler.steps_for(train.epochs))
    elif train.max_time is not None:
        return _fit_time(config, dataset, timer, train.max_time, spent_s, stages)
    if config.preference.is_active:  # an evaluation takes all that is held out
        n_final = None
    elif n_final == "auto":
        n_final = final_windows(config, len(dataset.val.tokens), dataset.tokenizer.vocab_size)
    return RunLength(config, n_final, run_seconds(config, dataset, timer, n_final), timer)


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config with another number of steps."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=steps))


def report_seconds(timer: StepTimer, budget_s: float) -> float:
    """The seconds of --max-time that are kept for the report."""
    return min(timer.report, REPORT_SHARE * budget_s)


def _fit_time(
    config: RunConfig,
    dataset: Dataset,
    timer: StepTimer,
    max_time: str,
    spent_s: float,
    stages: str,
) -> RunLength:
    """As many steps as fit, with a final measurement of at most FINAL_SHARE of the time left."""
    budget_s = parse_duration(max_time)
    planned = timer._replace(step=PLANNED_SLOWDOWN * timer.step)
    left_s = max(0.0, budget_s - spent_s - report_seconds(timer, budget_s))
    val_tokens = len(dataset.val.tokens)
    n_final: int | None = None
    is_text = not config.preference.is_active  # otherwise an evaluation takes all that is held out
    n_windows = count_windows(config, val_tokens) if is_text else 0
    final_s = FINAL_PASSES * n_windows * timer.window
    if final_s > FINAL_SHARE * left_s:
        n_final = max(0, int(FINAL_SHARE * left_s / (FINAL_PASSES * timer.window)))
    steps = _most_steps(config, dataset, planned, left_s, n_final)
    if not steps and is_text:  # the windows of the evaluations during training must do
        n_final, steps = 0, _most_steps(config, dataset, planned, left_s, 0)
    fitted = with_steps(config, max(1, steps))
    if n_final is not None:
        whole = evaluation_windows(fitted, val_tokens) is None
        n_final = None if whole else max(n_final, max_evaluation_windows(fitted))
    seconds = run_seconds(fitted, dataset, timer, n_final)
    if not steps and spent_s + seconds > (1 + TOLERANCE) * budget_s:
        raise InputError(explain_refusal(max_time, spent_s, seconds, stages))
    return RunLength(fitted, n_final, seconds, timer)


def _most_steps(
    config: RunConfig, dataset: Dataset, timer: StepTimer, left_s: float, n_final: int | None
) -> int:
    """The largest number of steps that fits into `left_s`; 0 if not even one does.

    The time grows with the steps, except where evaluations during training become whole: the split
    is then not measured again at the end. So the steps on each side of that point are searched.
    """

    def seconds(steps: int) -> float:
        return run_seconds(with_steps(config, steps), dataset, timer, n_final)

    limit = 1 + int(left_s / timer.step) if left_s > 0 else 0
    counts = range(1, limit + 1)

    def is_whole(steps: int) -> bool:
        return evaluation_windows(with_steps(config, steps), len(dataset.val.tokens)) is None

    n_sampled = bisect.bisect_left(counts, True, key=is_whole)  # these counts have sampled ones
    n_whole = bisect.bisect_right(counts, left_s, lo=n_sampled, key=seconds)
    if n_whole > n_sampled:
        return n_whole
    return bisect.bisect_right(counts, left_s, hi=n_sampled, key=seconds)
