"""Where each kind of position enters the NumPy model: embeddings, queries and keys, or scores.

Letters: D width, H query heads, Q head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, assert_never

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import ModelConfig, Position
from glasslm.engines.numpy.attention import alibi_bias
from glasslm.engines.numpy.ops import Array
from glasslm.engines.positions import alibi_slopes, rope_cos_sin, sinusoids
from glasslm.model.parameters import INIT_STD


class AlibiBias(NamedTuple):
    """ALiBi's bias, minus slope x distance."""

    slopes: Array  # (H,)


# What a kind of position adds to the scores. Each path of attention (dense, by tiles) matches all
# kinds, so that a path without a new one fails instead of leaving it out.
ScoreBias: TypeAlias = AlibiBias | None


def dense_bias(
    bias: ScoreBias, queries: NDArray[np.int64], keys: NDArray[np.int64]
) -> Array | None:
    """The addend to the scores of queries at positions (T,) or (B, T) and keys (S,) or (B, S).

    (H, T, S), or (B, H, T, S) where positions differ between rows; None: nothing is added.
    """
    match bias:
        case None:
            return None
        case AlibiBias(slopes):
            return alibi_bias(slopes, queries, keys)
        case _:
            assert_never(bias)


def tile_slopes(bias: ScoreBias) -> Array | None:
    """The slopes (H,) from which flash attention computes the bias of a tile; None: no bias."""
    match bias:
        case None:
            return None
        case AlibiBias(slopes):
            return slopes
        case _:
            assert_never(bias)


class PositionTables(NamedTuple):
    """The functions that compute the tables of one kind of position; None: it has no such table."""

    # -> (block_size, D), which is added to the embeddings
    vectors: Callable[[ModelConfig, DTypeLike], Array] | None = None
    # config, positions (...), heads, dtype -> cos and sin (..., heads, Q), which rotate q and k
    rotation: (
        Callable[[ModelConfig, NDArray[np.int64], int, DTypeLike], tuple[Array, Array]] | None
    ) = None
    # -> what is added to the scores
    bias: Callable[[ModelConfig, DTypeLike], ScoreBias] | None = None


def _sinusoids(c: ModelConfig, dtype: DTypeLike) -> Array:
    return sinusoids(c.block_size, c.d_model, INIT_STD, dtype)


def _rotation(
    c: ModelConfig, positions: NDArray[np.int64], heads: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    return rope_cos_sin(
        positions, heads, c.head_size, dtype, c.rope_scaling, c.rope_factor, c.rope_base
    )


def _alibi(c: ModelConfig, dtype: DTypeLike) -> ScoreBias:
    return AlibiBias(alibi_slopes(c.n_heads, dtype))


# A model whose parameter table has position.weight adds this weight to the embeddings.
POSITIONS: dict[Position, PositionTables] = {
    "none": PositionTables(),
    "learned": PositionTables(),
    "sinusoidal": PositionTables(vectors=_sinusoids),
    "rope": PositionTables(rotation=_rotation),
    "alibi": PositionTables(bias=_alibi),
}


class Rotation:
    """The cos and sin of a model's RoPE: a table up to the context length, computed beyond it."""

    def __init__(self, c: ModelConfig, dtype: DTypeLike) -> None:
        self.config, self.dtype = c, dtype
        self.table = self._compute(np.arange(c.block_size))

    def __call__(self, positions: slice | NDArray[np.int64]) -> tuple[Array, Array] | None:
        """cos and sin (..., H + K, Q) of positions (...); None unless they rotate q and k."""
        if self.table is None:
            return None
        end = positions.stop if isinstance(positions, slice) else int(positions.max()) + 1
        cos, sin = self.table
        if end <= len(cos):
            return cos[positions], sin[positions]
        if isinstance(positions, slice):
            positions = np.arange(positions.start or 0, end)
        return self._compute(positions)

    def _compute(self, positions: NDArray[np.int64]) -> tuple[Array, Array] | None:
        c, rotation = self.config, POSITIONS[self.config.position].rotation
        return rotation(c, positions, c.n_heads + c.n_kv_heads, self.dtype) if rotation else None
