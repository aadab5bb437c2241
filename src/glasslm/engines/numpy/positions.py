"""Where each kind of position enters the NumPy model: embeddings, queries and keys, or scores.

Letters: D width, H query heads, Q head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import ModelConfig, Position
from glasslm.engines.numpy.ops import Array
from glasslm.engines.positions import alibi_slopes, rope_cos_sin, sinusoids
from glasslm.model.parameters import INIT_STD


class PositionTables(NamedTuple):
    """The functions that compute the tables of one kind of position; None: it has no such table."""

    # -> (block_size, D), which is added to the embeddings
    vectors: Callable[[ModelConfig, DTypeLike], Array] | None = None
    # config, positions (...), heads, dtype -> cos and sin (..., heads, Q), which rotate q and k
    rotation: (
        Callable[[ModelConfig, NDArray[np.int64], int, DTypeLike], tuple[Array, Array]] | None
    ) = None
    # -> (H,): slope x distance is subtracted from the scores
    slopes: Callable[[ModelConfig, DTypeLike], Array] | None = None


def _sinusoids(c: ModelConfig, dtype: DTypeLike) -> Array:
    return sinusoids(c.block_size, c.d_model, INIT_STD, dtype)


def _rotation(
    c: ModelConfig, positions: NDArray[np.int64], heads: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    return rope_cos_sin(
        positions, heads, c.head_size, dtype, c.rope_scaling, c.rope_factor, c.rope_base
    )


def _slopes(c: ModelConfig, dtype: DTypeLike) -> Array:
    return alibi_slopes(c.n_heads, dtype)


# A model whose parameter table has position.weight adds this weight to the embeddings.
POSITIONS: dict[Position, PositionTables] = {
    "none": PositionTables(),
    "learned": PositionTables(),
    "sinusoidal": PositionTables(vectors=_sinusoids),
    "rope": PositionTables(rotation=_rotation),
    "alibi": PositionTables(slopes=_slopes),
}
