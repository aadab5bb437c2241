"""Both engines learn the same text side by side, in float32 and in float64: how far do their losses part?

The losses of every step are held to what parity.py allows a single number, although rounding is carried from step to
step: with this recipe, the default one on a small model, 1e-7 of the loss was measured after 100 steps in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

import numpy as np

from glasslm.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from glasslm.data import shards
from glasslm.data.batch_sampler import Order
from glasslm.data.shards import Dataset
from glasslm.data.sources import corpora
from glasslm.engines.protocol import Batch
from glasslm.lab.checks.parity import TOLERANCE, Exactness, make_pair, mean_weight, relative
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.text import Say
from glasslm.training.learning_rate import lr_at

STEPS = 100


class Point(NamedTuple):
    """A step, and the loss of its batch before the update: nats per token, NumPy's and PyTorch's."""

    step: int  # from 1, as a run counts
    losses: dict[Exactness, tuple[float, float]]

    def apart(self, precision: Exactness) -> float:
        """The difference as a share of the loss."""
        by_hand, by_autograd = self.losses[precision]
        return relative(by_hand, by_autograd, abs(by_hand))

    @property
    def wrong(self) -> bool:
        return not all(
            self.apart(precision) <= TOLERANCE[precision] for precision in self.losses
        )  # a NaN is


def recipe(seed: int) -> RunConfig:
    """The default optimizer and a small model with dropout, in two micro-batches."""
    return RunConfig(
        model=ModelConfig(d_model=64, n_layers=2, block_size=64, dropout=0.1),
        train=TrainConfig(batch_size=16, micro_batch_size=8, max_steps=STEPS, seed=seed),
    )


def find_text(say: Say) -> tuple[Dataset, str]:
    """Shakespeare, or Python's library where that cannot be had, by characters; and which of them it is."""
    data = DataConfig()
    source = corpora.find(data, say)
    return shards.prepare(data, source, say), source.name


def curves(dataset: Dataset, config: RunConfig) -> Iterator[Point]:
    """Train four times at once: each engine in each precision, from the same weights on the same batches."""
    config = config.resolved()
    train, vocab_size = config.train, dataset.tokenizer.vocab_size
    weights = list(initial_weights(parameter_table(config.model, vocab_size), train.seed))
    pairs = {
        precision: make_pair(config, vocab_size, precision, weights)
        for precision in get_args(Exactness)
    }
    order = Order(
        len(dataset.train.tokens),
        config.model.block_size,
        train.batch_size,
        train.seed,
        epochs=False,
    )
    rows = np.arange(train.batch_size)
    for step in range(train.max_steps):
        batch = Batch(*order.batch(dataset.train.tokens, step, rows), step, rows)
        lr = lr_at(step, config.optimizer, train.max_steps)
        losses: dict[Exactness, tuple[float, float]] = {}
        for precision, pair in pairs.items():
            by_hand, by_autograd = (
                engine.accumulate(batch, mean_weight(batch)).cross_entropy for engine in pair
            )
            losses[precision] = by_hand, by_autograd
            for engine in pair:
                engine.update(lr)
        yield Point(step + 1, losses)
