"""Texts as padded rows of a batch: each token predicts the next one.

Letters: B rows, T positions, n tokens of one text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glasslm.data.token_file import NO_TARGET


def next_token_rows(
    texts: Sequence[ArrayLike], T: int, is_target: Sequence[ArrayLike] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and targets, both (B, T), of B texts; the rest of a row is token 0 and NO_TARGET.

    A text (n,) begins in the first column and is cut after T + 1 tokens; its last one is a target
    alone. `is_target` marks the tokens (n,) of each text that are predicted; without it they all
    are. The first token of a text has nothing before it and is never predicted.

    >>> next_token_rows([[5, 6, 7], [8, 9]], 3)[1].tolist()
    [[6, 7, -1], [9, -1, -1]]
    """
    inputs = np.zeros((len(texts), T), np.int64)
    targets = np.full((len(texts), T), NO_TARGET, np.int64)
    for row, text in enumerate(texts):
        ids = np.asarray(text, np.int64)[: T + 1]
        n = len(ids) - 1
        inputs[row, :n] = ids[:-1]
        if is_target is None:
            targets[row, :n] = ids[1:]
        else:
            targets[row, :n] = np.where(np.asarray(is_target[row])[1 : n + 1], ids[1:], NO_TARGET)
    return inputs, targets
