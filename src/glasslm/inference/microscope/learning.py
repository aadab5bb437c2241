"""What a checkpoint has learned: its best heads of each kind, and its loss by position.

Letters: L layers, H heads, K kinds of scores, N rows, T positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.data.dataset import Split
from glasslm.data.token_file import Tokens, read_windows
from glasslm.errors import InputError
from glasslm.inference.trained_model import Model

MIN_PROBE_ROWS, MAX_PROBE_ROWS, MAX_PROBE_LENGTH = 8, 64, 256
PROBE_FLOPS = 3e10  # about half a second
SMOOTHING = 0.12  # of a position, the half width of the mean around it; at least one position


class BestHeads(NamedTuple):
    """The head with the highest score of each kind."""

    scores: NDArray[np.float64]  # (K,) nan where no position has such a key
    layers: NDArray[np.int64]  # (K,)
    heads: NDArray[np.int64]  # (K,)


def best_heads(scores: NDArray[np.float64]) -> BestHeads:
    """The best heads by scores (K, L, H)."""
    flat = np.nan_to_num(scores.reshape(len(scores), -1), nan=-1)
    best = flat.argmax(-1)
    layers, heads = np.unravel_index(best, scores.shape[1:])
    return BestHeads(scores[np.arange(len(scores)), layers, heads], layers, heads)


def probe_tokens(split: Split) -> Tokens:
    """The tokens for `loss_by_position`. Raises InputError where a text has no such losses."""
    if split.conversations is not None or split.answers is not None:
        raise InputError(
            "this run learned answers alone: its losses at other positions say nothing, and "
            "answers do not stand at all positions"
        )
    if len(split.tokens) < 2:
        raise InputError("the validation text has fewer than two tokens")
    return split.tokens


def loss_by_position(model: Model, tokens: Tokens) -> NDArray[np.float64]:
    """(T,): the mean loss (nats) of the token after each position, over windows of `tokens`.

    The windows, of at most MAX_PROBE_LENGTH, lie evenly over the tokens; a large model reads fewer.
    """
    length = min(model.config.model.block_size, MAX_PROBE_LENGTH, len(tokens) - 1)
    affordable = int(PROBE_FLOPS / (2 * model.parameters.total * length))
    rows = max(MIN_PROBE_ROWS, min(MAX_PROBE_ROWS, affordable))
    rows = max(1, min(rows, (len(tokens) - 1) // length))
    starts = np.linspace(0, len(tokens) - 1 - length, rows).astype(int)
    windows = read_windows(tokens, starts, length + 1)
    losses = model.engine.losses(windows[:, :-1], windows[:, 1:])
    return np.asarray(losses, np.float64).mean(0)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T,): the mean of values (T,) around each position, wider where positions are later."""
    sums = np.concatenate([[0.0], values.cumsum()])
    positions = np.arange(len(values))
    reach = np.maximum(1, (SMOOTHING * positions).astype(int))
    first, last = np.maximum(0, positions - reach), np.minimum(len(values), positions + reach + 1)
    means: NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return means
