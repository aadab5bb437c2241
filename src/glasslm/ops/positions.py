"""Positions: rotary embedding and its tables, ALiBi's bias, sinusoids.

Letters: T positions, H query heads, Q head size, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from glasslm.engines import positions as tables
from glasslm.engines.numpy import attention as engine_attention
from glasslm.engines.numpy.ops import Array, New
from glasslm.errors import InputError, require
from glasslm.ops.arguments import (
    as_array,
    read_arrays,
    read_float_type,
    read_gradient,
    read_new,
    require_count,
    require_number,
    require_type,
)


def rope_tables(
    positions: Any, Q: int, base: float = 10_000.0, dtype: DTypeLike = np.float32
) -> tuple[Array, Array]:
    """cos and sin of the angles of `rope`, position x base^(-2j / Q). arXiv:2104.09864.

    positions (...), integers such as np.arange(T); Q the head size, even -> cos and sin
    (..., Q / 2) each. Raises InputError for an odd Q, and positions that are not integers.
    """
    positions = as_array("positions", positions)
    if positions.dtype.kind not in "iu":
        raise InputError(
            f"positions is {positions.dtype}, with the shape {positions.shape}: expected integers, "
            "such as np.arange(T)"
        )
    require_count("Q", Q, 2)
    require(Q % 2 == 0, "Q", Q, "an even head size")
    require_number("base", base, lambda x: 1 < x < math.inf, "above 1 and finite")
    cos, sin = tables.rope_cos_sin(
        positions.astype(np.int64), 1, Q, read_float_type(dtype), "none", 1.0, base
    )
    half = Q // 2
    return cos[..., 0, half:].copy(), sin[..., 0, half:].copy()


def rope(
    x: Any, cos: Any, sin: Any, *, interleaved: bool = False, new: New | None = None
) -> tuple[Array, Callable[[Array], Array]]:
    """Rotary positions: rotate each pair of entries of a head by its angle. arXiv:2104.09864.

    Args:
        x: (..., T, H, Q).
        cos: (T, Q / 2), or (..., T, Q / 2) with leading axes that broadcast to those of x.
        sin: The shape of cos. `rope_tables` computes both.
        interleaved: The pairs are (2j, 2j + 1), as in the paper, instead of (j, j + Q / 2), as in
            Hugging Face's Llama and the models of glasslm.
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        y of the shape of x, and backward(dy) -> dx.

    Raises:
        InputError: A shape does not fit, or an array is not float32 or float64.

    >>> cos, sin = rope_tables(np.arange(5), 8)
    >>> y, backward = rope(np.ones((2, 5, 4, 8), np.float32), cos, sin)
    >>> y.shape
    (2, 5, 4, 8)
    """
    is_flag = isinstance(interleaved, (bool, np.bool_))
    require(is_flag, "interleaved", interleaved, "True or False")
    (x,) = read_arrays(x=(x, "... T H Q"))
    cos, sin = read_arrays(cos=(cos, "... T Q/2"), sin=(sin, "... T Q/2"))
    require_type("cos", cos, "x", x.dtype)
    *lead, T, _, Q = x.shape
    _require_table_shape(cos.shape, tuple(lead), T, Q)
    pairs = np.arange(Q).reshape(-1, 2).T.reshape(-1) if interleaved else np.arange(Q)
    pair_cos = np.concatenate([cos, cos], -1)[..., None, :]
    signed_sin = np.concatenate([-sin, sin], -1)[..., None, :]
    y = np.empty_like(x)
    y[..., pairs], op_back = engine_attention.rope(
        x[..., pairs], pair_cos, signed_sin, read_new(new, x.dtype)
    )

    def backward(dy: Array) -> Array:
        dx = np.empty_like(x)
        dx[..., pairs] = op_back(read_gradient(dy, y)[..., pairs])
        return dx

    return y.copy(), backward


def _require_table_shape(shape: tuple[int, ...], lead: tuple[int, ...], T: int, Q: int) -> None:
    """Raise InputError unless a table of this shape rotates x (*lead, T, H, Q)."""
    try:
        is_table = shape[-2:] == (T, Q / 2) and np.broadcast_shapes(shape[:-2], lead) == lead
    except ValueError:
        is_table = False
    if not is_table:
        raise InputError(
            f"cos has the shape {shape}: expected (T, Q / 2) = ({T}, {Q / 2:g}), or with leading "
            f"axes that broadcast to {lead}; rope_tables(np.arange({T}), {Q}) returns it"
        )


def sinusoidal_positions(T: int, D: int, dtype: DTypeLike = np.float32) -> Array:
    """The table (T, D) of sines (even columns) and cosines (odd ones) of arXiv:1706.03762, 3.5.

    It is added to embeddings (..., T, D). Raises InputError unless T >= 1 and D is even.
    """
    require_count("T", T)
    require_count("D", D, 2)
    require(D % 2 == 0, "D", D, "an even width")
    return tables.sinusoids(T, D, math.sqrt(0.5), read_float_type(dtype))


def alibi_bias(H: int, T: int, dtype: DTypeLike = np.float32) -> Array:
    """ALiBi's bias (H, T, T) of causal attention: minus slope x distance. arXiv:2108.12409.

    Keys after the query have 0: the mask hides them. Raises InputError unless H and T are at least
    1.
    """
    require_count("H", H)
    require_count("T", T)
    slopes = tables.alibi_slopes(H, read_float_type(dtype))
    return engine_attention.alibi_bias(slopes, np.arange(T), np.arange(T))
