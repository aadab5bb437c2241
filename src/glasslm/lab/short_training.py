"""A training loop of a few steps, for the trials and checks of the lab.

It has no evaluation, checkpoint or log. The loop of a run is training/loop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from glasslm.data.batch_sampler import BatchSampler
from glasslm.data.dataset import Dataset
from glasslm.engines.protocol import Batch, Engine, Losses, Update
from glasslm.training.training_batch import training_batch

BatchOf = Callable[[int], Batch]  # the batch of a step, counted from 0
RateOf = Callable[[int], float]  # the learning rate of a step


class TrainedStep(NamedTuple):
    """The losses of a step's batch before its update, and the update."""

    losses: Losses
    update: Update


def train_steps(
    engine: Engine,
    batch_of: BatchOf,
    rate_of: RateOf,
    steps: int,
    weight: float | None = None,
) -> Iterator[TrainedStep]:
    """Train the engine for at most `steps` steps, and yield each step before the next one starts.

    `weight` is the weight of a target's loss; by default the mean over the targets of the batch.
    """
    for step in range(steps):
        yield train_step(engine, batch_of(step), rate_of(step), weight)


def train_step(engine: Engine, batch: Batch, lr: float, weight: float | None = None) -> TrainedStep:
    """Train the engine on one batch."""
    losses = engine.accumulate(batch, mean_weight(batch) if weight is None else weight)
    return TrainedStep(losses, engine.update(lr))


def mean_weight(batch: Batch) -> float:
    """The weight of a target's loss in the mean over the targets of the batch."""
    return 1 / max(1, int(np.count_nonzero(batch.targets >= 0)))


def sampled_batches(dataset: Dataset, block_size: int, rows: int, seed: int) -> BatchOf:
    """The batches of a run with this seed: `rows` random windows of the training text a step."""
    sampler = BatchSampler(len(dataset.train.tokens), block_size, rows, seed, epochs=False)
    return lambda step: training_batch(sampler, dataset.train.tokens, step, rows)
