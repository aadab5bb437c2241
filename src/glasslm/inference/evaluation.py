"""Loss, perplexity and bits per byte of tokens, by windows that do not overlap: one definition for everybody."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.protocol import Engine
from glasslm.errors import InputError


class Score(NamedTuple):
    """How well the tokens were predicted. Non-finite when the model's losses are."""

    loss: float  # mean nats a predicted token
    perplexity: float  # exp(loss)
    bpb: float  # bits a byte of the predicted tokens' text; nan where they have none
    tokens: int  # predicted ones
    bytes: int  # in the text of exactly these
    whole: bool  # every token but the first was predicted, rather than those of a sample of the windows


def evaluate(
    engine: Engine,
    tokens: NDArray[Any],
    byte_lengths: NDArray[np.int64],
    block_size: int,
    *,
    rows: int = 16,
    max_windows: int | None = None,
) -> Score:
    """Score `tokens` (N,), which may be a memory map, `rows` windows of `block_size` predictions at a time.

    Windows do not overlap and every token but the first is predicted once, from the tokens of its window before it.
    With `max_windows`, that many evenly spaced windows are taken, always the same ones. `byte_lengths` (V,) is the
    size of each token's text. Nats are summed in float64. Raises InputError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise InputError(
            f"the text has {len(tokens)} token(s): at least 2 are needed, one to read and one to predict"
        )
    count = math.ceil((len(tokens) - 1) / block_size)
    taken = min(count, max_windows or count)
    nats, predicted, size = 0.0, 0, 0
    for inputs, targets in windows(tokens, block_size, np.arange(taken) * count // taken, rows):
        valid = targets >= 0
        nats += float(np.sum(engine.losses(inputs, targets), dtype=np.float64))
        predicted += int(np.count_nonzero(valid))
        size += int(byte_lengths[targets[valid]].sum())
    loss = nats / predicted
    bpb = nats / math.log(2) / size if size else math.nan
    return Score(
        loss, math.inf if loss > 709 else math.exp(loss), bpb, predicted, size, whole=taken == count
    )


def windows(
    tokens: NDArray[Any], block_size: int, chosen: NDArray[np.int64], rows: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Inputs and targets (up to `rows`, T) of the windows with the indices `chosen`; T is at most `block_size`.

    Window i predicts the tokens i T + 1 to i T + T. The last one is padded with the target -1, which is not predicted.
    """
    width = min(block_size, len(tokens) - 1)
    last = len(tokens) - 1
    for first in range(0, len(chosen), rows):
        at = chosen[first : first + rows, None] * block_size + np.arange(width)
        inputs = tokens[np.minimum(at, last)].astype(np.int64)
        targets = np.where(at < last, tokens[np.minimum(at + 1, last)].astype(np.int64), -1)
        yield inputs, targets
