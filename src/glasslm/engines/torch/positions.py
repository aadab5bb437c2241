"""The position encodings of the PyTorch engine, one class each.

Letters: B rows, T positions, S keys, D width, H query heads, Q head size.
"""

from __future__ import annotations

from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from glasslm.config.schema import LayerKind, ModelConfig
from glasslm.engines.positions import MIN_TABLE_POSITIONS, alibi_slopes, layer_cos_sin, sinusoids
from glasslm.model.parameters import INIT_STD

Index: TypeAlias = slice | Tensor  # positions (T,) or (B, T), or the slice 0:T of a whole text


class PositionEncoding(nn.Module):
    """The base of the encodings: each one overrides the methods by which it acts.

    Tables are computed in NumPy, in `dtype`, as in the other engine, and are not part of a
    checkpoint.
    """

    def __init__(self, c: ModelConfig, dtype: DTypeLike) -> None:
        super().__init__()

    @property
    def has_bias(self) -> bool:
        """Whether the encoding adds a bias to the scores: its class overrides `bias`."""
        return type(self).bias is not NoPositions.bias

    def add_to(self, x: Tensor, positions: Index) -> Tensor:
        """Embeddings x (B, T, D) with the vectors of their positions added, (B, T, D)."""
        return x

    def rotation(
        self, kind: LayerKind, positions: Index, cpu_positions: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor] | None:
        """RoPE's cos and sin, (T, 1, R) or (B, T, 1, R) each; None for layers without RoPE.

        They are those of one kind of layer. cpu_positions (T,) or (B, T) are the positions as a
        NumPy array.
        """
        return None

    def bias(self, offsets: Tensor) -> Tensor | None:
        """The addend to attention scores, (H, T, S) or (B, H, T, S); None without ALiBi.

        offsets (1, T, S) or (B, 1, T, S) are each key's position minus the query's.
        """
        return None


@final
class NoPositions(PositionEncoding):
    """No encoding: attention sees the order of the tokens by the causal mask alone."""


@final
class SinusoidalPositions(PositionEncoding):
    """Fixed sines and cosines, added to the embeddings. arXiv:1706.03762, section 3.5."""

    table: Tensor  # (block_size, D)

    def __init__(self, c: ModelConfig, dtype: DTypeLike) -> None:
        super().__init__(c, dtype)
        table = sinusoids(c.block_size, c.d_model, INIT_STD, dtype)
        self.register_buffer("table", torch.from_numpy(table), persistent=False)

    def add_to(self, x: Tensor, positions: Index) -> Tensor:
        return x + self.table[positions]


@final
class LearnedPositions(PositionEncoding):
    """A learned vector for each position, added to the embeddings."""

    def __init__(self, c: ModelConfig, dtype: DTypeLike) -> None:
        super().__init__(c, dtype)
        self.weight = nn.Parameter(torch.empty(c.block_size, c.d_model))

    def add_to(self, x: Tensor, positions: Index) -> Tensor:
        return x + self.weight[positions]


@final
class RotaryPositions(PositionEncoding):
    """RoPE: queries and keys are rotated by angles linear in the position. arXiv:2104.09864."""

    def __init__(self, c: ModelConfig, dtype: DTypeLike) -> None:
        super().__init__(c, dtype)
        self.config, self.table_dtype = c, dtype
        # Tables of the positions read so far, (T, 1, R) each; see MIN_TABLE_POSITIONS.
        for kind in c.layer_kinds:
            self._store_table(kind, min(MIN_TABLE_POSITIONS, c.block_size), None)

    def rotation(
        self, kind: LayerKind, positions: Index, cpu_positions: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor] | None:
        if kind == "n":
            return None
        end, cos = int(cpu_positions.max()) + 1, self.get_buffer(f"cos_{kind}")
        if len(cos) < end <= self.config.block_size:
            self._store_table(kind, min(self.config.block_size, 2 * end), cos)
        if end <= self.config.block_size:
            return (
                self.get_buffer(f"cos_{kind}")[positions],
                self.get_buffer(f"sin_{kind}")[positions],
            )
        # Positions beyond the context, of a rolling cache, are not in the tables.
        tables = self._cos_sin(kind, cpu_positions)
        return torch.from_numpy(tables[0]).to(cos), torch.from_numpy(tables[1]).to(cos)

    def _store_table(self, kind: LayerKind, length: int, like: Tensor | None) -> None:
        for name, table in zip(("cos", "sin"), self._cos_sin(kind, np.arange(length))):
            tensor = torch.from_numpy(table)
            tensor = tensor if like is None else tensor.to(like)
            self.register_buffer(f"{name}_{kind}", tensor, persistent=False)

    def _cos_sin(
        self, kind: LayerKind, positions: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        return layer_cos_sin(self.config, kind, positions, 1, self.table_dtype)


@final
class AlibiPositions(PositionEncoding):
    """ALiBi: scores fall linearly with distance, by a slope of each head. arXiv:2108.12409."""

    slopes: Tensor  # (H,)

    def __init__(self, c: ModelConfig, dtype: DTypeLike) -> None:
        super().__init__(c, dtype)
        slopes = alibi_slopes(c.n_heads, dtype)
        self.register_buffer("slopes", torch.from_numpy(slopes), persistent=False)

    def bias(self, offsets: Tensor) -> Tensor | None:
        return self.slopes[:, None, None] * offsets


POSITIONS: dict[str, type[PositionEncoding]] = {
    "none": NoPositions,
    "sinusoidal": SinusoidalPositions,
    "learned": LearnedPositions,
    "rope": RotaryPositions,
    "alibi": AlibiPositions,
}
