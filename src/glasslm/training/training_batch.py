"""The batch of a training step."""

from __future__ import annotations

import numpy as np

from glasslm.data.batch_sampler import BatchSampler, TokenArray
from glasslm.engines.protocol import Batch


def training_batch(sampler: BatchSampler, tokens: TokenArray, step: int, rows: int) -> Batch:
    """The first `rows` rows of the batch of `step` from tokens (N,). Steps count from 0."""
    indices = np.arange(rows)
    inputs, targets = sampler.batch(tokens, step, indices)
    return Batch(inputs, targets, step, indices)
