"""Attention by tiles, forward and backward: the numbers of `attention`, in memory that grows with T instead of T².

A softmax can be summed piece by piece, if what has been summed so far is scaled down whenever a larger score turns up.
So the scores exist one tile at a time, in cache, and the backward pass makes them again from one number a row, the
logarithm of its sum. arXiv:2205.14135, algorithms 1 and 4, dividing once at the end as arXiv:2307.08691, section 3.1.

Letters: B rows, T positions, H query heads, K key-value heads (each serves G = H / K query heads), Q head size; a tile
is R queries by C keys. The G query heads of a key head are just more queries to it. Keys come first in a tile,
(K, C, G R), so that the maxima of the queries are taken along whole rows of memory, which halves their time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from glasslm.engines.numpy.attention import SAFE_EXPONENT
from glasslm.engines.numpy.ops import Array, New

TILE = 128  # R and C; with four heads two tiles fill half a MiB, and stay in a second-level cache


def flash_attention(
    qk: Array, v: Array, slopes: Array | None, window: int, new: New, tile: int = 0
) -> tuple[Array, Callable[[Array], Array]]:
    """softmax(q kᵀ / sqrt(Q) + bias, causal) v, as `attention` has it, and nothing of size T x T.

    qk (B, T, H + K, Q) queries beside keys, v (B, T, K, Q) -> (B, T, H, Q). slopes (H,): the bias is ALiBi's, slope x
    (key - query); None: there is none. window: query i sees the keys j with i - window < j <= i; 0: all j <= i. The
    queries are overwritten by q / sqrt(Q). backward returns one array of the gradients of queries, keys and values,
    (B, T, H + 2K, Q). Beside the inputs, the output and one logarithm for each query and head are kept. `tile`: how
    many queries and keys a tile has (0: TILE).
    """
    B, T, K, Q = v.shape
    H = qk.shape[2] - K
    scale = 1 / math.sqrt(Q)
    q, k = qk[:, :, :H], qk[:, :, H:]
    q *= scale
    sight = _Sight(slopes, window, tile or TILE)
    out, logs = new((B, T, H, Q)), new((B, K, H // K, T))
    for b in range(B):  # one after the other: the tiles of one fill the cache
        _forward(q[b], k[b], v[b], sight, out[b], logs[b], new)

    def backward(dout: Array) -> Array:
        dqkv = new((B, T, H + 2 * K, Q))
        for b in range(B):
            _backward(q[b], k[b], v[b], sight, out[b], logs[b], dout[b], dqkv[b], new)
        dqkv[:, :, :H] *= scale
        return dqkv

    return out, backward


def _forward(
    q: Array, k: Array, v: Array, sight: _Sight, out: Array, logs: Array, new: New
) -> None:
    """q (T, H, Q), k and v (T, K, Q). Writes out (T, H, Q) and logs (K, G, T), of each row's sum of exponentials.

    mixed (K, Q, G R) and total (K, 1, G R) are sums of exp(score - top) so far, with values and alone. `top` is each
    row's maximum so far; where a bound of the scores (|q| |k|) shows that nothing can overflow, it stays 0.
    """
    K, Q = v.shape[1:]
    calm = (
        math.sqrt(float(np.vecdot(q, q).max()) * float(np.vecdot(k, k).max())) <= SAFE_EXPONENT
    )  # NaN is not
    keys_first, values_first = k.swapaxes(0, 1), v.transpose(1, 2, 0)  # (K, T, Q), (K, Q, T)
    for queries, tiles in sight.tiles(len(q)):
        qi = _stack(q[queries], K, new)
        rows = (K, 1, qi.shape[1])
        top = np.full(rows, 0 if calm else -math.inf, q.dtype)
        total, mixed = np.zeros(rows, q.dtype), np.zeros((K, Q, qi.shape[1]), q.dtype)
        for keys in tiles:
            e = sight.scores(qi, keys_first[:, keys], queries, keys, new)
            if not calm:
                higher = np.maximum(top, e.max(1, keepdims=True))
                shrink = np.exp(top - higher)
                total *= shrink
                mixed *= shrink
                e -= higher
                top = higher
            np.exp(e, out=e)
            total += _ones(e.shape[1], e.dtype) @ e
            mixed += values_first[:, :, keys] @ e
        mixed /= total
        _heads(out[queries], K)[...] = mixed.reshape(K, Q, -1, len(q[queries])).transpose(
            0, 2, 3, 1
        )
        logs[:, :, queries] = (top + np.log(total)).reshape(logs[:, :, queries].shape)


def _backward(
    q: Array,
    k: Array,
    v: Array,
    sight: _Sight,
    out: Array,
    logs: Array,
    dout: Array,
    dqkv: Array,
    new: New,
) -> None:
    """Writes dqkv (T, H + 2K, Q), with dq still to be scaled.

    p = exp(score - log) and ds = p (dout . v - dout . out). Both subtractions are left to the products: queries and
    gradients get one entry more, minus the number, and keys and values a 1 to meet it.
    """
    T, K, Q = v.shape
    k, v = _stack(k, K, new, 1), _stack(v, K, new, 1)  # (K, T, Q + 1)
    dk, dv = new((K, T, Q)), new((K, T, Q))
    dk[...] = dv[...] = 0
    for queries, tiles in sight.tiles(T):
        log = logs[:, :, queries]
        along = np.vecdot(dout[queries], out[queries]).T.reshape(log.shape)
        qi, douti = _stack(q[queries], K, new, -log), _stack(dout[queries], K, new, -along)
        dq = np.zeros((*qi.shape[:2], Q), q.dtype)
        for keys in tiles:
            p = sight.scores(qi, k[:, keys], queries, keys, new)
            np.exp(p, out=p)
            dv[:, keys] += p @ douti[..., :Q]
            ds = np.matmul(v[:, keys], douti.swapaxes(1, 2), out=new(p.shape))
            ds *= p
            dk[:, keys] += ds @ qi[..., :Q]
            dq += ds.swapaxes(1, 2) @ k[:, keys, :Q]
        _heads(dqkv[queries, : -2 * K], K)[...] = dq.reshape(*log.shape, Q)
    dqkv[:, -2 * K : -K], dqkv[:, -K:] = dk.swapaxes(0, 1), dv.swapaxes(0, 1)


@dataclass(frozen=True)
class _Sight:
    """What queries see of the keys: none after them, none that are `window` before them, nearer ones better."""

    slopes: Array | None  # (H,)
    window: int
    tile: int  # R and C at the most

    def tiles(self, T: int) -> Iterator[tuple[slice, list[slice]]]:
        """Tiles of queries, each with the tiles of keys that some of them see, from the latest to the earliest.

        The first holds each query's own position, so that no row of scores begins with nothing to see.
        """
        for start in range(0, T, self.tile):
            stop = min(start + self.tile, T)
            first = max(0, start - self.window + 1) if self.window else 0
            ends = range(stop, first, -self.tile)
            yield slice(start, stop), [slice(max(first, end - self.tile), end) for end in ends]

    def scores(self, qi: Array, kj: Array, queries: slice, keys: slice, new: New) -> Array:
        """A tile (K, C, G R) of scores, minus infinity where a key is hidden. qi (K, G R, Q), kj (K, C, Q)."""
        K, C, _ = kj.shape
        R = queries.stop - queries.start
        s = np.matmul(kj, qi.swapaxes(1, 2), out=new((K, C, qi.shape[1])))
        heads = s.reshape(K, C, -1, R)
        if (
            self.slopes is not None
        ):  # slope (key - query), as a number for each key and one for each query
            slopes, start = self.slopes.reshape(K, 1, -1, 1), queries.start
            heads += (
                slopes
                * np.arange(keys.start - start, keys.stop - start, dtype=s.dtype)[:, None, None]
            )
            heads -= slopes * np.arange(R, dtype=s.dtype)
        some_after = keys.stop - 1 > queries.start
        some_before = self.window and queries.stop - 1 - keys.start >= self.window
        if some_after or some_before:
            heads += _hidden(C, R, queries.start - keys.start, self.window, s.dtype)
        return s


@functools.lru_cache(16)
def _hidden(C: int, R: int, ahead: int, window: int, dtype: np.dtype[Any]) -> Array:
    """(C, 1, R): 0 where a query sees a key, else minus infinity; `ahead` is the first query minus the first key."""
    distance = ahead + np.arange(R) - np.arange(C)[:, None, None]
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return np.where(hidden, -math.inf, 0).astype(dtype)


@functools.cache
def _ones(C: int, dtype: np.dtype[Any]) -> Array:
    """(1, C): the sums of a tile's columns are a product, as in `attention`."""
    return np.ones((1, C), dtype)


def _heads(x: Array, K: int) -> Array:
    """(T, H, Q) seen as (K, G, T, Q)."""
    T, H, Q = x.shape
    return x.reshape(T, K, H // K, Q).transpose(1, 2, 0, 3)


def _stack(x: Array, K: int, new: New, last: Array | float | None = None) -> Array:
    """x (R, H, Q) copied to (K, G R, Q), the query heads of a key head below each other.

    With `last`, a number or (K, G, R), to (K, G R, Q + 1): one entry more for each.
    """
    heads = _heads(x, K)
    Q = heads.shape[-1]
    stacked = new((*heads.shape[:3], Q if last is None else Q + 1))
    stacked[..., :Q] = heads
    if last is not None:
        stacked[..., Q] = last
    return stacked.reshape(K, -1, stacked.shape[-1])
