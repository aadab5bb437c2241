"""The forward pass without a way back: reading tokens into a cache of keys and values, many at once or one by one.

Nothing is kept for gradients, and rows may hold texts of different lengths. B rows, T new positions, S cached
positions, H query heads, K key-value heads, G = H / K, Q head size, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.numpy import ops
from glasslm.engines.numpy.attention import alibi_bias, swap_halves
from glasslm.engines.numpy.model import Model
from glasslm.engines.numpy.ops import Array


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


class _Place:
    """Where the new tokens stand, and which cached positions each of them may see."""

    def __init__(self, cache: KeyValueCache, counts: NDArray[np.int64], T: int) -> None:
        before, capacity = cache.lengths, cache.keys.shape[3]
        assert counts.max() <= T, "more tokens counted than given"
        assert (before + counts <= capacity).all(), "more tokens than the cache has room for"
        self.counts, self.before = counts, before
        # Rows that are alike (the usual case) are written and masked as one; then positions are (T,), else (B, T).
        self.alike = bool((before == before[0]).all() and (counts == T).all())
        self.S = int((before + counts).max())
        self.positions = before[0] + np.arange(T) if self.alike else before[:, None] + np.arange(T)
        self.positions = np.minimum(self.positions, capacity - 1)  # padding may point past the end
        self.keys = np.arange(self.S)
        self.hidden: NDArray[np.bool_] | None = None
        if T > 1 or not self.alike:
            later = self.keys > self.positions[..., None]
            self.hidden = later.reshape(-1, 1, 1, T, self.S)

    def write(self, cached: Array, new: Array) -> None:
        """new (B, T, K, Q) into cached (B, K, capacity, Q), after what each row holds."""
        if self.alike:
            start = int(self.before[0])
            cached[:, :, start : start + new.shape[1]] = new.swapaxes(1, 2)
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
        bias = alibi_bias(model.slopes, place.positions, place.keys).reshape(-1, K, c.n_heads // K, T, place.S)
    for i in range(c.n_layers):
        x = _block(model, i, x, cache, place, bias)
    cache._lengths += counts
    if not every:
        x = x[np.arange(B), np.maximum(counts - 1, 0)]
    if c.norm_position == "pre":
        x = _norm(model, "norm", x)
    logits: Array = x @ w["embedding.weight" if c.tie_embeddings else "head.weight"].T
    return logits


def _block(model: Model, i: int, x: Array, cache: KeyValueCache, place: _Place, bias: Array | None) -> Array:
    attention_norm, feedforward_norm = f"blocks.{i}.attention_norm", f"blocks.{i}.feedforward_norm"
    if model.config.norm_position == "pre":
        x = x + _attention(model, i, _norm(model, attention_norm, x), cache, place, bias)
        x += _feedforward(model, f"blocks.{i}.feedforward", _norm(model, feedforward_norm, x))
        return x
    x = _norm(model, attention_norm, x + _attention(model, i, x, cache, place, bias))
    return _norm(model, feedforward_norm, x + _feedforward(model, f"blocks.{i}.feedforward", x))


def _attention(model: Model, i: int, x: Array, cache: KeyValueCache, place: _Place, bias: Array | None) -> Array:
    """x (B, T, D) -> (B, T, D); appends this layer's keys and values to the cache."""
    c, w, prefix = model.config, model.weights, f"blocks.{i}.attention"
    B, T, _ = x.shape
    H, K, Q = c.n_heads, c.n_kv_heads, c.head_size
    qkv = x @ w[f"{prefix}.qkv.weight"].T
    if c.bias:
        qkv[..., : H * Q] += w[f"{prefix}.q.bias"]
        qkv[..., (H + K) * Q :] += w[f"{prefix}.v.bias"]
    heads = qkv.reshape(B, T, H + 2 * K, Q)
    qk = heads[:, :, : H + K]
    if c.qk_norm:
        qk = _rms(qk) * model.qk_gain(prefix)
    if c.position == "rope":
        swapped = swap_halves(qk, np.empty_like(qk))
        qk = qk * model.cos[place.positions] + swapped * model.sin[place.positions]
    keys, values = cache.keys[i], cache.values[i]
    place.write(keys, qk[:, :, H:])
    place.write(values, heads[:, :, H + K :])
    q = qk[:, :, :H].reshape(B, T, K, H // K, Q).transpose(0, 2, 3, 1, 4) * (1 / math.sqrt(Q))
    scores = q @ keys[:, :, None, : place.S].swapaxes(-1, -2)  # (B, K, G, T, S)
    if bias is not None:
        scores += bias
    if place.hidden is not None:
        scores[np.broadcast_to(place.hidden, scores.shape)] = -math.inf
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    mixed = scores @ values[:, :, None, : place.S]
    y: Array = mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H * Q) @ w[f"{prefix}.o.weight"].T
    if c.bias:
        y += w[f"{prefix}.o.bias"]
    return y


def _feedforward(model: Model, prefix: str, x: Array) -> Array:
    c, w = model.config, model.weights
    into = "gate_up" if c.gated else "up"
    h = x @ w[f"{prefix}.{into}.weight"].T
    if c.bias:
        h += w[f"{prefix}.{into}.bias"]
    activation = ops.ACTIVATIONS[c.feedforward]
    if c.gated:
        gates, values = h[..., : c.d_ff], h[..., c.d_ff :]
        opened, _ = activation(gates, model.empty)
        h = opened * values
    else:
        h, _ = activation(h, model.empty)
    y: Array = h @ w[f"{prefix}.down.weight"].T
    if c.bias:
        y += w[f"{prefix}.down.bias"]
    return y


def _norm(model: Model, name: str, x: Array) -> Array:
    gain = model.weights[f"{name}.weight"]
    if model.config.norm == "rmsnorm":
        return _rms(x) * gain
    y = _rms(x - x.mean(-1, keepdims=True)) * gain
    if model.config.bias:
        y += model.weights[f"{name}.bias"]
    return y


def _rms(x: Array) -> Array:
    scale = np.vecdot(x, x)[..., None]
    scale /= x.shape[-1]
    scale += ops.EPS
    unit: Array = x / np.sqrt(scale)
    return unit
