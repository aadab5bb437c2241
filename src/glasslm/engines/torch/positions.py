"""The position encodings of the PyTorch engine, one class each.

Letters: B rows, T positions, S keys, D width, H query heads, Q head size.
"""

from __future__ import annotations

from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from glasslm.config.schema import ModelConfig
from glasslm.engines.positions import alibi_slopes, rope_cos_sin, sinusoids
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
        self, positions: Index, cpu_positions: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor] | None:
        """RoPE's cos and sin, (T, 1, Q) or (B, T, 1, Q) each; None without RoPE.

        cpu_positions (T,) or (B, T) are the positions as a NumPy array.
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

    cos: Tensor  # (block_size, 1, Q)
    sin: Tensor

    def __init__(self, c: ModelConfig, dtype: DTypeLike) -> None:
        super().__init__(c, dtype)
        self.config, self.table_dtype = c, dtype
        for name, table in zip(("cos", "sin"), self._cos_sin(np.arange(c.block_size))):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def rotation(
        self, positions: Index, cpu_positions: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor] | None:
        if cpu_positions.max() < self.config.block_size:
            return self.cos[positions], self.sin[positions]
        # Positions beyond the context, of a rolling cache, are not in the tables.
        cos, sin = (torch.from_numpy(table).to(self.cos) for table in self._cos_sin(cpu_positions))
        return cos, sin

    def _cos_sin(self, positions: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        c = self.config
        return rope_cos_sin(
            positions, 1, c.head_size, self.table_dtype, c.rope_scaling, c.rope_factor, c.rope_base
        )


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
