"""The batch of a training step: windows of a text, or rows of conversations."""

from __future__ import annotations

import numpy as np

from glasslm.config.schema import RunConfig
from glasslm.data.batch_sampler import Sampler, make_sampler
from glasslm.data.dataset import Dataset
from glasslm.data.token_file import Tokens
from glasslm.engines.protocol import NO_TARGET, Batch
from glasslm.errors import DamagedError


def training_batch(sampler: Sampler, tokens: Tokens, step: int, rows: int) -> Batch:
    """The first `rows` rows of the batch of `step` from tokens (N,). Steps count from 0.

    Raises DamagedError where the file of the tokens was cut.
    """
    indices = np.arange(rows)
    inputs, targets = sampler.batch(tokens, step, indices)
    return Batch(inputs, targets, step, indices)


def count_targets(batch: Batch) -> int:
    """The number of targets that are predicted, at least 1."""
    return max(1, int(np.count_nonzero(batch.targets != NO_TARGET)))


def weigh_expert_terms(config: RunConfig, dataset: Dataset) -> str:
    """A note: the weight of the experts' auxiliary terms beside a loss of answers alone.

    It is measured in the first batch. A sequence of T tokens counts T of these terms
    (Engine.accumulate), however few of its tokens are targets.
    """
    sampler, rows = make_sampler(config, dataset), config.train.batch_size
    batch = training_batch(sampler, dataset.train.tokens, 0, rows)
    factor = batch.targets.size / count_targets(batch)
    return (
        f"the terms of the experts weigh {factor:.1f} times as much beside the loss of answers "
        "as in a text: lower --balance-loss and --router-z-loss by that factor"
    )


def require_known_tokens(batch: Batch, vocab_size: int) -> None:
    """Raise DamagedError for a token outside the vocabulary: it has no embedding."""
    largest = int(max(batch.tokens.max(), batch.targets.max()))
    if largest >= vocab_size:
        raise DamagedError(
            f"the batch of step {batch.step + 1} holds token {largest}, of {vocab_size}: the "
            "tokens in the cache were altered during the run. `glasslm resume` makes them again"
        )
