"""Inference: the forward pass with a KV cache, nothing kept for backward.

Rows may hold texts of different lengths. B rows, T new positions, N = B T, S keys, H query heads,
K key-value heads, G = H / K, Q head size, D width, I and O input and output of a matrix,
V vocabulary.

With one token at a time, a call of NumPy costs as much as its arithmetic: hence `dot`, which is
half a microsecond faster than `@`, for products. OpenBLAS is slow for few rows and fast for few
columns: hence a product of a few rows is computed transposed, or by column_pieces.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.cache_slots import CacheSlots
from glasslm.engines.documents import continued_starts
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.attention import attention
from glasslm.engines.numpy.inference_norms import FAST_NORMS, divide_by_rms
from glasslm.engines.numpy.key_blocks import KeyBlocks, attend_by_blocks, fit_positions
from glasslm.engines.numpy.kv_cache import KVCache
from glasslm.engines.numpy.model import Model
from glasslm.engines.numpy.moe import mixture
from glasslm.engines.numpy.ops import Array
from glasslm.engines.numpy.positions import dense_bias
from glasslm.engines.numpy.soft_cap import cap_scores

MAX_TRANSPOSED_ROWS = 128  # up to so many rows, a product is faster transposed


class AttentionContext:
    """The positions of the new tokens, and which keys each of them attends to, for every layer."""

    def __init__(
        self, model: Model, cache: KVCache, counts: NDArray[np.int64], tokens: Array
    ) -> None:
        c, T = model.config, tokens.shape[1]
        starts = continued_starts(c, tokens, cache._lengths, counts, cache._last_starts)
        self.slots = slots = CacheSlots(cache._lengths, counts, T, cache.size)
        assert cache.is_unbounded or slots.end <= cache.size, (
            "more tokens than the cache has room for"
        )
        self.positions = slice(slots.start, slots.end) if slots.uniform else slots.query_positions
        self.rotations = {
            kind: rotation(self.positions) for kind, rotation in model.rotations.items()
        }
        self.softmax = model.operations.softmax
        has_own_attention = self.softmax is not None or model.operations.replaces_attention
        self.blocks = None
        self.key_count, key_positions = slots.key_count, slots.key_positions
        if T == 1 and len(tokens) > 1 and not has_own_attention:
            n_keys = np.where(counts > 0, np.minimum(slots.lengths + counts, cache.size), 0)
            self.blocks = KeyBlocks(n_keys.tolist(), cache.block_size)
            self.key_count = self.blocks.key_count
            key_positions = fit_positions(key_positions, self.key_count)
        self.bias = None
        bias = dense_bias(model.bias, slots.query_positions, key_positions)
        if bias is not None:
            K, G = c.n_kv_heads, c.n_heads // c.n_kv_heads
            self.bias = bias.reshape(-1, K, G, T, self.key_count)
        if starts is not None:
            cache._last_starts[...] = starts[:, -1]
        self.hidden_masks = {
            kind: self._hidden_mask(c.kind_window(kind), key_positions, counts, starts)
            for kind in model.layer_kinds
        }
        self.softcap, self.new = c.attention_softcap, model.empty

    def _hidden_mask(
        self,
        window: int,
        key_positions: NDArray[np.int64],
        counts: NDArray[np.int64],
        starts: NDArray[np.int64] | None,
    ) -> Array | None:
        """(1 or B, 1, 1, T, S), True where a key is hidden; None where every key is visible."""
        slots, S = self.slots, self.key_count
        if not (slots.T > 1 or len(counts) > 1 or 0 < window < S or starts is not None):
            return None
        keys = key_positions[..., None, :]
        offset = keys - slots.query_positions[..., None]
        hidden_mask = (offset > 0) | (keys < 0)
        if window:
            hidden_mask |= offset <= -window
        if starts is not None:
            hidden_mask = hidden_mask | (keys < starts[..., None])
        if not slots.uniform:
            # A row that reads nothing may have no visible key: then none of its keys is hidden.
            hidden_mask &= (counts > 0)[:, None, None]
        return hidden_mask.reshape(-1, 1, 1, slots.T, S)

    def extend(self, cached: Array, new: Array) -> Array:
        """Write new (B, T, K, Q) into cached (B, K, size, Q); the visible keys (B, K, S, Q).

        Overwrites cached. The result may be a view of it. Values are extended like keys.
        """
        slots, index = self.slots, self.slots.write_index
        visible = cached[:, :, : self.key_count]  # a view, which the new ones are written into
        if slots.prefix is not None:
            visible = np.concatenate([cached[:, :, : slots.prefix], new.swapaxes(1, 2)], 2)
        if not isinstance(index, slice):
            rows, columns, write_slots = index
            cached[rows, :, write_slots] = new[rows, columns]
        elif slots.T == 1:
            cached[:, :, index.start] = new[:, 0]
        else:
            cached[:, :, index] = new.swapaxes(1, 2)
        return visible


def read_tokens(
    model: Model, tokens: Array, cache: KVCache, counts: NDArray[np.int64], every: bool
) -> Array:
    """Engine.logits: tokens (B, T), right-padded, counts (B,) -> logits (B, V) or (B, T, V).

    Row b reads its first counts[b] tokens. Overwrites the cache.
    """
    c, w = model.config, model.weights
    B, T = tokens.shape
    ctx = AttentionContext(model, cache, counts, tokens)
    if embed := model.operations.replaced.get("embedding"):
        x = embed(tokens.reshape(-1), w["embedding.weight"], model.empty)[0].reshape(B, T, -1)
    else:
        x = w["embedding.weight"][tokens]
    if c.scale_embeddings:
        x *= math.sqrt(c.d_model)
    if model.position_vectors is not None:
        x += model.position_vectors[ctx.positions]
    x = x.reshape(B * T, c.d_model)
    for i in range(c.n_layers):
        x = _block(model, i, x, cache, ctx)
    cache._lengths += counts
    if not every and T > 1:
        x = x[np.arange(B) * T + np.maximum(counts - 1, 0)]
    if c.has_final_norm:
        x = _norm(model, w.arrays, "norm", x)
    logits = _product(model, x, w["embedding.weight" if c.tie_embeddings else "head.weight"])
    if "head.bias" in w.arrays:
        logits += w["head.bias"]
    if c.logit_softcap:
        cap_scores(logits, c.logit_softcap)
    return logits.reshape(B, T, -1) if every else logits


def _block(model: Model, i: int, x: Array, cache: KVCache, ctx: AttentionContext) -> Array:
    """x (N, D) -> (N, D)."""
    c, weights, B = model.config, model.blocks[i], len(x) // ctx.slots.T
    if not c.has_final_norm:
        x = _norm(model, weights, "attention_norm", x + _attention(model, i, x, cache, ctx))
        return _norm(model, weights, "feedforward_norm", x + _feedforward(model, i, x, B))
    h = _norm(model, weights, "attention_norm", x)
    attended = _output_norm(model, weights, "attention", _attention(model, i, h, cache, ctx))
    match c.residual:
        case "serial":
            x = x + attended
            h = _norm(model, weights, "feedforward_norm", x)
        case "parallel":
            h = _norm(model, weights, "feedforward_norm", x)
            x = x + attended
        case "parallel_one_norm":
            x = x + attended
        case _:
            assert_never(c.residual)
    x += _output_norm(model, weights, "feedforward", _feedforward(model, i, h, B))
    return x


def _output_norm(model: Model, weights: dict[str, Array], sublayer: str, y: Array) -> Array:
    """The norm of a sublayer's output y (N, D), where the config has one."""
    if model.config.norm_position != "sandwich":
        return y
    return _norm(model, weights, f"{sublayer}_output_norm", y)


def _attention(model: Model, i: int, x: Array, cache: KVCache, ctx: AttentionContext) -> Array:
    """x (N, D) -> (N, D); appends the keys and values of this layer to the cache."""
    c, T = model.config, ctx.slots.T
    B = len(x) // T
    H, K, Q = c.n_heads, c.n_kv_heads, c.head_size
    qkv = _linear(model, i, "attention.qkv", x)
    heads = qkv.reshape(B, T, H + 2 * K, Q)
    qk = heads[:, :, : H + K]
    if c.qk_norm:
        qk = _qk_norm(model, i, qk)
    kind = c.layer_kind(i)
    if rotation := ctx.rotations.get(kind):
        qk = _rotate(model, qk, rotation)
    if c.query_factor != 1:
        qk[:, :, :H] *= c.query_factor
    if model.operations.replaced and model.operations.replaces_attention:
        mixed = _whole_attention(model, i, qk, heads[:, :, H + K :], cache, ctx)
        return _linear(model, i, "attention.o", mixed.reshape(B * T, H * Q))
    keys = ctx.extend(cache.keys[i], qk[:, :, H:])
    values = ctx.extend(cache.values[i], heads[:, :, H + K :])
    q = qk[:, :, :H].reshape(B, T, K, H // K, Q).transpose(0, 2, 3, 1, 4)
    mixed = attend(q, keys, values, ctx, ctx.hidden_masks[kind])
    return _linear(model, i, "attention.o", mixed.transpose(0, 3, 1, 2, 4).reshape(B * T, H * Q))


def attend(
    q: Array, keys: Array, values: Array, ctx: AttentionContext, hidden_mask: Array | None
) -> Array:
    """q (B, K, G, T, Q), keys and values (B, K, S, Q) -> (B, K, G, T, Q)."""
    if ctx.blocks is not None:
        assert hidden_mask is not None
        return attend_by_blocks(q, keys, values, ctx.blocks, ctx.bias, hidden_mask, ctx.softcap)
    keys, values = keys[:, :, None].swapaxes(-1, -2), values[:, :, None]
    scores = q @ keys  # (B, K, G, T, S)
    scores *= 1 / math.sqrt(q.shape[-1])
    if ctx.softcap:
        cap_scores(scores, ctx.softcap)
    if ctx.bias is not None:
        scores += ctx.bias
    if hidden_mask is not None:
        scores[np.broadcast_to(hidden_mask, scores.shape)] = -math.inf
    if ctx.softmax is not None:
        return ctx.softmax(scores) @ values
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    mixed = scores @ values
    mixed /= np.add.reduce(scores, axis=-1, keepdims=True)
    return mixed


def _qk_norm(model: Model, i: int, qk: Array) -> Array:
    """Queries and keys (B, T, H + K, Q), each head normalized."""
    prefix, H, eps = f"blocks.{i}.attention", model.config.n_heads, model.config.norm_eps
    if norm := model.operations.replaced.get("rms_norm"):
        return norm(qk, model.qk_gain(prefix), model.empty, eps)[0]
    unit = divide_by_rms(qk, eps)
    unit[:, :, :H] *= model.head_gain(prefix, "q")
    unit[:, :, H:] *= model.head_gain(prefix, "k")
    return unit


def _rotate(model: Model, qk: Array, rotation: tuple[Array, Array]) -> Array:
    """Queries and keys (B, T, H + K, Q), their first R dimensions rotated by cos and sin."""
    cos, sin = rotation
    R = cos.shape[-1]
    if qk.shape[-1] == R:
        return _rotate_whole(model, qk, cos, sin)
    return np.concatenate([_rotate_whole(model, qk[..., :R], cos, sin), qk[..., R:]], -1)


def _rotate_whole(model: Model, x: Array, cos: Array, sin: Array) -> Array:
    """x (B, T, heads, R), rotated by RoPE."""
    if apply_rope := model.operations.replaced.get("rope"):
        if cos.ndim == 3:
            return apply_rope(x, cos, sin, model.empty)[0]
        rows = [apply_rope(x[b : b + 1], cos[b], sin[b], model.empty)[0] for b in range(len(x))]
        return np.concatenate(rows)
    B, T, heads, R = x.shape
    halves = x.reshape(B, T, heads, 2, R // 2)
    x = x * cos
    x += (halves[..., ::-1, :] * sin.reshape(*sin.shape[:-1], 2, -1)).reshape(x.shape)
    return x


def _whole_attention(
    model: Model, i: int, qk: Array, v: Array, cache: KVCache, ctx: AttentionContext
) -> Array:
    """Attention of a file, over the whole texts so far; returns the new tokens' (B, T, H, Q).

    qk (B, T, H + K, Q), v (B, T, K, Q). A row's slots after its last token hold numbers that no
    causal attention lets its tokens see.
    """
    H = model.config.n_heads
    q, k, v = (
        ctx.extend(cached[i], new).swapaxes(1, 2)
        for cached, new in (
            (cache.queries, qk[:, :, :H]),
            (cache.keys, qk[:, :, H:]),
            (cache.values, v),
        )
    )
    heads = np.concatenate([q, k], axis=2)
    out, _ = model.operations(attention)(heads, v, None, None, model.empty)
    if ctx.slots.uniform:
        return out[:, ctx.slots.start : ctx.slots.end]
    return np.take_along_axis(out, ctx.slots.query_positions[:, :, None, None], 1)


def _feedforward(model: Model, i: int, x: Array, B: int) -> Array:
    """x (N, D) -> (N, D)."""
    c, N = model.config, len(x)
    if not c.n_experts:
        return _mlp(model, i, "feedforward", x)

    def expert(e: int) -> Callable[[Array], tuple[Array, Any]]:
        return lambda x: (_expert(model, i, e, x, len(x) if B < N else B), None)

    logits = _linear(model, i, "feedforward.router", x)
    experts = [expert(e) for e in range(c.n_experts)]
    y, _, _ = mixture(x, logits, experts, c.experts_per_token, B, model.empty)
    if c.shared_expert:
        y += _mlp(model, i, "feedforward.shared", x)
    return y


def _expert(model: Model, i: int, e: int, x: Array, rows: int) -> Array:
    """x (n, D) -> (n, D), computed as a product of `rows` rows, at least n.

    With single tokens, n depends on the texts of the other rows of the cache: their number must not
    change the rounding.
    """
    if not len(x):
        return x
    padded = np.zeros((rows, x.shape[1]), x.dtype)
    padded[: len(x)] = x
    return _mlp(model, i, f"feedforward.experts.{e}", padded)[: len(x)]


def _mlp(model: Model, i: int, prefix: str, x: Array) -> Array:
    """x (N, D) -> (N, D), with the same activations as in training."""
    c = model.config
    activation = model.operations(ops.ACTIVATIONS[c.feedforward])
    if c.is_gated:
        h = _linear(model, i, f"{prefix}.gate_up", x)
        gates, values = h[:, : c.d_ff], h[:, c.d_ff :]
        h, _ = activation(gates, model.empty)
        h *= values
    else:
        h, _ = activation(_linear(model, i, f"{prefix}.up", x), model.empty)
    return _linear(model, i, f"{prefix}.down", h)


def _linear(model: Model, i: int, name: str, x: Array) -> Array:
    """x (N, I) -> (N, O): a matrix or a stack of block i, with biases and adapters of its parts."""
    c, w = model.config, model.weights
    y = _product(model, x, model.blocks[i][f"{name}.weight"])
    if model.adds_to_products:
        for part, columns in w.parts(f"blocks.{i}.{name}.weight"):
            if f"{part}.bias" in w.arrays:
                y[:, columns] += w[f"{part}.bias"]
            if f"{part}.lora_a" in w.arrays:
                inner = _product(model, x, w[f"{part}.lora_a"])
                inner *= c.lora_alpha / c.lora_rank
                y[:, columns] += _product(model, inner, w[f"{part}.lora_b"])
    return y


def _product(model: Model, x: Array, w: Array) -> Array:
    """x (N, I), w (O, I) -> x wᵀ (N, O)."""
    replaced = model.operations.replaced  # usually empty, and this is called for each product
    if replaced and "linear" in replaced:
        return replaced["linear"](x, w, model.empty)[0]
    if model.pieces is not None and len(x) > 1:
        return model.pieces.product(x, w)
    if 1 < len(x) <= MAX_TRANSPOSED_ROWS:
        return np.ascontiguousarray(w.dot(x.T).T)
    y: Array = x.dot(w.T)
    return y


def _norm(model: Model, weights: dict[str, Array], name: str, x: Array) -> Array:
    """x (N, D) -> (N, D): the norm of the config, with the weights `name` of `weights`.

    A norm without a faster form in FAST_NORMS is the op of training, and so is each norm of a model
    with operations of a file.
    """
    c = model.config
    if c.norm in FAST_NORMS and not model.operations.replaced:
        return FAST_NORMS[c.norm](x, weights, name, c.norm_eps)
    op, words = ops.NORMS[c.norm]
    parameters = (weights.get(f"{name}.{word}") for word in words)
    y, _ = model.operations(op)(x, *parameters, model.empty, c.norm_eps)
    return y
