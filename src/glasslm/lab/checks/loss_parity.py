"""Trains both engines on the same text, in float32 and in float64, and compares their losses.

The losses of every step have the tolerance that parity.py has for a single number, although
rounding errors accumulate over the steps. With the default optimizer and a small model the losses
differed by 1e-7 of their value after 100 steps in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

from glasslm.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from glasslm.data.dataset import Dataset, prepare_dataset
from glasslm.data.sources import corpora
from glasslm.lab.checks.parity import TOLERANCE, ParityPrecision, make_pair, max_relative_error
from glasslm.lab.short_training import sampled_batches, train_steps
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.text import Notify
from glasslm.training.learning_rate import lr_at

STEPS = 100


class StepLosses(NamedTuple):
    """The losses of one batch before its update, in nats per token: NumPy's and PyTorch's."""

    step: int  # from 1, as in a run
    losses: dict[ParityPrecision, tuple[float, float]]

    def relative_difference(self, precision: ParityPrecision) -> float:
        """The difference of the two losses, divided by the loss."""
        by_hand, by_autograd = self.losses[precision]
        return max_relative_error(by_hand, by_autograd, abs(by_hand))

    @property
    def exceeds_tolerance(self) -> bool:
        """Whether the losses differ by more than the tolerance; NaN does."""
        return not all(
            self.relative_difference(precision) <= TOLERANCE[precision] for precision in self.losses
        )


def loss_parity_config(seed: int) -> RunConfig:
    """The default optimizer and a small model with dropout, in two micro-batches."""
    return RunConfig(
        model=ModelConfig(d_model=64, n_layers=2, block_size=64, dropout=0.1),
        train=TrainConfig(batch_size=16, micro_batch_size=8, max_steps=STEPS, seed=seed),
    )


def load_text(notify: Notify) -> tuple[Dataset, str]:
    """Shakespeare, or Python's library where Shakespeare is not available, and the text's name."""
    data = DataConfig()
    source = corpora.find_source(data, notify)
    return prepare_dataset(data, source, notify), source.name


def train_both(dataset: Dataset, config: RunConfig) -> Iterator[StepLosses]:
    """Train each engine in each precision, from the same weights on the same batches."""
    config = config.resolve()
    train, vocab_size = config.train, dataset.tokenizer.vocab_size
    weights = list(initial_weights(parameter_table(config.model, vocab_size), train.seed))
    batch_of = sampled_batches(dataset, config.model.block_size, train.batch_size, train.seed)

    def rate_of(step: int) -> float:
        return lr_at(step, config.optimizer, train.max_steps)

    loops = {
        precision: [
            train_steps(engine, batch_of, rate_of, train.max_steps)
            for engine in make_pair(config, vocab_size, precision, weights)
        ]
        for precision in get_args(ParityPrecision)
    }
    for step in range(train.max_steps):
        losses: dict[ParityPrecision, tuple[float, float]] = {}
        for precision, pair in loops.items():
            by_hand, by_autograd = (next(loop).losses.cross_entropy for loop in pair)
            losses[precision] = by_hand, by_autograd
        yield StepLosses(step + 1, losses)
