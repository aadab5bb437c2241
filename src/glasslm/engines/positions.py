"""How order enters a model, as tables of numbers: the same for both engines, and for what a model is exported to.

Letters: T positions, D width, H query heads, Q head size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import RopeScaling

Array = NDArray[Any]


def rope_tables(
    T: int, heads: int, Q: int, dtype: DTypeLike, scaling: RopeScaling = "none", factor: float = 1.0
) -> tuple[Array, Array]:
    """cos and sin (T, heads, Q) of the positions 0 to T - 1: `rope_at`."""
    return rope_at(np.arange(T), heads, Q, dtype, scaling, factor)


def rope_at(
    positions: NDArray[np.int64],
    heads: int,
    Q: int,
    dtype: DTypeLike,
    scaling: RopeScaling,
    factor: float,
    base: float = 10_000.0,
) -> tuple[Array, Array]:
    """cos and sin (..., heads, Q) of the angles position x base^(-2j / Q), positions (...), the same for each head.

    arXiv:2104.09864, section 3.2.2. The second half of Q repeats the first; sin is negative in the first half, so that
    the rotation of x is x cos + swap(x) sin. For texts `factor` times as long as those of training, `linear` divides
    the positions by it (arXiv:2306.15595); `ntk` takes the base times factor^(Q / (Q - 2)) instead, which slows the
    lowest frequency as much and leaves the highest as it is ("NTK-aware"; arXiv:2309.00071, section 3.1).
    """
    if scaling == "ntk" and Q > 2:  # with Q = 2 there is one frequency, the highest
        base *= factor ** (Q / (Q - 2))
    angles = positions[..., None] * base ** (-np.arange(0, Q, 2) / Q)
    if scaling == "linear":
        angles /= factor
    cos = np.tile(np.cos(angles), 2 * heads)
    sin = np.tile(np.concatenate([-np.sin(angles), np.sin(angles)], -1), heads)
    shape = (*positions.shape, heads, Q)
    return cos.reshape(shape).astype(dtype), sin.reshape(shape).astype(dtype)


def sinusoids(T: int, D: int, rms: float, dtype: DTypeLike) -> Array:
    """(T, D) sines and cosines of arXiv:1706.03762, section 3.5, scaled to a root mean square of `rms`.

    The paper scales the embeddings up to the sinusoids instead; what matters is that the two are of a size.
    """
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(T, D)
    return (math.sqrt(2) * rms * table).astype(dtype)


def alibi_slopes(H: int, dtype: DTypeLike) -> Array:
    """(H,) the geometric sequence 2^(-8 h / H), h = 1..H. arXiv:2108.12409, section 3."""
    return (2.0 ** (-8 * np.arange(1, H + 1) / H)).astype(dtype)
