"""Tables of positions for both engines and for exports: RoPE's cos and sin, sinusoids, slopes.

Letters: T positions, D width, H query heads, Q head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import RopeScaling

Array = NDArray[Any]


def rope_cos_sin(
    positions: NDArray[np.int64],
    heads: int,
    Q: int,
    dtype: DTypeLike,
    scaling: RopeScaling,
    factor: float,
    base: float = 10_000.0,
) -> tuple[Array, Array]:
    """cos and sin, (..., heads, Q) each, of the angles position x base^(-2j / Q).

    positions (...); all heads have the same angles. arXiv:2104.09864, section 3.2.2. The second
    half of Q repeats the first; sin is negative in the first half, so that the rotation of x is
    x cos + swap(x) sin. `scaling` stretches the angles for texts `factor` times as long as those of
    training: see ROPE_SCALINGS.
    """
    base, divisor = ROPE_SCALINGS[scaling](base, factor, Q)
    angles = positions[..., None] * base ** (-np.arange(0, Q, 2) / Q)
    angles /= divisor
    cos = np.tile(np.cos(angles), 2 * heads)
    sin = np.tile(np.concatenate([-np.sin(angles), np.sin(angles)], -1), heads)
    shape = (*positions.shape, heads, Q)
    return cos.reshape(shape).astype(dtype), sin.reshape(shape).astype(dtype)


def _scale_nothing(base: float, factor: float, Q: int) -> tuple[float, float]:
    return base, 1.0


def _scale_positions(base: float, factor: float, Q: int) -> tuple[float, float]:
    """Divide the positions by the factor. arXiv:2306.15595."""
    return base, factor


def _scale_base(base: float, factor: float, Q: int) -> tuple[float, float]:
    """Multiply the base by factor^(Q / (Q - 2)): "NTK-aware", arXiv:2309.00071, section 3.1.

    The lowest frequency becomes `factor` times slower and the highest stays as it is. With Q = 2
    there is one frequency only, the highest.
    """
    return (base * factor ** (Q / (Q - 2)), 1.0) if Q > 2 else (base, 1.0)


# (base, factor, Q) -> the base to use, and the divisor of the angles.
ROPE_SCALINGS: dict[RopeScaling, Callable[[float, float, int], tuple[float, float]]] = {
    "none": _scale_nothing,
    "linear": _scale_positions,
    "ntk": _scale_base,
}


def sinusoids(T: int, D: int, rms: float, dtype: DTypeLike) -> Array:
    """(T, D): sines and cosines of arXiv:1706.03762, section 3.5, with root mean square `rms`.

    The paper scales the embeddings up to the sinusoids instead. Only their ratio matters.
    """
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(T, D)
    return (math.sqrt(2) * rms * table).astype(dtype)


def alibi_slopes(H: int, dtype: DTypeLike) -> Array:
    """(H,): the geometric sequence 2^(-8 h / H), h = 1..H. arXiv:2108.12409, section 3."""
    return (2.0 ** (-8 * np.arange(1, H + 1) / H)).astype(dtype)
