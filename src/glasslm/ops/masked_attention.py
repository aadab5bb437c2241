"""Causal attention by the engine, and attention with any mask or bias.

Letters: T queries, S keys, H query heads, K key-value heads, Q head size, R width of a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.numpy import attention as engine_attention
from glasslm.engines.numpy.ops import Array, New
from glasslm.errors import InputError
from glasslm.ops.arguments import (
    as_array,
    read_arrays,
    read_gradient,
    read_new,
    require_count,
    require_type,
)
from glasslm.ops.layers import softmax

AttentionBackward = Callable[[Array], tuple[Array, Array, Array]]


def attention(
    q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None, *, new: New | None = None
) -> tuple[Array, AttentionBackward]:
    """Multi-head attention, causal unless there is a mask: softmax(q kᵀ / sqrt(Q) + bias) v.

    Each of the K key-value heads serves H / K neighbouring query heads. arXiv:1706.03762, equation
    1; arXiv:2305.13245.

    Args:
        q: (..., T, H, Q).
        k: (..., S, K, Q); S = T without a mask.
        v: (..., S, K, Q).
        mask: True where a query attends to a key, (T, S), or with all axes, (..., H, T, S), of
            which any may be 1; without one, query i attends to the keys 0 to i.
        bias: A constant that is added to the scores, of a shape that broadcasts to (..., H, T, S),
            such as that of `alibi_bias`.
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        y (..., T, H, Q), and backward(dy) -> dq, dk, dv in the shapes of q, k and v.

    Raises:
        InputError: A shape does not fit, an array is not float32 or float64, or the mask hides
            every key from a query.

    >>> q, k = np.ones((2, 5, 4, 8)), np.ones((2, 5, 1, 8))
    >>> y, backward = attention(q, k, k)
    >>> y, backward = attention(q, k, k, mask=np.ones((5, 5), bool))  # every key is visible
    >>> dq, dk, dv = backward(np.ones_like(y))
    >>> dk.shape
    (2, 5, 1, 8)
    """
    q, k, v = read_arrays(q=(q, "... T H Q"), k=(k, "... S K Q"), v=(v, "... S K Q"))
    (T, H), (S, K) = q.shape[-3:-1], k.shape[-3:-1]
    if H % K:
        raise InputError(
            f"k has the shape {k.shape}: expected (..., S, K, Q) with K heads that divide the "
            f"H = {H} heads of q"
        )
    if mask is None and S != T:
        raise InputError(
            f"k has the shape {k.shape}: expected S = T = {T} for causal attention; give a mask "
            f"(T, S) to attend to {S} keys"
        )
    if mask is None and bias is None:
        return _causal_attention(q, k, v, new)
    mask = None if mask is None else as_array("mask", mask)
    if mask is not None and 2 < mask.ndim < q.ndim:
        raise InputError(
            f"mask has the shape {mask.shape}: expected (T, S), or all axes (..., H, T, S); "
            "give mask[..., None, :, :] for one mask per text, or mask[None] for one per head"
        )
    mask = causal_mask(T) if mask is None else mask
    heads_first = (np.swapaxes(q, -2, -3), _repeat_heads(k, H), _repeat_heads(v, H))
    y, inner_back = scaled_dot_product_attention(*heads_first, mask, bias, new=new)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        dq, dk, dv = inner_back(np.swapaxes(read_gradient(dy, q), -2, -3))
        return np.swapaxes(dq, -2, -3).copy(), _sum_heads(dk, k.shape), _sum_heads(dv, v.shape)

    return np.swapaxes(y, -2, -3).copy(), backward


def _causal_attention(
    q: Array, k: Array, v: Array, new: New | None
) -> tuple[Array, AttentionBackward]:
    """`attention` without a mask and a bias, by the kernel of the engine."""
    (T, H, Q), K = q.shape[-3:], k.shape[-2]
    qk = np.concatenate([q, k], axis=-2).reshape(-1, T, H + K, Q)
    y, op_back = engine_attention.attention(
        qk, v.reshape(-1, T, K, Q), None, None, read_new(new, q.dtype)
    )

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        dqkv = op_back(read_gradient(dy, q).reshape(-1, T, H, Q))
        dq, dk, dv = dqkv[:, :, :H], dqkv[:, :, H : H + K], dqkv[:, :, H + K :]
        return dq.copy().reshape(q.shape), dk.copy().reshape(k.shape), dv.copy().reshape(v.shape)

    return y.copy().reshape(q.shape), backward


def _repeat_heads(x: Array, H: int) -> Array:
    """x (..., S, K, Q) -> (..., H, S, Q): each head as often as it has query heads."""
    return np.repeat(np.swapaxes(x, -2, -3), H // x.shape[-2], axis=-3)


def _sum_heads(dx: Array, shape: tuple[int, ...]) -> Array:
    """The gradient (..., S, K, Q), of this shape, of an x whose `_repeat_heads` has dx."""
    *lead, S, K, Q = shape
    return np.swapaxes(dx.reshape(*lead, K, -1, S, Q).sum(-3), -2, -3).copy()


def scaled_dot_product_attention(
    q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None, *, new: New | None = None
) -> tuple[Array, AttentionBackward]:
    """Attention over the last two axes: softmax(q kᵀ / sqrt(Q) + bias) v, every key visible.

    Heads are leading axes, as in PyTorch's function of this name. arXiv:1706.03762, equation 1.

    Args:
        q: (..., T, Q).
        k: (..., S, Q).
        v: (..., S, R).
        mask: True where a query attends to a key, of a shape that broadcasts to (..., T, S).
        bias: A constant that is added to the scores, of a shape that broadcasts to (..., T, S).
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        y (..., T, R), and backward(dy) -> dq, dk, dv in the shapes of q, k and v.

    Raises:
        InputError: A shape does not fit, an array is not float32 or float64, or mask and bias hide
            every key from a query.

    >>> q, k, v = np.ones((2, 4, 5, 8)), np.ones((2, 4, 7, 8)), np.ones((2, 4, 7, 3))
    >>> y, backward = scaled_dot_product_attention(q, k, v)
    >>> y.shape
    (2, 4, 5, 3)
    """
    q, k, v = read_arrays(q=(q, "... T Q"), k=(k, "... S Q"), v=(v, "... S R"))
    scale = 1 / math.sqrt(q.shape[-1])
    scores = np.matmul(q, k.swapaxes(-1, -2))
    scores *= scale
    if bias is not None:
        scores += _read_bias(bias, scores)
    if mask is not None:
        scores[~_read_mask(mask, scores)] = -np.inf
    _require_visible_keys(scores, mask, bias)
    p, softmax_back = softmax(scores, new=new)
    y = np.matmul(p, v)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        dy = read_gradient(dy, y)
        dv = np.matmul(p.swapaxes(-1, -2), dy)
        ds = softmax_back(np.matmul(dy, v.swapaxes(-1, -2)))
        ds *= scale
        return np.matmul(ds, k), np.matmul(ds.swapaxes(-1, -2), q), dv

    return y, backward


def _read_mask(mask: Any, scores: Array) -> NDArray[np.bool_]:
    """The mask in the shape of the scores (..., T, S)."""
    mask = as_array("mask", mask)
    if mask.dtype != np.bool_:
        raise InputError(
            f"mask is {mask.dtype}, with the shape {mask.shape}: expected bool, True where a query "
            "attends to a key; give mask.astype(bool), or numbers to add to the scores as `bias`"
        )
    return _broadcast("mask", mask, scores)


def _read_bias(bias: Any, scores: Array) -> Array:
    """The bias in the shape of the scores (..., T, S); -inf hides a key."""
    (bias,) = read_arrays(bias=(bias, "..."))
    require_type("bias", bias, "q", scores.dtype)
    if not (bias < np.inf).all():
        raise InputError("bias holds nan or inf: expected finite numbers, or -inf to hide a key")
    return _broadcast("bias", bias, scores)


def _broadcast(name: str, array: Array, scores: Array) -> Array:
    try:
        return np.broadcast_to(array, scores.shape)
    except ValueError:
        raise InputError(
            f"{name} has the shape {array.shape}: expected one that broadcasts to {scores.shape}, "
            "with queries T and keys S as the last two axes; give it axes of size 1 where it is "
            "the same"
        ) from None


def _require_visible_keys(scores: Array, mask: Any, bias: Any) -> None:
    """Raise InputError where every score (..., T, S) of a query is -inf."""
    if mask is None and bias is None:
        return
    hidden = np.argwhere((scores == -np.inf).all(-1))
    if len(hidden):
        cause = "mask" if bias is None else "bias" if mask is None else "mask and bias together"
        raise InputError(
            f"{cause} hides every key from query {hidden[0].tolist()} of scores with the shape "
            f"{scores.shape}: let each query attend to one key or more, such as its own"
        )


def causal_mask(T: int, window: int = 0) -> NDArray[np.bool_]:
    """The mask (T, T) of causal attention: True where key j <= query i.

    With a `window` only the last `window` keys are visible: i - window < j <= i. arXiv:2004.05150,
    section 3.1. Raises InputError unless T >= 1 and window >= 0.
    """
    require_count("T", T)
    require_count("window", window, 0)
    mask = np.tri(T, dtype=bool)
    return mask & ~np.tri(T, k=-window, dtype=bool) if window else mask
