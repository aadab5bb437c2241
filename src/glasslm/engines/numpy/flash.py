"""Attention by tiles: the result of `attention`, in memory that grows with T instead of T².

A softmax can be summed in pieces if the sums so far are rescaled whenever a larger score appears.
So the scores exist one tile at a time, in cache, and the backward pass recomputes them from one
number per row, the logarithm of its sum. arXiv:2205.14135, algorithms 1 and 4; the division is done
once, at the end (arXiv:2307.08691, section 3.1).

Letters: B rows, T positions, H query heads, K key-value heads (each serves G = H / K query heads),
Q head size; a tile is R queries by C keys. The G query heads of a key head are treated as more
queries. Keys come first in a tile, (K, C, G R), so that the maxima of the queries are taken along
whole rows of memory, which takes half the time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.numpy.attention import MAX_SAFE_EXPONENT
from glasslm.engines.numpy.ops import Array, New

# R and C: with four heads, two tiles are 512 KiB and stay in a second-level cache.
TILE_LENGTH = 128
# Positions from which on attention by tiles is as fast as plain attention (docs/log.md).
FLASH_MIN_LENGTH = 512


def uses_flash(c: ModelConfig, T: int) -> bool:
    """Whether attention over T positions is computed by tiles.

    Tiles drop no probabilities and have no soft cap, so these need plain attention.
    """
    needs_scores = c.attention_dropout or c.attention_softcap
    is_long = T >= FLASH_MIN_LENGTH and not needs_scores
    return {"plain": False, "flash": True, "auto": is_long}[c.attention]


def flash_attention(
    qk: Array,
    v: Array,
    slopes: Array | None,
    window: int,
    new: New,
    tile: int = 0,
    starts: NDArray[np.int64] | None = None,
) -> tuple[Array, Callable[[Array], Array]]:
    """softmax(q kᵀ / sqrt(Q) + bias, causal) v, without any array of size T x T.

    qk (B, T, H + K, Q) queries followed by keys, v (B, T, K, Q) -> (B, T, H, Q). slopes (H,): the
    bias is ALiBi's, slope x (key - query); None: no bias. window: query i attends to the keys
    i - window < j <= i; 0: to all j <= i. tile: queries and keys of a tile (0: TILE_LENGTH).
    starts (B, T): the first position of each token's document; a query attends to no earlier key.
    Overwrites the queries by q / sqrt(Q). backward returns one array of the gradients of queries,
    keys and values, (B, T, H + 2K, Q). The backward pass keeps the inputs, the output and one
    logarithm per query and head.
    """
    B, T, K, Q = v.shape
    H = qk.shape[2] - K
    scale = 1 / math.sqrt(Q)
    q, k = qk[:, :, :H], qk[:, :, H:]
    q *= scale
    rows = [None] * B if starts is None else list(starts)
    masks = [TileMask(slopes, window, tile or TILE_LENGTH, row) for row in rows]
    out, logs = new((B, T, H, Q)), new((B, K, H // K, T))
    for b in range(B):  # one after the other: the tiles of one row fill the cache
        _forward(q[b], k[b], v[b], masks[b], out[b], logs[b], new)

    def backward(dout: Array) -> Array:
        dqkv = new((B, T, H + 2 * K, Q))
        for b in range(B):
            _backward(q[b], k[b], v[b], masks[b], out[b], logs[b], dout[b], dqkv[b], new)
        dqkv[:, :, :H] *= scale
        return dqkv

    return out, backward


def _forward(
    q: Array, k: Array, v: Array, mask: TileMask, out: Array, logs: Array, new: New
) -> None:
    """One row: q (T, H, Q), k and v (T, K, Q). Overwrites out (T, H, Q) and logs (K, G, T).

    logs are the logarithms of the sums of exponentials. mixed (K, Q, G R) and total (K, 1, G R) are
    the sums of exp(score - row_max) so far, with and without the values. row_max is the maximum of
    each row so far; it stays 0 where a bound of the scores shows that nothing can overflow.
    """
    K, Q = v.shape[1:]
    bound = math.sqrt(float(np.vecdot(q, q).max()) * float(np.vecdot(k, k).max()))
    is_bounded = bound <= MAX_SAFE_EXPONENT  # false for NaN
    keys_first, values_first = k.swapaxes(0, 1), v.transpose(1, 2, 0)  # (K, T, Q), (K, Q, T)
    for queries, tiles in mask.tiles(len(q)):
        qi = _stack_groups(q[queries], K, new)
        rows = (K, 1, qi.shape[1])
        row_max = np.full(rows, 0 if is_bounded else -math.inf, q.dtype)
        total, mixed = np.zeros(rows, q.dtype), np.zeros((K, Q, qi.shape[1]), q.dtype)
        for keys in tiles:
            e = mask.scores(qi, keys_first[:, keys], queries, keys, new)
            if not is_bounded:
                new_max = np.maximum(row_max, e.max(1, keepdims=True))
                rescale = np.exp(row_max - new_max)
                total *= rescale
                mixed *= rescale
                e -= new_max
                row_max = new_max
            np.exp(e, out=e)
            total += _ones(e.shape[1], e.dtype) @ e
            mixed += values_first[:, :, keys] @ e
        mixed /= total
        mixed_heads = mixed.reshape(K, Q, -1, len(q[queries])).transpose(0, 2, 3, 1)
        _heads(out[queries], K)[...] = mixed_heads
        logs[:, :, queries] = (row_max + np.log(total)).reshape(logs[:, :, queries].shape)


def _backward(
    q: Array,
    k: Array,
    v: Array,
    mask: TileMask,
    out: Array,
    logs: Array,
    dout: Array,
    dqkv: Array,
    new: New,
) -> None:
    """One row, in the shapes of `_forward`. Overwrites dqkv (T, H + 2K, Q), dq not yet scaled.

    p = exp(score - log) and ds = p (dout . v - dout . out). The products do both subtractions:
    queries and gradients get one more entry, minus the number, and keys and values a 1 to match.
    """
    T, K, Q = v.shape
    k, v = _stack_groups(k, K, new, 1), _stack_groups(v, K, new, 1)  # (K, T, Q + 1)
    dk, dv = new((K, T, Q)), new((K, T, Q))
    dk[...] = dv[...] = 0
    for queries, tiles in mask.tiles(T):
        log = logs[:, :, queries]
        delta = np.vecdot(dout[queries], out[queries]).T.reshape(log.shape)
        qi = _stack_groups(q[queries], K, new, -log)
        douti = _stack_groups(dout[queries], K, new, -delta)
        dq = np.zeros((*qi.shape[:2], Q), q.dtype)
        for keys in tiles:
            p = mask.scores(qi, k[:, keys], queries, keys, new)
            np.exp(p, out=p)
            dv[:, keys] += p @ douti[..., :Q]
            ds = np.matmul(v[:, keys], douti.swapaxes(1, 2), out=new(p.shape))
            ds *= p
            dk[:, keys] += ds @ qi[..., :Q]
            dq += ds.swapaxes(1, 2) @ k[:, keys, :Q]
        _heads(dqkv[queries, : -2 * K], K)[...] = dq.reshape(*log.shape, Q)
    dqkv[:, -2 * K : -K], dqkv[:, -K:] = dk.swapaxes(0, 1), dv.swapaxes(0, 1)


@dataclass(frozen=True)
class TileMask:
    """Causal, window or document mask and ALiBi bias of one tile."""

    slopes: Array | None  # (H,)
    window: int
    tile: int  # the largest R and C
    starts: NDArray[np.int64] | None = None  # (T,) of each token's document; ascending

    def tiles(self, T: int) -> Iterator[tuple[slice, list[slice]]]:
        """Tiles of queries, each with the tiles of keys that they attend to, the latest first.

        The first tile of keys holds each query's own position, so that every row of scores begins
        with a visible key.
        """
        for start in range(0, T, self.tile):
            stop = min(start + self.tile, T)
            first = max(0, start - self.window + 1) if self.window else 0
            if self.starts is not None:
                first = max(first, int(self.starts[start]))
            ends = range(stop, first, -self.tile)
            yield slice(start, stop), [slice(max(first, end - self.tile), end) for end in ends]

    def scores(self, qi: Array, kj: Array, queries: slice, keys: slice, new: New) -> Array:
        """qi (K, G R, Q), kj (K, C, Q) -> a tile (K, C, G R) of scores, -inf for hidden keys."""
        K, C, _ = kj.shape
        R = queries.stop - queries.start
        s = np.matmul(kj, qi.swapaxes(1, 2), out=new((K, C, qi.shape[1])))
        heads = s.reshape(K, C, -1, R)
        if self.slopes is not None:  # slope (key - query): a number per key minus one per query
            slopes, start = self.slopes.reshape(K, 1, -1, 1), queries.start
            offsets = np.arange(keys.start - start, keys.stop - start, dtype=s.dtype)
            heads += slopes * offsets[:, None, None]
            heads -= slopes * np.arange(R, dtype=s.dtype)
        has_later_keys = keys.stop - 1 > queries.start
        has_keys_before_window = self.window and queries.stop - 1 - keys.start >= self.window
        if has_later_keys or has_keys_before_window:
            heads += _additive_mask(C, R, queries.start - keys.start, self.window, s.dtype)
        if self.starts is not None and self.starts[queries.stop - 1] > keys.start:
            is_other = np.arange(keys.start, keys.stop)[:, None, None] < self.starts[queries]
            heads += np.where(is_other, -math.inf, 0).astype(s.dtype)
        return s


@functools.lru_cache(16)
def _additive_mask(C: int, R: int, offset: int, window: int, dtype: np.dtype[Any]) -> Array:
    """(C, 1, R): 0 where a query attends to a key, else -inf; offset: first query - first key."""
    distance = offset + np.arange(R) - np.arange(C)[:, None, None]
    hidden_mask = (distance < 0) | (distance >= window) if window else distance < 0
    return np.where(hidden_mask, -math.inf, 0).astype(dtype)


@functools.lru_cache(16)
def _ones(C: int, dtype: np.dtype[Any]) -> Array:
    """(1, C) ones: the sums of the columns of a tile are a product, as in `attention`."""
    return np.ones((1, C), dtype)


def _heads(x: Array, K: int) -> Array:
    """A view of x (T, H, Q) as (K, G, T, Q)."""
    T, H, Q = x.shape
    return x.reshape(T, K, H // K, Q).transpose(1, 2, 0, 3)


def _stack_groups(x: Array, K: int, new: New, last: Array | float | None = None) -> Array:
    """x (R, H, Q) copied to (K, G R, Q), the query heads of a key head below each other.

    `last`, a number or (K, G, R), becomes one more entry of each vector: (K, G R, Q + 1).
    """
    heads = _heads(x, K)
    Q = heads.shape[-1]
    stacked = new((*heads.shape[:3], Q if last is None else Q + 1))
    stacked[..., :Q] = heads
    if last is not None:
        stacked[..., Q] = last
    return stacked.reshape(K, -1, stacked.shape[-1])
