"""The forward pass without a way back: reading tokens into a cache of keys and values, many at once or one by one.

Nothing is kept for gradients, and rows may hold texts of different lengths. B rows, T new positions, S cached
positions, H query heads, K key-value heads, G = H / K, Q head size, D width, V vocabulary.

One token at a time, calls cost as much as computing: hence `dot`, half a microsecond quicker than `@`, for products.
OpenBLAS is slow with few rows and quick with few columns: hence a product of a handful of rows is turned round.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config import ModelConfig
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.attention import alibi_bias, swap_halves
from glasslm.engines.numpy.model import Model
from glasslm.engines.numpy.ops import Array
from glasslm.engines.numpy.weights import Weights

FEW_ROWS = 128


class KeyValueCache:
    """Keys and values of every layer, (layers, rows, K, capacity, Q) each, and how far each row is filled."""

    def __init__(self, layers: int, rows: int, heads: int, capacity: int, head_size: int, dtype: Any) -> None:
        self.keys = np.zeros((layers, rows, heads, capacity, head_size), dtype)
        self.values = np.zeros_like(self.keys)
        self._lengths = np.zeros(rows, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths.copy()

    def clear(self, row: int) -> None:
        self._lengths[row] = 0

    def part(self, rows: slice) -> KeyValueCache:
        """Some of the rows, in the same memory."""
        view = copy.copy(self)
        view.keys, view.values, view._lengths = self.keys[:, rows], self.values[:, rows], self._lengths[rows]
        return view


class _Place:
    """Where the new tokens stand, and which cached positions each of them may see."""

    def __init__(self, cache: KeyValueCache, counts: NDArray[np.int64], T: int) -> None:
        before, capacity = cache._lengths, cache.keys.shape[3]
        self.counts, self.before = counts, before.copy()
        self.start = int(before[0])
        self.S = self.start + int(counts[0]) if len(counts) == 1 else int((before + counts).max())
        assert capacity >= self.S, "more tokens than the cache has room for"
        # Rows that are alike (the usual case) are written and masked as one; then positions are a slice, else (B, T).
        self.alike = (len(before) == 1 and int(counts[0]) == T) or bool(
            (before == self.start).all() and (counts == T).all()
        )
        self.positions: slice | NDArray[np.int64] = slice(self.start, self.S)
        if not self.alike:
            self.positions = np.minimum(before[:, None] + np.arange(T), capacity - 1)  # padding may point past the end
        self.hidden: NDArray[np.bool_] | None = None
        if T > 1 or not self.alike:
            later = np.arange(self.S) > self.queries[..., None]
            self.hidden = later.reshape(-1, 1, 1, T, self.S)

    @property
    def queries(self) -> NDArray[np.int64]:
        """(T,) or (B, T) the positions as numbers."""
        return np.arange(self.start, self.S) if isinstance(self.positions, slice) else self.positions

    def write(self, cached: Array, new: Array) -> None:
        """new (B, T, K, Q) into cached (B, K, capacity, Q), after what each row holds."""
        if self.alike and new.shape[1] == 1:
            cached[:, :, self.start] = new[:, 0]
            return
        if self.alike:
            cached[:, :, self.start : self.S] = new.swapaxes(1, 2)
            return
        for b, (start, count) in enumerate(zip(self.before, self.counts)):
            cached[b, :, start : start + count] = new[b, :count].swapaxes(0, 1)


def read(model: Model, tokens: Array, cache: KeyValueCache, counts: NDArray[np.int64], every: bool) -> Array:
    """Engine.logits: tokens (B, T), right-padded, of which counts[b] are new in row b -> logits (B, V) or (B, T, V)."""
    c, w = model.config, model.weights
    B, T = tokens.shape
    place = _Place(cache, counts, T)
    x = w["embedding.weight"][tokens]
    if c.position == "learned":
        x += w["position.weight"][place.positions]
    elif c.position == "sinusoidal":
        x += model.sinusoids[place.positions]
    bias = None
    if c.position == "alibi":
        K = c.n_kv_heads
        bias = alibi_bias(model.slopes, place.queries, np.arange(place.S)).reshape(-1, K, c.n_heads // K, T, place.S)
    x = x.reshape(B * T, c.d_model)
    for i in range(c.n_layers):
        x = _block(model, i, x, cache, place, bias)
    cache._lengths += counts
    if not every and T > 1:
        x = x[np.arange(B) * T + np.maximum(counts - 1, 0)]
    if c.norm_position == "pre":
        x = _norm(c, w, "norm", x)
    logits = _product(x, w["embedding.weight" if c.tie_embeddings else "head.weight"])
    return logits.reshape(B, T, -1) if every else logits


def _block(model: Model, i: int, x: Array, cache: KeyValueCache, place: _Place, bias: Array | None) -> Array:
    c, w = model.config, model.blocks[i]
    if c.norm_position == "pre":
        x = x + _attention(model, i, _norm(c, w, "attention_norm", x), cache, place, bias)
        x += _feedforward(model, w, _norm(c, w, "feedforward_norm", x))
        return x
    x = _norm(c, w, "attention_norm", x + _attention(model, i, x, cache, place, bias))
    return _norm(c, w, "feedforward_norm", x + _feedforward(model, w, x))


def _attention(model: Model, i: int, x: Array, cache: KeyValueCache, place: _Place, bias: Array | None) -> Array:
    """x (N, D) -> (N, D), N = B T; appends this layer's keys and values to the cache."""
    c, w = model.config, model.blocks[i]
    B, T = len(place.before), x.shape[0] // len(place.before)
    H, K, Q = c.n_heads, c.n_kv_heads, c.head_size
    qkv = _product(x, w["attention.qkv.weight"])
    if c.bias:
        qkv[:, : H * Q] += w["attention.q.bias"]
        qkv[:, (H + K) * Q :] += w["attention.v.bias"]
    heads = qkv.reshape(B, T, H + 2 * K, Q)
    qk = heads[:, :, : H + K]
    if c.qk_norm:
        qk = _rms(qk) * model.qk_gain(f"blocks.{i}.attention")
    if c.position == "rope":
        swapped = swap_halves(qk, np.empty_like(qk))
        swapped *= model.sin[place.positions]
        qk = qk * model.cos[place.positions]
        qk += swapped
    keys, values = cache.keys[i], cache.values[i]
    place.write(keys, qk[:, :, H:])
    place.write(values, heads[:, :, H + K :])
    q = qk[:, :, :H].reshape(B, T, K, H // K, Q).transpose(0, 2, 3, 1, 4)
    scores = q @ keys[:, :, None, : place.S].swapaxes(-1, -2)  # (B, K, G, T, S)
    scores *= 1 / math.sqrt(Q)
    if bias is not None:
        scores += bias
    if place.hidden is not None:
        scores[np.broadcast_to(place.hidden, scores.shape)] = -math.inf
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= np.add.reduce(scores, axis=-1, keepdims=True)
    mixed = scores @ values[:, :, None, : place.S]
    y = _product(mixed.transpose(0, 3, 1, 2, 4).reshape(B * T, H * Q), w["attention.o.weight"])
    if c.bias:
        y += w["attention.o.bias"]
    return y


def _feedforward(model: Model, w: dict[str, Array], x: Array) -> Array:
    c = model.config
    activation = ops.ACTIVATIONS[c.feedforward]
    h = _product(x, w["feedforward.gate_up.weight" if c.gated else "feedforward.up.weight"])
    if c.bias:
        h += w["feedforward.gate_up.bias" if c.gated else "feedforward.up.bias"]
    if c.gated:
        gates, values = h[:, : c.d_ff], h[:, c.d_ff :]
        h, _ = activation(gates, model.empty)
        h *= values
    else:
        h, _ = activation(h, model.empty)
    y = _product(h, w["feedforward.down.weight"])
    if c.bias:
        y += w["feedforward.down.bias"]
    return y


def _product(x: Array, w: Array) -> Array:
    """x (N, I), w (O, I) -> x wᵀ (N, O)."""
    if 1 < len(x) <= FEW_ROWS:
        return np.ascontiguousarray(w.dot(x.T).T)
    y: Array = x.dot(w.T)
    return y


def _norm(c: ModelConfig, w: Weights | dict[str, Array], name: str, x: Array) -> Array:
    if c.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = _rms(x)
    y *= w[f"{name}.weight"]
    if c.norm == "layernorm" and c.bias:
        y += w[f"{name}.bias"]
    return y


def _rms(x: Array) -> Array:
    if x.shape[0] == 1 and x.ndim == 2:  # one token at a time: arithmetic on a Python number is four times as quick
        square = float(np.vdot(x, x)) / x.shape[1]
        return x * (1 / math.sqrt(square + ops.EPS))
    scale = np.vecdot(x, x)[..., None]
    scale /= x.shape[-1]
    scale += ops.EPS
    unit: Array = x / np.sqrt(scale)
    return unit
