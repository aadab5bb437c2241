"""The expected duration of a run: its parts are timed on the first batch and multiplied.

The plan shows it before the first step, and --max-time becomes a number of steps.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration
from glasslm.data.batch_sampler import make_sampler
from glasslm.data.dataset import Dataset
from glasslm.engines.choice import can_compile
from glasslm.engines.protocol import Engine
from glasslm.inference import generation
from glasslm.inference.sampling import Sampling
from glasslm.training.evaluation_windows import evaluation_windows, max_evaluation_windows
from glasslm.training.loop import SAMPLE_TOKENS
from glasslm.training.training_batch import training_batch

TIMED_SAMPLE_TOKENS = 20  # tokens of the sample that is timed
DISK_BYTES_PER_S = 100e6  # a slow disk
CHECKPOINT_S = 0.05  # fixed cost of a checkpoint
# Compiling takes 10 to 30 s on a CPU at any depth. It saves about an eighth of each step there and
# a third or more on a GPU (docs/log.md). Shorter runs, in seconds, do not gain by it.
MIN_COMPILED_RUN_S = {"cpu": 240.0, "cuda": 180.0}


class StepTimer(NamedTuple):
    """Seconds of the parts of a run."""

    step: float
    window: float  # one validation window
    sample: float
    checkpoint: float


def time_steps(config: RunConfig, engine: Engine, dataset: Dataset) -> StepTimer:
    """Time a step, an evaluation and a sample. Changes the weights.

    An engine computes `rows_at_once` rows side by side; a larger batch takes several such turns, of
    which one is timed.
    """
    turns = math.ceil(config.train.batch_size / engine.rows_at_once)
    rows = min(config.train.batch_size, engine.rows_at_once)
    sampler = make_sampler(config, len(dataset.train.tokens))
    batch = training_batch(sampler, dataset.train.tokens, step=0, rows=rows)

    def sample() -> None:
        pieces = generation.generate(
            engine,
            dataset.tokenizer,
            [""],
            model_config=config.model,
            max_new_tokens=TIMED_SAMPLE_TOKENS,
            sampling=Sampling(),
        )
        for _ in pieces:
            pass

    def step() -> float:
        turn = time_call(lambda: engine.accumulate(batch, 1 / batch.targets.size))
        return turns * turn + time_call(lambda: engine.update(config.optimizer.lr))

    steps = [step() for _ in range(3)]  # the first one also allocates memory
    window = (
        min(time_call(lambda: engine.losses(batch.tokens, batch.targets)) for _ in range(2)) / rows
    )
    size = sum(array.nbytes for _, array in engine.state())
    return StepTimer(
        step=statistics.median(steps),
        window=window,
        sample=time_call(sample) * SAMPLE_TOKENS / TIMED_SAMPLE_TOKENS
        if config.train.sample_interval
        else 0.0,
        checkpoint=size / DISK_BYTES_PER_S + CHECKPOINT_S,
    )


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


def run_seconds(config: RunConfig, dataset: Dataset, timer: StepTimer) -> float:
    """The expected seconds of the loop: steps, evaluations, samples and checkpoints.

    Each evaluation is counted with a checkpoint, which a new best loss writes.
    """
    train = config.train
    steps = train.max_steps
    all_windows = math.ceil((len(dataset.val.tokens) - 1) / config.model.block_size)
    sampled_windows = evaluation_windows(config, len(dataset.val.tokens))
    evaluations = 1 + math.ceil(steps / train.eval_interval)
    windows = evaluations * (sampled_windows or all_windows)
    if sampled_windows:  # the last and the best weights are measured on the whole split
        windows += 2 * all_windows
    if train.init_from:  # the old text is evaluated too
        windows += evaluations * max_evaluation_windows(config)
    samples = 1 + math.ceil(steps / train.sample_interval) if train.sample_interval else 0
    checkpoints = evaluations + steps // train.checkpoint_interval
    return (
        steps * timer.step
        + windows * timer.window
        + samples * timer.sample
        + checkpoints * timer.checkpoint
    )


def with_steps(config: RunConfig, dataset: Dataset, timer: StepTimer, spent_s: float) -> RunConfig:
    """The config with max_steps set from epochs or max_time.

    `spent_s` of max_time is used already.
    """
    train = config.train

    def with_max_steps(steps: int) -> RunConfig:
        return dataclasses.replace(config, train=dataclasses.replace(train, max_steps=steps))

    if train.epochs is not None:
        return with_max_steps(
            make_sampler(config, len(dataset.train.tokens)).steps_for(train.epochs)
        )
    if train.max_time is None:
        return config
    left_s = parse_duration(train.max_time) - spent_s
    max_steps = max(1, int(left_s / timer.step))
    # The cost of an evaluation grows with the number of steps, so the number that fits is searched.
    n_steps = bisect.bisect_right(
        range(1, max_steps + 1),
        left_s,
        key=lambda steps: run_seconds(with_max_steps(steps), dataset, timer),
    )
    return with_max_steps(max(1, n_steps))
