"""Causal self-attention: the projections of a block, and attention by fused kernels or explicitly.

Letters: B rows, T queries, S keys, D width, H query heads, K key-value heads, Q head size.
"""

from __future__ import annotations

import math
from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from glasslm.config.schema import AttentionName, ModelConfig
from glasslm.engines.choice import COMPILED_FUSED_MIN_LENGTH
from glasslm.engines.torch.kv_cache import CacheView
from glasslm.engines.torch.layers import (
    Replaceable,
    dropout_mask,
    is_compiling_for_cpu,
    make_head_norm,
    make_linear,
    soft_cap,
    upcast,
)
from glasslm.engines.torch.operations import TensorOperation

QUERY_TILES = 4  # in explicit attention: keys that no query of a tile attends to are skipped


class SiteDropout(NamedTuple):
    """Dropout at one site: a fraction p of each row's elements, chosen by the row's key."""

    p: float
    keys: Tensor  # (B,)


class AttentionContext(NamedTuple):
    """The positions, masks and dropout of attention, the same in all blocks of one kind."""

    rotation: tuple[Tensor, Tensor] | None  # RoPE's cos and sin, (T, 1, R) or (B, T, 1, R) each
    # ALiBi's addend to the scores, (H, T, S) or (B, H, T, S), -inf where a key is masked
    bias: Tensor | None
    # (1, T, S) or (B, 1, T, S), True where a key is masked; None: the causal mask, or no mask
    hidden_mask: Tensor | None
    causal: bool  # whether `hidden_mask` None means the causal mask
    # The algorithm for a whole text; None: fused kernels, for queries that attend to a cache
    algorithm: AttentionName | None = None
    window: int = 0
    dropout: SiteDropout | None = None  # of the attention probabilities
    starts: Tensor | None = None  # (B, T) first positions of the tokens' documents; None: no mask
    softcap: float = 0.0  # limit of the scores; 0: none


class Attention(Replaceable):
    """The attention sublayer of block `layer`."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, c.head_size
        self.heads, self.kv_heads = c.n_heads, c.n_kv_heads
        HQ, KQ = c.n_heads * c.head_size, c.n_kv_heads * c.head_size
        self.query_factor, self.softcap = c.query_factor, c.attention_softcap
        biased = c.biased_modules
        self.q = make_linear(c, "q", c.d_model, HQ, bias="q" in biased)
        self.k = make_linear(c, "k", c.d_model, KQ, bias="k" in biased)
        self.v = make_linear(c, "v", c.d_model, KQ, bias="v" in biased)
        self.q_norm, self.k_norm = make_head_norm(c), make_head_norm(c)
        self.o = make_linear(c, "o", HQ, c.d_model, bias="o" in biased)

    def forward(
        self, x: Tensor, context: AttentionContext, view: CacheView | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). With a view, the keys and values are added to its cache."""
        B, T, _ = x.shape
        q, k, v = self.project_heads(x, context)
        if (replaced := self.operations.get("attention")) is not None:
            y = self._attend_to_whole_texts(replaced, q, k, v, view)
            return self.o(y.reshape(B, T, -1))
        if view is not None:
            k, v = view.extend(self.layer, k, v)
        softmax = self.operations.get("softmax")
        context = context._replace(softcap=self.softcap)
        if view is None or view.row_keys is None:
            y = attention(q, k, v, context, softmax)
        else:
            y = row_by_row_attention(q, k, v, context, view.row_keys, softmax)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))

    def _attend_to_whole_texts(
        self,
        replaced: TensorOperation,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: CacheView | None,
    ) -> Tensor:
        """Attention of a file: q (B, H, T, Q), k and v (B, K, T, Q) -> (B, T, H, Q).

        With a view it gets the whole texts so far, and the output of the new tokens is returned.
        """
        if view is not None:
            q = view.extend_queries(self.layer, q)
            k, v = view.extend(self.layer, k, v)
        y = replaced(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        if view is None:
            return y
        if view.positions.dim() == 1:
            return y[:, view.positions]
        return y.take_along_dim(view.positions[:, :, None, None], 1)

    def project_heads(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> queries (B, H, T, Q), keys and values (B, K, T, Q)."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.heads, self.head_size)
        k = self.k(x).view(B, T, self.kv_heads, self.head_size)
        v = self.v(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            replaced = self.operations.get("rope")
            q, k = (rotate(heads, *context.rotation, replaced) for heads in (q, k))
        if self.query_factor != 1:
            q = q * self.query_factor
        return q.transpose(1, 2), k.transpose(1, 2), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor, replaced: TensorOperation | None = None) -> Tensor:
    """The pairs (j, j + R / 2) of x (B, T, heads, Q), rotated by RoPE: (B, T, heads, Q).

    cos and sin (T, 1, R) or (B, T, 1, R); sin is negative in the first half, and the dimensions
    after R are not rotated. arXiv:2104.09864, with halves as in Hugging Face's Llama. `replaced`
    computes it with cos and sin (T, R / 2).
    """
    R = cos.shape[-1]
    if x.shape[-1] != R:
        return torch.cat([rotate(x[..., :R], cos, sin, replaced), x[..., R:]], -1)
    if replaced is not None:
        half = x.shape[-1] // 2
        cos, sin = (table[..., 0, half:].to(x.dtype) for table in (cos, sin))
        if cos.dim() == 2:
            return replaced(x, cos, sin)
        return torch.cat([replaced(x[b : b + 1], cos[b], sin[b]) for b in range(len(x))])
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([second, first], -1) * sin).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: AttentionContext,
    softmax: TensorOperation | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(Q) + bias) v: q (B, H, T, Q), k and v (B, K, S, Q) -> (B, H, T, Q).

    `softmax`, of a file, takes the place of PyTorch's.
    """
    if context.softcap:  # no fused kernel has it
        return attention_with_softmax(q, k, v, context, lambda scores: torch.softmax(scores, -1))
    if softmax is not None:
        return attention_with_softmax(q, k, v, context, softmax)
    match context.algorithm:
        case "plain":
            explicit = True
        case "auto":
            # The fused kernel takes no mask that all rows share: it would keep the weights, too.
            has_mask = context.bias is not None or context.hidden_mask is not None
            needs_weights = has_mask and context.starts is None
            is_short = q.size(2) < COMPILED_FUSED_MIN_LENGTH
            explicit = is_compiling_for_cpu(q) and (is_short or needs_weights)
        case "flash" | None:
            explicit = False
        case _:
            assert_never(context.algorithm)
    if explicit or context.dropout is not None:
        return explicit_attention(q, k, v, context)
    mask = None
    if context.bias is not None:
        mask = context.bias.to(q.dtype)
    elif context.hidden_mask is not None:
        mask = ~context.hidden_mask
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=context.causal and mask is None,
        enable_gqa=q.size(1) != k.size(1),
    )


def row_by_row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: AttentionContext,
    row_keys: list[tuple[int, int]],
    softmax: TensorOperation | None = None,
) -> Tensor:
    """`attention` of a single query in each row b to the first n of its keys, for (b, n) in turn.

    q (B, H, 1, Q), k and v (B, K, S, Q) -> (B, H, 1, Q); 0 in the other rows.
    """
    y = torch.zeros_like(q)
    for b, n in row_keys:
        row = slice(b, b + 1)
        bias = None if context.bias is None else context.bias[row, ..., :n]
        hidden_mask = context.hidden_mask
        if hidden_mask is not None:
            is_masked = 0 < context.window < n or context.starts is not None
            hidden_mask = hidden_mask[row, ..., :n] if is_masked else None
        row_context = context._replace(bias=bias, hidden_mask=hidden_mask)
        y[row] = attention(q[row], k[row, :, :n], v[row, :, :n], row_context, softmax)
    return y


def attention_with_softmax(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, softmax: TensorOperation
) -> Tensor:
    """`attention` from its definition; the softmax gets -inf for hidden keys."""
    H, T, Q = q.shape[1:]
    S = k.size(2)
    k, v = (x.repeat_interleave(H // x.size(1), 1) for x in (k, v))
    scores = upcast((q * Q**-0.5) @ k.mT)
    if context.softcap:
        scores = soft_cap(scores, context.softcap)
    if context.bias is not None:
        scores = scores + context.bias
    if context.hidden_mask is not None:
        scores = scores.masked_fill(context.hidden_mask, -math.inf)
    elif context.causal:
        position = torch.arange(T, device=q.device)
        scores = scores.masked_fill(_hidden_mask(position, position, 0, None), -math.inf)
    p = softmax(scores)
    if context.dropout is not None:
        element = torch.arange(H * T * S, device=q.device).view(H, T, S)
        p = p * dropout_mask(element, context.dropout.p, context.dropout.keys, p.dtype)
    return p.to(v.dtype) @ v


def scores_and_weights(
    q: Tensor, k: Tensor, context: AttentionContext, softmax: TensorOperation | None = None
) -> tuple[Tensor, Tensor]:
    """The scores q kᵀ / sqrt(Q) and their softmax, of a whole text, for inspection.

    q (B, H, T, Q), k (B, K, T, Q) -> scores without bias, -inf where a key is masked, and weights
    with it, (B, H, T, T) each.
    """
    H, T, Q = q.shape[1:]
    scores = upcast(q @ k.repeat_interleave(H // k.size(1), 1).mT) * Q**-0.5
    if context.softcap:
        scores = soft_cap(scores, context.softcap)
    position = torch.arange(T, device=q.device)
    hidden_mask = _hidden_mask(position, position, context.window, context.starts)
    scores = scores.masked_fill(hidden_mask, -math.inf)
    biased = scores if context.bias is None else scores + context.bias
    return scores, softmax(biased) if softmax is not None else torch.softmax(biased, -1)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """`attention` of a whole text (S = T) from its definition, a tile of queries at a time.

    It computes dropout, and compiled for a CPU it is faster than the fused kernels for short texts.
    q (B, H, T, Q), k and v (B, K, T, Q) -> (B, H, T, Q).
    """
    H, T, Q = q.shape[1:]
    if k.size(1) != H:
        k, v = (x.repeat_interleave(H // k.size(1), 1) for x in (k, v))
    position = torch.arange(T, device=q.device)
    outputs = []
    for start in range(0, T, step := math.ceil(T / QUERY_TILES)):
        end = min(start + step, T)
        # The keys that some query of this tile attends to.
        keys = slice(max(0, start - context.window + 1) if context.window else 0, end)
        scores = upcast((q[:, :, start:end] * Q**-0.5) @ k[:, :, keys].mT)
        if context.bias is not None:
            scores = scores + context.bias[..., start:end, keys]
        starts = None if context.starts is None else context.starts[:, start:end]
        hidden_mask = _hidden_mask(position[start:end], position[keys], context.window, starts)
        # The mask is added: the gradient of a sum needs no mask, that of masked scores does.
        scores = scores + torch.zeros_like(hidden_mask, dtype=scores.dtype).masked_fill(
            hidden_mask, -math.inf
        )
        p = torch.softmax(scores, -1)
        if context.dropout is not None:
            head = torch.arange(H, device=q.device)[:, None, None]
            element = (head * T + position[start:end, None]) * T + position[keys]
            p = p * dropout_mask(element, context.dropout.p, context.dropout.keys, p.dtype)
        outputs.append(p.to(v.dtype) @ v[:, :, keys])
    return torch.cat(outputs, 2)


def _hidden_mask(queries: Tensor, keys: Tensor, window: int, starts: Tensor | None) -> Tensor:
    """(T, S), True where a key is after its query or before its window (0: no window).

    queries (T,) and keys (S,) are positions. With starts (B, T), keys before the document of their
    query are hidden, too: (B, 1, T, S).
    """
    offsets = keys - queries[:, None]
    hidden_mask = (offsets > 0) | (offsets <= -window) if window else offsets > 0
    return hidden_mask if starts is None else hidden_mask | (keys < starts[:, None, :, None])
