"""The transformer in PyTorch: tokens to logits; autograd does the rest.

The modules are named so that the parameters have the names of the table (parameters.py): no prefix, nothing to map.
Letters: B rows, T positions, D width, H heads, Q head size, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glasslm.config.schema import ModelConfig
from glasslm.engines import dropout as sites
from glasslm.engines.positions import alibi_slopes, rope_at, sinusoids
from glasslm.engines.torch.attention import Attention, Drop, Place
from glasslm.engines.torch.kv_cache import Reading
from glasslm.engines.torch.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    dropout,
    linear,
)
from glasslm.engines.torch.moe import Mixture, Routing
from glasslm.model.parameters import STD

SITES = (
    sites.AFTER_FEEDFORWARD + 1
)  # rows of dropout keys that a block is handed: its own, from place 0 on


class Transformer(nn.Module):
    """`dtype` is that of the activations; the weights may be wider."""

    cos: Tensor
    sin: Tensor
    sinusoids: Tensor
    slopes: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = (c := config), dtype
        self.embedding = Embedding(vocab_size, c.d_model)
        if c.position == "learned":
            self.position = Embedding(c.block_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        if c.norm_position == "pre":  # in post position every block already ends in a norm
            self.norm = _norm(c)
        if not c.tie_embeddings:
            self.head = Linear(c.d_model, vocab_size, bias=False)
        self._make_tables()

    def _make_tables(self) -> None:
        """What positions need and no checkpoint holds; the very numbers of the other engine."""
        c, exact = self.config, self._exact
        tables: dict[str, np.ndarray] = {}
        if c.position == "rope":
            tables["cos"], tables["sin"] = self._rotation_at(np.arange(c.block_size))
        elif c.position == "sinusoidal":
            tables["sinusoids"] = sinusoids(c.block_size, c.d_model, STD, exact)
        elif c.position == "alibi":
            tables["slopes"] = alibi_slopes(c.n_heads, exact)
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    @property
    def _exact(self) -> type[np.floating[Any]]:
        return np.float64 if self.dtype == torch.float64 else np.float32

    def forward(self, tokens: Tensor, keys: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """tokens (B, T) -> logits (B, T, V), and what the router of each layer did, if there are any.

        keys (sites, B): the row keys of dropout, in training.
        """
        x, routings = self.hidden(tokens, keys)
        return self.logits(x), routings

    def hidden(
        self, tokens: Tensor, keys: Tensor | None = None, reading: Reading | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """tokens (B, T) -> what the head reads, (B, T, D). `reading`: where the tokens go in a cache."""
        c, T = self.config, tokens.shape[1]
        x = self.embedding(tokens)
        if c.scale_embeddings:
            x = x * math.sqrt(c.d_model)
        where = slice(T) if reading is None else reading.positions
        if c.position == "learned":
            x = x + self.position.weight[where]
        elif c.position == "sinusoidal":
            x = x + self.sinusoids[where]
        x = _dropped(x.to(self.dtype), c, keys, sites.EMBEDDING_SITE)
        place = self._place(T, reading)
        routings = []
        for layer, block in enumerate(self.blocks):
            first = sites.site(layer, 0)
            x, routing = block(
                x, place, None if keys is None else keys[first : first + SITES], reading
            )
            if routing is not None:
                routings.append(routing)
        return self.norm(x) if c.norm_position == "pre" else x, routings

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        head = self.embedding if self.config.tie_embeddings else self.head
        return torch.nn.functional.linear(x, head.weight.to(x.dtype))

    def _place(self, T: int, reading: Reading | None) -> Place:
        """Where the tokens stand and which keys they see, the same in every block."""
        c = self.config
        whole = torch.arange(T, device=self.embedding.weight.device)
        queries, keys = (whole, whole) if reading is None else (reading.positions, reading.keys)
        S = keys.shape[-1]
        # A single token that sees every key needs no mask, and kernels know that of a text without a window.
        unmasked = (
            (T == 1 or S == T)
            and not 0 < c.window < S
            and (reading is None or reading.start is not None)
        )
        hidden = bias = None
        if c.position == "alibi" or not unmasked:
            ahead = (keys[..., None, :] - queries[..., None])[..., None, :, :]
            hidden = (ahead > 0) | (keys < 0)[..., None, None, :]
            if c.window:
                hidden = hidden | (ahead <= -c.window)
            if c.position == "alibi":
                bias = (self.slopes[:, None, None] * ahead).masked_fill(hidden, -math.inf)
        way = c.attention if reading is None else None
        return Place(self._rotation(T, reading), bias, hidden, T > 1 and unmasked, way, c.window)

    def _rotation(self, T: int, reading: Reading | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin (T, 1, Q) or (B, T, 1, Q), if it is rope: from a table up to the context, made beyond it."""
        if self.config.position != "rope":
            return None
        numbers = np.arange(T) if reading is None else reading.numbers
        if numbers.max() < self.config.block_size:
            where = slice(T) if reading is None else reading.positions
            return self.cos[where], self.sin[where]
        cos, sin = (torch.from_numpy(table).to(self.cos) for table in self._rotation_at(numbers))
        return cos, sin

    def _rotation_at(self, positions: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        c = self.config
        return rope_at(
            positions, 1, c.head_size, self._exact, c.rope_scaling, c.rope_factor, c.rope_base
        )


class Block(nn.Module):
    """Attention and feed-forward, each with its norm and its residual connection.

    Nothing that is computed in training depends on which block it is, so that all are compiled as one.
    """

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = c
        self.attention_norm, self.attention = _norm(c), Attention(c, layer)
        self.feedforward_norm = _norm(c)
        self.feedforward = Mixture(c, partial(FeedForward, c)) if c.n_experts else FeedForward(c)

    def forward(
        self, x: Tensor, place: Place, keys: Tensor | None, reading: Reading | None
    ) -> tuple[Tensor, Routing | None]:
        """x (B, T, D) -> (B, T, D), and what the router did, if there is one."""
        c = self.config
        if keys is not None and c.attention_dropout:
            place = place._replace(drop=Drop(c.attention_dropout, keys[sites.PROBABILITIES]))

        def attend(x: Tensor) -> Tensor:
            return _dropped(self.attention(x, place, reading), c, keys, sites.AFTER_ATTENTION)

        def feed(x: Tensor) -> tuple[Tensor, Routing | None]:
            y, routing = self.feedforward(x) if c.n_experts else (self.feedforward(x), None)
            return _dropped(y, c, keys, sites.AFTER_FEEDFORWARD), routing

        if c.norm_position == "pre":
            x = x + attend(self.attention_norm(x))
            y, routing = feed(self.feedforward_norm(x))
            return x + y, routing
        x = self.attention_norm(x + attend(x))
        y, routing = feed(x)
        return self.feedforward_norm(x + y), routing


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[c.feedforward]
        self.gate = linear(c, "gate", c.d_model, c.d_ff, bias=c.bias) if c.gated else None
        self.up = linear(c, "up", c.d_model, c.d_ff, bias=c.bias)
        self.down = linear(c, "down", c.d_ff, c.d_model, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def _norm(c: ModelConfig) -> nn.Module:
    if c.norm == "none":
        return nn.Identity()
    return (
        RMSNorm(c.d_model, c.norm_eps)
        if c.norm == "rmsnorm"
        else LayerNorm(c.d_model, c.norm_eps, c.bias)
    )


def _dropped(x: Tensor, c: ModelConfig, keys: Tensor | None, site: int) -> Tensor:
    return x if keys is None or not c.dropout else dropout(x, c.dropout, keys[site])
