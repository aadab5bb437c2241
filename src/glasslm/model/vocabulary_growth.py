"""Rows of new tokens in the embedding and the output head.

A new row is the mean of the old ones plus noise of NOISE of their standard deviation, so that at
first no new token is likelier than the average old one, and no two new tokens are alike
(https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Letters: V old vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.model.parameters import ParameterSpec, initial_weights

NOISE = 0.1
TOKEN_MATRICES = ("embedding.weight", "head.weight")  # a tied head is the embedding


def add_token_rows(
    weights: Mapping[str, NDArray[Any]], tokens: Mapping[int, str], seed: int
) -> dict[str, NDArray[Any]]:
    """`weights` with a row for each of the new `tokens`, texts by id, whose ids follow V.

    The noise of a row is drawn from a generator of its own, keyed by the seed, the name of the
    matrix and the text of the token: it does not depend on the other new tokens.
    """
    if not tokens:
        return dict(weights)
    return {
        name: _grow(name, array, tokens, seed) if name in TOKEN_MATRICES else array
        for name, array in weights.items()
    }


def _grow(name: str, matrix: NDArray[Any], tokens: Mapping[int, str], seed: int) -> NDArray[Any]:
    """The matrix (V, D) with its new rows."""
    V, D = matrix.shape
    assert sorted(tokens) == list(range(V, V + len(tokens))), "the ids of new tokens follow V"
    mean, deviation = matrix.mean(0, np.float64), matrix.std(0, np.float64)
    table = {f"{name}/{tokens[i]}": ParameterSpec((D,), std=1.0) for i in sorted(tokens)}
    rows = [mean + NOISE * deviation * noise for _, noise in initial_weights(table, seed)]
    return np.concatenate([matrix, np.stack(rows).astype(matrix.dtype)])
