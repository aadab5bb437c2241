"""Causal self-attention in PyTorch: the projections and positions, the softmax, and the cache of keys and values.

Letters: B rows, T positions, S keys, D width, H query heads, K key-value heads, Q head size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasslm.config.schema import AttentionName, ModelConfig
from glasslm.engines.torch.kv_cache import Reading
from glasslm.engines.torch.layers import RMSNorm, compiled_on_cpu, dropout_mask, linear, widened

TILES = 4  # of queries, when attention is written out: keys that no query of a tile sees are not computed at all


class Drop(NamedTuple):
    """Dropout at one site: a share p of the elements of each row, chosen by the row's key (B,)."""

    p: float
    keys: Tensor


class Place(NamedTuple):
    """Where the T new tokens of each row stand, and what they may see."""

    rotation: tuple[Tensor, Tensor] | None  # cos and sin (T, 1, Q) or (B, T, 1, Q), with rope
    bias: (
        Tensor | None
    )  # (H, T, S) or (B, H, T, S), what alibi adds to the scores, -inf where a key is hidden
    # (1, T, S) or (B, 1, T, S), True where a key is hidden; None: those after the query, or none of them
    hidden: Tensor | None
    causal: bool  # whether `hidden` None means that the keys after a query are hidden
    way: AttentionName | None = (
        None  # how to compute it over a whole text; None: over a cache, by the fused kernels
    )
    window: int = 0
    drop: Drop | None = None  # of the attention probabilities


class Attention(nn.Module):
    """The attention sublayer of block `layer`."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_size = (
            layer,
            c.n_heads,
            c.n_kv_heads,
            c.head_size,
        )
        HQ, KQ = c.n_heads * c.head_size, c.n_kv_heads * c.head_size
        self.q = linear(c, "q", c.d_model, HQ, bias=c.bias)
        self.k = linear(c, "k", c.d_model, KQ)  # softmax does not see a bias of the keys
        self.v = linear(c, "v", c.d_model, KQ, bias=c.bias)
        self.q_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else None
        self.o = linear(c, "o", HQ, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, place: Place, reading: Reading | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        B, T, _ = x.shape
        q, k, v = self.heads_of(x, place)
        if reading is not None:
            k, v = reading.extend(self.layer, k, v)
        y = attention(q, k, v, place)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))

    def heads_of(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> queries (B, H, T, Q), keys and values (B, K, T, Q)."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.heads, self.head_size)
        k = self.k(x).view(B, T, self.kv_heads, self.head_size)
        v = self.v(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if place.rotation is not None:
            q, k = rotated(q, *place.rotation), rotated(k, *place.rotation)
        return q.transpose(1, 2), k.transpose(1, 2), v


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, Q): the pairs (j, j + Q / 2) rotated. arXiv:2104.09864; halves as in Hugging Face's Llama."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([second, first], -1) * sin).to(
        x.dtype
    )  # sin is negative in the first half


def attention(q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
    """q (B, H, T, Q), k and v (B, K, S, Q) -> softmax(q kᵀ / sqrt(Q) + bias) v, (B, H, T, Q)."""
    if (
        place.drop is not None
        or place.way == "plain"
        or (place.way == "auto" and compiled_on_cpu(q))
    ):
        return written_out(q, k, v, place)
    mask = None
    if place.bias is not None:
        mask = place.bias.to(q.dtype)
    elif place.hidden is not None:
        mask = ~place.hidden
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=place.causal and mask is None,
        enable_gqa=q.size(1) != k.size(1),
    )


def scores_and_weights(q: Tensor, k: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """What `attention` goes by, to be looked at: q kᵀ / sqrt(Q), -inf where a key is hidden, and its softmax with bias.

    q (B, H, T, Q), k (B, K, T, Q) -> (B, H, T, T) each.
    """
    H, T, Q = q.shape[1:]
    scores = widened(q @ k.repeat_interleave(H // k.size(1), 1).mT) * Q**-0.5
    position = torch.arange(T, device=q.device)
    ahead = position - position[:, None]
    hidden = (ahead > 0) | (ahead <= -place.window) if place.window else ahead > 0
    scores = scores.masked_fill(hidden, -math.inf)
    return scores, torch.softmax(scores if place.bias is None else scores + place.bias, -1)


def written_out(q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
    """The same of a whole text (S = T), for dropout, and for CPUs, where it is faster once it is compiled."""
    H, T, Q = q.shape[1:]
    if k.size(1) != H:
        k, v = (x.repeat_interleave(H // k.size(1), 1) for x in (k, v))
    position = torch.arange(T, device=q.device)
    parts = []
    for start in range(0, T, step := math.ceil(T / TILES)):
        end = min(start + step, T)
        seen = slice(
            max(0, start - place.window + 1) if place.window else 0, end
        )  # by some query of this tile
        scores = widened((q[:, :, start:end] * Q**-0.5) @ k[:, :, seen].mT)
        if place.bias is not None:
            scores = scores + place.bias[..., start:end, seen]
        ahead = position[seen] - position[start:end, None]
        hidden = (ahead > 0) | (ahead <= -place.window) if place.window else ahead > 0
        # Added, because the gradient of a sum needs no mask, which the gradient of masked scores would.
        scores = scores + torch.zeros_like(hidden, dtype=scores.dtype).masked_fill(
            hidden, -math.inf
        )
        p = torch.softmax(scores, -1)
        if place.drop is not None:
            head = torch.arange(H, device=q.device)[:, None, None]
            element = (head * T + position[start:end, None]) * T + position[seen]
            p = p * dropout_mask(element, place.drop.p, place.drop.keys, p.dtype)
        parts.append(p.to(v.dtype) @ v[:, :, seen])
    return torch.cat(parts, 2)
