"""The forward pass without a way back: reading tokens into a cache of keys and values, many at once or one by one.

Nothing is kept for gradients, and rows may hold texts of different lengths. B rows, T new positions, S cached
positions, H query heads, K key-value heads, G = H / K, Q head size, D width, V vocabulary.

One token at a time, calls cost as much as computing: hence `dot`, half a microsecond quicker than `@`, for products.
OpenBLAS is slow with few rows and quick with few columns: hence a product of a handful of rows is turned round.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.cache_slots import Slots
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.attention import alibi_bias
from glasslm.engines.numpy.model import Model
from glasslm.engines.numpy.moe import mixture
from glasslm.engines.numpy.ops import Array
from glasslm.engines.numpy.weights import Weights

FEW_ROWS = 128


class KeyValueCache:
    """Keys and values of every layer, (layers, rows, K, size, Q) each, of up to `capacity` tokens a row.

    Of a model that rolls only the newest of a window are kept, and when the whole window fits, a text has no end.
    """

    def __init__(self, c: ModelConfig, rows: int, capacity: int, dtype: Any) -> None:
        self.size = c.cache_length(capacity)
        self.endless = c.rolling and c.window <= capacity
        self.keys = np.zeros((c.n_layers, rows, c.n_kv_heads, self.size, c.head_size), dtype)
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
        view.keys, view.values, view._lengths = (
            self.keys[:, rows],
            self.values[:, rows],
            self._lengths[rows],
        )
        return view


class _Place:
    """Where the new tokens stand, and which of the cached ones each of them may see: the same in every layer."""

    def __init__(
        self, model: Model, cache: KeyValueCache, counts: NDArray[np.int64], T: int
    ) -> None:
        c = model.config
        self.slots = slots = Slots(cache._lengths, counts, T, cache.size)
        assert cache.endless or slots.end <= cache.size, "more tokens than the cache has room for"
        self.positions = slice(slots.start, slots.end) if slots.alike else slots.queries
        self.rotation = model.rotation(self.positions)
        if self.rotation:
            cos, sin = self.rotation
            self.rotation = cos, sin.reshape(*sin.shape[:-1], 2, -1)
        self.bias = self.hidden = None
        if c.position == "alibi":
            heads = (c.n_kv_heads, c.n_heads // c.n_kv_heads)
            self.bias = alibi_bias(model.slopes, slots.queries, slots.keys).reshape(
                -1, *heads, T, slots.seen
            )
        if T > 1 or not slots.alike or 0 < c.window < slots.seen:
            ahead = slots.keys[..., None, :] - slots.queries[..., None]
            hidden = (ahead > 0) | (slots.keys[..., None, :] < 0)
            if c.window:
                hidden |= ahead <= -c.window
            if not slots.alike:
                hidden &= (counts > 0)[
                    :, None, None
                ]  # a row that reads nothing may hold nothing to look at
            self.hidden = hidden.reshape(-1, 1, 1, T, slots.seen)

    def extend(self, cached: Array, new: Array) -> Array:
        """new (B, T, K, Q) written into cached (B, K, size, Q); those that are looked at, (B, K, S, Q)."""
        slots, write = self.slots, self.slots.write
        looked_at = cached[:, :, : slots.seen]  # a view, in which the new ones will be
        if slots.beside is not None:
            looked_at = np.concatenate([cached[:, :, : slots.beside], new.swapaxes(1, 2)], 2)
        if not isinstance(write, slice):
            rows, columns, places = write
            cached[rows, :, places] = new[rows, columns]
        elif slots.T == 1:
            cached[:, :, write.start] = new[:, 0]
        else:
            cached[:, :, write] = new.swapaxes(1, 2)
        return looked_at


def read(
    model: Model, tokens: Array, cache: KeyValueCache, counts: NDArray[np.int64], every: bool
) -> Array:
    """Engine.logits: tokens (B, T), right-padded, of which counts[b] are new in row b -> logits (B, V) or (B, T, V)."""
    c, w = model.config, model.weights
    B, T = tokens.shape
    place = _Place(model, cache, counts, T)
    x = w["embedding.weight"][tokens]
    if c.scale_embeddings:
        x *= math.sqrt(c.d_model)
    if c.position == "learned":
        x += w["position.weight"][place.positions]
    elif c.position == "sinusoidal":
        x += model.sinusoids[place.positions]
    x = x.reshape(B * T, c.d_model)
    for i in range(c.n_layers):
        x = _block(model, i, x, cache, place)
    cache._lengths += counts
    if not every and T > 1:
        x = x[np.arange(B) * T + np.maximum(counts - 1, 0)]
    if c.norm_position == "pre":
        x = _norm(c, w, "norm", x)
    logits = _product(x, w["embedding.weight" if c.tie_embeddings else "head.weight"])
    return logits.reshape(B, T, -1) if every else logits


def _block(model: Model, i: int, x: Array, cache: KeyValueCache, place: _Place) -> Array:
    c, w, B = model.config, model.blocks[i], len(x) // place.slots.T
    if c.norm_position == "pre":
        x = x + _attention(model, i, _norm(c, w, "attention_norm", x), cache, place)
        x += _feedforward(model, i, _norm(c, w, "feedforward_norm", x), B)
        return x
    x = _norm(c, w, "attention_norm", x + _attention(model, i, x, cache, place))
    return _norm(c, w, "feedforward_norm", x + _feedforward(model, i, x, B))


def _attention(model: Model, i: int, x: Array, cache: KeyValueCache, place: _Place) -> Array:
    """x (N, D) -> (N, D), N = B T; appends this layer's keys and values to the cache."""
    c, T = model.config, place.slots.T
    B = len(x) // T
    H, K, Q = c.n_heads, c.n_kv_heads, c.head_size
    qkv = _linear(model, i, "attention.qkv", x)
    heads = qkv.reshape(B, T, H + 2 * K, Q)
    qk = heads[:, :, : H + K]
    if c.qk_norm:
        qk = _rms(qk, c.norm_eps) * model.qk_gain(f"blocks.{i}.attention")
    if place.rotation:
        cos, sin = place.rotation
        halves = qk.reshape(B, T, H + K, 2, Q // 2)
        qk = qk * cos
        qk += (halves[..., ::-1, :] * sin).reshape(qk.shape)
    keys = place.extend(cache.keys[i], qk[:, :, H:])
    values = place.extend(cache.values[i], heads[:, :, H + K :])
    q = qk[:, :, :H].reshape(B, T, K, H // K, Q).transpose(0, 2, 3, 1, 4)
    scores = q @ keys[:, :, None].swapaxes(-1, -2)  # (B, K, G, T, S)
    scores *= 1 / math.sqrt(Q)
    if place.bias is not None:
        scores += place.bias
    if place.hidden is not None:
        scores[np.broadcast_to(place.hidden, scores.shape)] = -math.inf
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= np.add.reduce(scores, axis=-1, keepdims=True)
    mixed = scores @ values[:, :, None]
    return _linear(model, i, "attention.o", mixed.transpose(0, 3, 1, 2, 4).reshape(B * T, H * Q))


def _feedforward(model: Model, i: int, x: Array, B: int) -> Array:
    """x (N, D) -> (N, D), N = B T."""
    c = model.config
    if not c.n_experts:
        return _mlp(model, i, "feedforward", x)

    def expert(number: int) -> Callable[[Array], tuple[Array, Any]]:
        return lambda x: (_mlp(model, i, f"feedforward.experts.{number}", x) if len(x) else x, None)

    logits = _linear(model, i, "feedforward.router", x)
    y, _, _ = mixture(
        x, logits, [expert(e) for e in range(c.n_experts)], c.experts_per_token, B, model.empty
    )
    if c.shared_expert:
        y += _mlp(model, i, "feedforward.shared", x)
    return y


def _mlp(model: Model, i: int, prefix: str, x: Array) -> Array:
    c = model.config
    activation = ops.ACTIVATIONS[c.feedforward]
    if c.gated:
        h = _linear(model, i, f"{prefix}.gate_up", x)
        gates, values = h[:, : c.d_ff], h[:, c.d_ff :]
        h, _ = activation(gates, model.empty)
        h *= values
    else:
        h, _ = activation(_linear(model, i, f"{prefix}.up", x), model.empty)
    return _linear(model, i, f"{prefix}.down", h)


def _linear(model: Model, i: int, name: str, x: Array) -> Array:
    """x (N, I) -> (N, O): a matrix of block i, or a stack of some, with the biases and adapters of its parts."""
    c, w = model.config, model.weights
    y = _product(x, model.blocks[i][f"{name}.weight"])
    if c.bias or c.lora_rank:
        for part, columns in w.parts(f"blocks.{i}.{name}.weight"):
            if f"{part}.bias" in w.rows:
                y[:, columns] += w[f"{part}.bias"]
            if f"{part}.lora_a" in w.rows:
                inner = _product(x, w[f"{part}.lora_a"])
                inner *= c.lora_alpha / c.lora_rank
                y[:, columns] += _product(inner, w[f"{part}.lora_b"])
    return y


def _product(x: Array, w: Array) -> Array:
    """x (N, I), w (O, I) -> x wᵀ (N, O)."""
    if 1 < len(x) <= FEW_ROWS:
        return np.ascontiguousarray(w.dot(x.T).T)
    y: Array = x.dot(w.T)
    return y


def _norm(c: ModelConfig, w: Weights | dict[str, Array], name: str, x: Array) -> Array:
    if c.norm == "none":
        return x
    if c.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = _rms(x, c.norm_eps)
    y *= w[f"{name}.weight"]
    if c.norm == "layernorm" and c.bias:
        y += w[f"{name}.bias"]
    return y


def _rms(x: Array, eps: float) -> Array:
    if (
        x.shape[0] == 1 and x.ndim == 2
    ):  # one token at a time: arithmetic on a Python number is four times as quick
        square = float(np.vdot(x, x)) / x.shape[1]
        return x * (1 / math.sqrt(square + eps))
    scale = np.vecdot(x, x)[..., None]
    scale /= x.shape[-1]
    scale += eps
    unit: Array = x / np.sqrt(scale)
    return unit
