"""Causal self-attention, RoPE and ALiBi's bias, forward and backward side by side as in ops.py.

Letters: B rows, T positions, H query heads, K key-value heads (each serves G = H / K query heads),
Q head size. Heads are axes of one array (B, T, heads, Q), so that splitting them is a view.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.numpy.ops import Array, New, dropout_mask
from glasslm.engines.numpy.soft_cap import cap_scores, soft_cap

# exp(60), summed over any context, stays far below the largest number of float32, exp(88).
MAX_SAFE_EXPONENT = 60.0
# Queries of a tile: at a context of 256 attention takes three quarters of the time of a single tile
# (docs/log.md).
TILE_QUERIES = 64


def rope(x: Array, cos: Array, sin: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """x (B, T, heads, Q), cos and sin (T, heads, Q) -> x with its pairs (j, j + Q / 2) rotated.

    Overwrites x; backward overwrites dx. The halves are split as in Hugging Face's Llama. backward
    rotates in the opposite direction. All heads are rotated by whole rows, because NumPy's loops
    over half a head would be too short to be fast.
    """

    def rotate(x: Array, sin: Array) -> Array:
        swapped = swap_halves(x, new(x.shape))
        swapped *= sin
        x *= cos
        x += swapped
        return x

    return rotate(x, sin), lambda dx: rotate(dx, -sin)


def swap_halves(x: Array, out: Array) -> Array:
    """The halves of the last axis of x (..., Q), exchanged, in `out` (..., Q). Overwrites out."""
    half = x.shape[-1] // 2
    out[..., :half] = x[..., half:]
    out[..., half:] = x[..., :half]
    return out


def alibi_bias(slopes: Array, queries: Array, keys: Array) -> Array:
    """ALiBi's bias, minus slope x distance. arXiv:2108.12409.

    slopes (H,), positions of queries (T,) or (B, T), positions of keys (S,) or (B, S) ->
    (H, T, S), or (B, H, T, S) where positions differ between rows. Keys after the query get 0, so
    that they cannot overflow exp.
    """
    offset = keys[..., None, :] - queries[..., None]
    distance = np.minimum(offset, 0).astype(slopes.dtype)
    bias: Array = slopes[:, None, None] * distance[..., None, :, :]
    return bias


def attention(
    qk: Array,
    v: Array,
    bias: Array | None,
    drop: tuple[float, NDArray[np.uint32]] | None,
    new: New,
    window: int = 0,
    starts: NDArray[np.int64] | None = None,
    softcap: float = 0.0,
) -> tuple[Array, Callable[[Array], Array]]:
    """softmax(q kᵀ / sqrt(Q) + bias, causal) v. arXiv:1706.03762, equation 1.

    qk (B, T, H + K, Q) queries followed by keys, v (B, T, K, Q), bias (H, T, T) -> (B, T, H, Q).
    `drop`: the share of the attention probabilities to drop, and row keys (B,). With a `window`,
    query i attends to the keys i - window < j <= i (arXiv:2004.05150, section 3.1); with `starts`
    (B, T), the first position of each token's document, to keys j >= starts[i]. A `softcap` c
    limits the scores to +-c, before the bias. Overwrites the queries by q / sqrt(Q). backward
    overwrites dout and returns one array of the gradients of
    queries, keys and values, (B, T, H + 2K, Q).

    The queries are computed by tiles. Keys that no query of a tile can see have no scores.
    """
    B, T, K, Q = v.shape
    H, scale = qk.shape[2] - K, 1 / math.sqrt(Q)
    q, k = qk[:, :, :H], qk[:, :, H:]
    q *= scale
    # (B, K, G, T, Q), and (B, K, 1, T, Q) for keys and values
    qh, kh, vh = split_heads(q, K), split_heads(k, K), split_heads(v, K)
    bound = min(_score_bound(q, k), softcap or math.inf)
    visible = visible_keys(T, v.dtype, window, starts)
    mask = None if drop is None else dropout_mask((B, K, H // K, T, T), *drop, new)
    biases = None if bias is None else bias.reshape(K, H // K, T, T)
    out = new((B, T, H, Q))
    outh, tiles = split_heads(out, K), []
    for queries, keys in query_tiles(T, window):
        tile = np.s_[..., queries, keys]
        attend_back = _attend(
            qh[..., queries, :],
            kh[..., keys, :],
            vh[..., keys, :],
            None if biases is None else biases[tile],
            visible[tile],
            None if mask is None else mask[tile],
            softcap,
            new,
            out=outh[..., queries, :],
            is_bounded=bound <= MAX_SAFE_EXPONENT,
        )
        tiles.append((queries, keys, attend_back))

    def backward(dout: Array) -> Array:
        delta = np.vecdot(dout, out).reshape(B, T, K, H // K).transpose(0, 2, 3, 1)[..., None]
        douth, dqkv = split_heads(dout, K), new((B, T, H + 2 * K, Q))
        dq, dk, dv = (split_heads(part, K) for part in np.split(dqkv, (H, H + K), axis=2))
        written = T  # keys from here on have gradients of later queries
        for queries, keys, attend_back in reversed(tiles):
            inputs = douth[..., queries, :], delta[..., queries, :], dq[..., queries, :]
            first, end = keys.start, keys.stop
            if end == T:  # the first one here
                attend_back(*inputs, dk[..., keys, :], dv[..., keys, :])
            else:
                parts = new((B, K, 1, end - first, Q)), new((B, K, 1, end - first, Q))
                attend_back(*inputs, *parts)
                for total, part in zip((dk, dv), parts):
                    total[..., first:written, :] = part[..., : written - first, :]
                    total[..., written:end, :] += part[..., written - first :, :]
            written = first
        dqkv[:, :, :H] *= scale
        return dqkv

    return out, backward


def query_tiles(T: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of T queries, each with the keys that one of its queries can see."""
    for first in range(0, T, TILE_QUERIES):
        end = min(first + TILE_QUERIES, T)
        yield slice(first, end), slice(max(0, first - window + 1) if window else 0, end)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    visible: Array,
    mask: Array | None,
    softcap: float,
    new: New,
    *,
    out: Array,
    is_bounded: bool,
) -> Callable[[Array, Array, Array, Array, Array], None]:
    """`attention` of a tile of R queries, (B, K, G, R, Q), and S keys and values, (B, K, 1, S, Q).

    bias (K, G, R, S); visible (R, S) or (B, 1, 1, R, S): 1 or 0; mask (B, K, G, R, S) of dropout.
    Overwrites out (B, K, G, R, Q). backward(dout, delta, dq, dk, dv), with delta = sum(dout out) of
    shape (B, K, G, R, 1), overwrites dout, and dq, dk and dv by the gradients.

    The exponentials e are kept unnormalized, with their row sums: so the division is done on (R, Q)
    numbers instead of (R, S). A bound on the scores, |q| |k|, usually shows that no row maximum has
    to be subtracted first.
    """
    e = np.matmul(q, k.swapaxes(-1, -2), out=new((*q.shape[:-1], k.shape[-2])))
    softcap_back = None
    if softcap:
        e, softcap_back = soft_cap(e, softcap, new)
    if bias is not None:
        e += bias
    rsum = _exponentiate(e, visible, is_bounded)
    weights = e if mask is None else np.multiply(e, mask, out=new(e.shape))
    np.matmul(weights, v, out=out)
    out *= rsum

    def backward(dout: Array, delta: Array, dq: Array, dk: Array, dv: Array) -> None:
        # With p = e rsum and P = p mask: dv = Pᵀ dout, dP = dout vᵀ, ds = p (dP mask - sum(dP P)),
        # where sum(dP P) = sum(dout out) = delta. The factor rsum is taken out of p and multiplied
        # into dout and delta, once.
        dout *= rsum
        _sum_groups(weights.swapaxes(-1, -2), dout, dv)
        ds = np.matmul(dout, v.swapaxes(-1, -2), out=new(e.shape))
        if mask is not None:
            ds *= mask
        ds -= delta * rsum
        ds *= e
        if softcap_back is not None:
            ds = softcap_back(ds)
        _sum_groups(ds.swapaxes(-1, -2), q, dk)
        np.matmul(ds, k, out=dq)

    return backward


def _exponentiate(e: Array, visible: Array, is_bounded: bool) -> Array:
    """The reciprocals of the row sums of softmax's exponentials, (B, K, G, R, 1).

    Overwrites scores e (B, K, G, R, S) by their exponentials, 0 for hidden keys; unless they are
    bounded, relative to the maximum of their row. visible (R, S) or (B, 1, 1, R, S): 1 or 0.
    """
    S = e.shape[-1]
    if not is_bounded:
        e -= _visible_max(e, visible)
        # Hidden entries may be above the maximum of the visible ones. They are zeroed below.
        np.minimum(e, 0, out=e)
    np.exp(e, out=e)
    e *= visible
    reciprocals: Array = 1 / (e.reshape(-1, S) @ _ones(S, e.dtype)).reshape(*e.shape[:-1], 1)
    return reciprocals


def scores_and_weights(
    qk: Array,
    K: int,
    bias: Array | None,
    window: int,
    starts: NDArray[np.int64] | None,
    softmax: Callable[[Array], Array] | None = None,
    softcap: float = 0.0,
) -> tuple[Array, Array]:
    """The scores and weights of `attention`, for inspection, (B, H, T, T) each.

    qk (B, T, H + K, Q), bias (H, T, T) -> q kᵀ / sqrt(Q), -inf where a key is hidden, and its
    softmax with the bias. `softmax` replaces that of NumPy. Scores are those after a `softcap`.
    """
    B, T, heads, Q = qk.shape
    H = heads - K
    q, k = split_heads(qk[:, :, :H], K), split_heads(qk[:, :, H:], K)
    scores = (np.matmul(q, k.swapaxes(-1, -2)) * (1 / math.sqrt(Q))).reshape(B, H, T, T)
    if softcap:
        cap_scores(scores, softcap)
    visible = visible_keys(T, scores.dtype, window, starts)
    hidden_mask = visible.reshape(-1, 1, T, T) == 0
    scores[np.broadcast_to(hidden_mask, scores.shape)] = -np.inf
    weights = scores if bias is None else scores + bias
    if softmax is not None:
        return scores, softmax(weights)
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return scores, weights


def visible_keys(
    T: int, dtype: np.dtype[Any], window: int, starts: NDArray[np.int64] | None
) -> Array:
    """1 where a query attends to a key, else 0: (T, T), or (B, 1, 1, T, T) with starts (B, T)."""
    visible = _mask(T, dtype, window)
    if starts is None:
        return visible
    return visible * (np.arange(T) >= starts[:, None, None, :, None])


@functools.lru_cache(16)
def _mask(T: int, dtype: np.dtype[Any], window: int) -> Array:
    """(T, T): 1 where a query attends to a key by the causal mask or the window, else 0."""
    visible = np.tri(T, dtype=dtype)
    if window:
        visible -= np.tri(T, k=-window, dtype=dtype)
    return visible


@functools.lru_cache(16)
def _ones(S: int, dtype: np.dtype[Any]) -> Array:
    """(S,) ones, to sum rows by a product."""
    return np.ones(S, dtype)


def split_heads(x: Array, K: int) -> Array:
    """A view of x (B, T, heads, Q) as (B, K, heads / K, T, Q)."""
    B, T, heads, Q = x.shape
    return x.reshape(B, T, K, heads // K, Q).transpose(0, 2, 3, 1, 4)


def _sum_groups(a: Array, b: Array, out: Array) -> None:
    """out (B, K, 1, S, Q) = the sum over G of a (B, K, G, S, R) @ b (B, K, G, R, Q)."""
    if a.shape[2] == 1:
        np.matmul(a, b, out=out)
    else:
        np.sum(np.matmul(a, b), axis=2, keepdims=True, out=out)


def _score_bound(q: Array, k: Array) -> float:
    """An upper bound of |q . k| over all pairs (Cauchy and Schwarz); infinite for NaN."""
    bound = math.sqrt(float(np.vecdot(q, q).max()) * float(np.vecdot(k, k).max()))
    return bound if bound == bound else math.inf


def _visible_max(e: Array, visible: Array) -> Array:
    """(..., R, 1): the maximum of each row of e (..., R, S) where visible (..., R, S) is 1."""
    return np.where(visible > 0, e, -np.inf).max(-1, keepdims=True)
