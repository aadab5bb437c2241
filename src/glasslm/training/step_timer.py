"""How long a run will take here: a few things are timed on its first batch, and the rest is counted.

So the plan can name a time before the first step, and --max-time becomes a number of steps.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration
from glasslm.data.dataset import Dataset
from glasslm.engines.choice import can_compile
from glasslm.engines.protocol import Batch, Engine
from glasslm.inference import generation
from glasslm.inference.sampling import Sampling
from glasslm.training.loop import (
    SAMPLE_TOKENS,
    evaluation_windows,
    make_sampler,
    max_evaluation_windows,
)

TIMED_TOKENS = 20  # of a sample
DISK_BYTES_PER_S, DISK_S = (
    100e6,
    0.05,
)  # a slow disk; what a checkpoint takes besides, to be safe there


# Compiling takes 10 to 30 s on a CPU, whatever the depth; it saves about an eighth of each step there, and a
# third or more on a GPU (docs/log.md). A run must be this long, in seconds, to gain by it.
COMPILING_REPAID = {"cpu": 240.0, "cuda": 180.0}


class Pace(NamedTuple):
    """What takes how long, in seconds."""

    step: float
    window: float  # of validation
    sample: float
    checkpoint: float


def measure(config: RunConfig, engine: Engine, dataset: Dataset) -> Pace:
    """Time a step, an evaluation and a sample on as much as gives an answer soon. Changes the weights.

    An engine computes so many rows side by side, and those of a step take turns: one turn is timed.
    """
    turns = math.ceil(config.train.batch_size / engine.rows_at_once)
    rows = np.arange(min(config.train.batch_size, engine.rows_at_once))
    batch = Batch(
        *make_sampler(config, len(dataset.train.tokens)).batch(dataset.train.tokens, 0, rows),
        0,
        rows,
    )

    def sample() -> None:
        pieces = generation.generate(
            engine,
            dataset.tokenizer,
            [""],
            block_size=config.model.block_size,
            max_new_tokens=TIMED_TOKENS,
            sampling=Sampling(),
        )
        for _ in pieces:
            pass

    def step() -> float:
        turn = clocked(lambda: engine.accumulate(batch, 1 / batch.targets.size))
        return turns * turn + clocked(lambda: engine.update(config.optimizer.lr))

    steps = [step() for _ in range(3)]  # the first also takes the memory
    window = min(
        clocked(lambda: engine.losses(batch.tokens, batch.targets)) for _ in range(2)
    ) / len(rows)
    size = sum(array.nbytes for _, array in engine.state())
    return Pace(
        step=statistics.median(steps),
        window=window,
        sample=clocked(sample) * SAMPLE_TOKENS / TIMED_TOKENS
        if config.train.sample_interval
        else 0.0,
        checkpoint=size / DISK_BYTES_PER_S + DISK_S,
    )


def compiling_pays(compute: ComputeConfig, expected_s: float) -> bool:
    """Whether a run that takes so long uncompiled should be compiled. `compute` has its engine and device chosen."""
    repaid = COMPILING_REPAID.get(compute.device, math.inf)
    return compute.compile == "auto" and expected_s > repaid and can_compile(compute)


def clocked(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run_seconds(config: RunConfig, dataset: Dataset, pace: Pace) -> float:
    """About how long the loop takes: steps, evaluations, samples and checkpoints, of which each new best makes one."""
    train = config.train
    steps, every_window = (
        train.max_steps,
        math.ceil((len(dataset.val.tokens) - 1) / config.model.block_size),
    )
    sampled = evaluation_windows(config, len(dataset.val.tokens))
    evaluations = 1 + math.ceil(steps / train.eval_interval)
    windows = evaluations * (sampled or every_window) + (
        2 * every_window if sampled else 0
    )  # last and best: whole
    if train.init_from:  # the old text, too, of which no more are taken than that
        windows += evaluations * max_evaluation_windows(config)
    samples = 1 + math.ceil(steps / train.sample_interval) if train.sample_interval else 0
    checkpoints = evaluations + steps // train.checkpoint_interval
    return (
        steps * pace.step
        + windows * pace.window
        + samples * pace.sample
        + checkpoints * pace.checkpoint
    )


def with_steps(config: RunConfig, dataset: Dataset, pace: Pace, spent: float) -> RunConfig:
    """The config with max_steps fixed, where epochs or max_time were asked for; `spent` seconds are gone already."""
    train = config.train

    def lasting(steps: int) -> RunConfig:
        return dataclasses.replace(config, train=dataclasses.replace(train, max_steps=steps))

    if train.epochs is not None:
        return lasting(make_sampler(config, len(dataset.train.tokens)).steps_for(train.epochs))
    if train.max_time is None:
        return config
    left = parse_duration(train.max_time) - spent
    most = max(1, int(left / pace.step))
    # More steps also mean larger evaluations, so that the number which fits is searched for.
    fitting = bisect.bisect_right(
        range(1, most + 1), left, key=lambda steps: run_seconds(lasting(steps), dataset, pace)
    )
    return lasting(max(1, fitting))
