"""Where each kind of position enters the NumPy model: embeddings, queries and keys, or scores.

Letters: D width, H query heads, Q head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, assert_never

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import LayerKind, ModelConfig, Position
from glasslm.engines.numpy.attention import alibi_bias
from glasslm.engines.numpy.ops import Array
from glasslm.engines.positions import MIN_TABLE_POSITIONS, alibi_slopes, layer_cos_sin, sinusoids
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
    # config, kind of layer, positions (...), heads, dtype -> cos and sin (..., heads, R), which
    # rotate the first R dimensions of q and k
    rotation: (
        Callable[[ModelConfig, LayerKind, NDArray[np.int64], int, DTypeLike], tuple[Array, Array]]
        | None
    ) = None
    # -> what is added to the scores
    bias: Callable[[ModelConfig, DTypeLike], ScoreBias] | None = None


def _sinusoids(c: ModelConfig, dtype: DTypeLike) -> Array:
    return sinusoids(c.block_size, c.d_model, INIT_STD, dtype)


def _alibi(c: ModelConfig, dtype: DTypeLike) -> ScoreBias:
    return AlibiBias(alibi_slopes(c.n_heads, dtype))


# A model whose parameter table has position.weight adds this weight to the embeddings.
POSITIONS: dict[Position, PositionTables] = {
    "none": PositionTables(),
    "learned": PositionTables(),
    "sinusoidal": PositionTables(vectors=_sinusoids),
    "rope": PositionTables(rotation=layer_cos_sin),
    "alibi": PositionTables(bias=_alibi),
}


class Rotation:
    """The cos and sin of the RoPE of one kind of layer.

    A table holds those of the positions read so far, up to the context length; beyond it they are
    computed each time.
    """

    def __init__(self, c: ModelConfig, kind: LayerKind, dtype: DTypeLike) -> None:
        self.config, self.kind, self.dtype = c, kind, dtype
        self.table = self._compute(np.arange(min(MIN_TABLE_POSITIONS, c.block_size)))

    def __call__(self, positions: slice | NDArray[np.int64]) -> tuple[Array, Array]:
        """cos and sin (..., H + K, R) of positions (...)."""
        end = positions.stop if isinstance(positions, slice) else int(positions.max()) + 1
        cos, sin = self.table
        if len(cos) < end <= self.config.block_size:
            grown = min(self.config.block_size, 2 * end)
            self.table = cos, sin = self._compute(np.arange(grown))
        if end <= len(cos):
            return cos[positions], sin[positions]
        if isinstance(positions, slice):
            positions = np.arange(positions.start or 0, end)
        return self._compute(positions)

    def _compute(self, positions: NDArray[np.int64]) -> tuple[Array, Array]:
        c, rotation = self.config, POSITIONS[self.config.position].rotation
        assert rotation is not None, f"{c.position} positions do not rotate"
        return rotation(c, self.kind, positions, c.n_heads + c.n_kv_heads, self.dtype)


def make_rotations(c: ModelConfig, dtype: DTypeLike) -> dict[LayerKind, Rotation]:
    """The rotation of each kind of layer that has one."""
    if POSITIONS[c.position].rotation is None:
        return {}
    return {kind: Rotation(c, kind, dtype) for kind in c.layer_kinds if kind != "n"}
