"""Causal self-attention in PyTorch: the projections and positions, the softmax, and the cache of keys and values.

Letters: B rows, T positions, S keys, D width, H query heads, K key-value heads, Q head size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from glasslm.config import ModelConfig
from glasslm.engines.torch.layers import Linear, RMSNorm, dropout_mask, widened

if TYPE_CHECKING:
    from glasslm.engines.torch.model import Transformer

TILES = 4  # of queries, when attention is written out: keys after a tile's last query are not computed at all


class Drop(NamedTuple):
    """Dropout at one site: a share p of the elements of each row, chosen by the row's key (B,)."""

    p: float
    keys: Tensor


class Place(NamedTuple):
    """Where the T new tokens of each row stand, and what they may see."""

    rotation: tuple[Tensor, Tensor] | None  # cos and sin (T, 1, Q) or (B, T, 1, Q), with rope
    bias: Tensor | None  # (H, T, S) or (B, H, T, S), what alibi adds to the scores, -inf where a key is hidden
    # (1, T, S) or (B, 1, T, S), True where a key is hidden; None: those after the query, or none of them
    hidden: Tensor | None
    causal: bool  # whether `hidden` None means that the keys after a query are hidden
    drop: Drop | None = None  # of the attention probabilities


class KeyValueCache:
    """Keys and values of every layer, (layers, rows, K, capacity + 1, Q) each; padding is written into the last place.

    Where the rows stand is known on the CPU, so that no step waits for the device.
    """

    def __init__(self, model: Transformer, rows: int, capacity: int) -> None:
        c = model.config
        shape = (c.n_layers, rows, c.n_kv_heads, capacity + 1, c.head_size)
        self.model = model  # whose keys and values these are
        self.keys = torch.zeros(shape, device=model.embedding.weight.device, dtype=model.dtype)
        self.values = torch.zeros_like(self.keys)
        self.capacity = capacity
        self._lengths = np.zeros(rows, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths.copy()

    def clear(self, row: int) -> None:
        self._lengths[row] = 0

    def reading(self, counts: NDArray[np.int64], T: int) -> Reading:
        """Make room for counts[b] tokens in each row b, the first of T that are given."""
        before = self._lengths
        S = int((before + counts).max())
        assert self.capacity >= S, "more tokens than the cache has room for"
        alike = bool((before == before[0]).all() and (counts == T).all())
        positions = before[:, None] + np.arange(T)
        places = np.where(np.arange(T) < counts[:, None], positions, self.capacity)
        positions = np.minimum(positions, max(S - 1, 0))  # those of padding may be anything that has a row in a table
        self._lengths = before + counts
        device = self.keys.device
        return Reading(
            self,
            start=int(before[0]) if alike else None,
            S=S,
            positions=torch.from_numpy(positions[0] if alike else positions).to(device),
            places=torch.from_numpy(places).to(device),
        )


class Reading(NamedTuple):
    """One call that reads new tokens into a cache."""

    cache: KeyValueCache
    start: int | None  # where all rows stand alike, that place
    S: int  # keys in the longest row, with the new ones
    positions: Tensor  # (T,) or (B, T)
    places: Tensor  # (B, T) where to write each token

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values (B, K, T, Q) written; all of them so far, (B, K, S, Q)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.start is not None:
            keys[:, :, self.start : self.S] = k
            values[:, :, self.start : self.S] = v
        else:
            rows = torch.arange(len(self.places), device=keys.device)[:, None]
            keys[rows, :, self.places] = k.transpose(1, 2)
            values[rows, :, self.places] = v.transpose(1, 2)
        return keys[:, :, : self.S], values[:, :, : self.S]


class Attention(nn.Module):
    """The attention sublayer of block `layer`."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_size = layer, c.n_heads, c.n_kv_heads, c.head_size
        HQ, KQ = c.n_heads * c.head_size, c.n_kv_heads * c.head_size
        self.q = Linear(c.d_model, HQ, bias=c.bias)
        self.k = Linear(c.d_model, KQ, bias=False)  # softmax does not see a bias of the keys
        self.v = Linear(c.d_model, KQ, bias=c.bias)
        self.q_norm = RMSNorm(c.head_size) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_size) if c.qk_norm else None
        self.o = Linear(HQ, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, place: Place, reading: Reading | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.heads, self.head_size)
        k = self.k(x).view(B, T, self.kv_heads, self.head_size)
        v = self.v(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if place.rotation is not None:
            q, k = rotated(q, *place.rotation), rotated(k, *place.rotation)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if reading is not None:
            k, v = reading.extend(self.layer, k, v)
        y = attention(q, k, v, place)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, Q): the pairs (j, j + Q / 2) rotated. arXiv:2104.09864; halves as in Hugging Face's Llama."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([second, first], -1) * sin).to(x.dtype)  # sin is negative in the first half


def attention(q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
    """q (B, H, T, Q), k and v (B, K, S, Q) -> softmax(q kᵀ / sqrt(Q) + bias) v, (B, H, T, Q)."""
    on_cpu = q.device.type == "cpu"
    if place.drop is not None or (on_cpu and place.hidden is None and torch.compiler.is_compiling()):
        return written_out(q, k, v, place)
    mask = None
    if place.bias is not None:
        mask = place.bias.to(q.dtype)
    elif place.hidden is not None:
        mask = ~place.hidden
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=place.causal and mask is None, enable_gqa=q.size(1) != k.size(1)
    )


def written_out(q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
    """The same of a whole text (S = T), for dropout, and for CPUs, where it is faster once it is compiled."""
    H, T, Q = q.shape[1:]
    if k.size(1) != H:
        k, v = (x.repeat_interleave(H // k.size(1), 1) for x in (k, v))
    position = torch.arange(T, device=q.device)
    parts = []
    for start in range(0, T, step := math.ceil(T / TILES)):
        end = min(start + step, T)
        scores = widened((q[:, :, start:end] * Q**-0.5) @ k[:, :, :end].mT)
        if place.bias is not None:
            scores = scores + place.bias[..., start:end, :end]
        later = position[:end] > position[start:end, None]
        # Added, because the gradient of a sum needs no mask, which the gradient of masked scores would.
        scores = scores + torch.zeros_like(later, dtype=scores.dtype).masked_fill(later, -math.inf)
        p = torch.softmax(scores, -1)
        if place.drop is not None:
            head = torch.arange(H, device=q.device)[:, None, None]
            element = (head * T + position[start:end, None]) * T + position[:end]
            p = p * dropout_mask(element, place.drop.p, place.drop.keys, p.dtype)
        parts.append(p.to(v.dtype) @ v[:, :, :end])
    return torch.cat(parts, 2)
