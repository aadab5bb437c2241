"""The transformer in PyTorch: tokens to logits; autograd does the rest.

The modules are named so that the parameters have the names of the table (parameters.py): no prefix, nothing to map.
Letters: B rows, T positions, D width, H heads, Q head size, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from glasslm.config import ModelConfig
from glasslm.engines import dropout as sites
from glasslm.engines.numpy.attention import alibi_slopes, rope_tables, sinusoids
from glasslm.engines.torch.attention import Attention, Drop, Place, Reading
from glasslm.engines.torch.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, RMSNorm, dropout
from glasslm.parameters import STD

SITES = sites.AFTER_FEEDFORWARD + 1  # rows of dropout keys that a block is handed: its own, from place 0 on


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
        c, exact = self.config, np.float64 if self.dtype == torch.float64 else np.float32
        tables: dict[str, np.ndarray] = {}
        if c.position == "rope":
            tables["cos"], tables["sin"] = rope_tables(c.block_size, 1, c.head_size, exact)
        elif c.position == "sinusoidal":
            tables["sinusoids"] = sinusoids(c.block_size, c.d_model, STD, exact)
        elif c.position == "alibi":
            tables["slopes"] = alibi_slopes(c.n_heads, exact)
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def forward(self, tokens: Tensor, keys: Tensor | None = None, reading: Reading | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V).

        keys (sites, B): the row keys of dropout, in training. `reading`: where the tokens go in a cache.
        """
        x = self.hidden(tokens, keys, reading)
        return self.logits(x)

    def hidden(self, tokens: Tensor, keys: Tensor | None = None, reading: Reading | None = None) -> Tensor:
        """tokens (B, T) -> what the head reads, (B, T, D)."""
        c, T = self.config, tokens.shape[1]
        x = self.embedding(tokens)
        where = slice(T) if reading is None else reading.positions
        if c.position == "learned":
            x = x + self.position.weight[where]
        elif c.position == "sinusoidal":
            x = x + self.sinusoids[where]
        x = _dropped(x.to(self.dtype), c, keys, sites.EMBEDDING_SITE)
        place = self._place(T, reading)
        for layer, block in enumerate(self.blocks):
            first = sites.site(layer, 0)
            x = block(x, place, None if keys is None else keys[first : first + SITES], reading)
        return self.norm(x) if c.norm_position == "pre" else x

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        head = self.embedding if self.config.tie_embeddings else self.head
        return torch.nn.functional.linear(x, head.weight.to(x.dtype))

    def _place(self, T: int, reading: Reading | None) -> Place:
        c, device = self.config, self.embedding.weight.device
        where = slice(T) if reading is None else reading.positions
        rotation = (self.cos[where], self.sin[where]) if c.position == "rope" else None
        causal = T > 1 and (reading is None or reading.start == 0)
        hidden = bias = None
        if c.position == "alibi" or (not causal and T > 1) or (reading is not None and reading.start is None):
            queries = torch.arange(T, device=device) if reading is None else reading.positions
            ahead = torch.arange(T if reading is None else reading.S, device=device) - queries[..., None]
            hidden = (ahead > 0)[..., None, :, :]
            if c.position == "alibi":
                bias = self.slopes[:, None, None] * ahead[..., None, :, :]
                bias = bias.masked_fill(hidden, -math.inf)
        return Place(rotation, bias, None if reading is None else hidden, causal)


class Block(nn.Module):
    """Attention and feed-forward, each with its norm and its residual connection.

    Nothing that is computed in training depends on which block it is, so that all are compiled as one.
    """

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = c
        self.attention_norm, self.attention = _norm(c), Attention(c, layer)
        self.feedforward_norm, self.feedforward = _norm(c), FeedForward(c)

    def forward(self, x: Tensor, place: Place, keys: Tensor | None, reading: Reading | None) -> Tensor:
        c = self.config
        if keys is not None and c.attention_dropout:
            place = place._replace(drop=Drop(c.attention_dropout, keys[sites.PROBABILITIES]))

        def attend(x: Tensor) -> Tensor:
            return _dropped(self.attention(x, place, reading), c, keys, sites.AFTER_ATTENTION)

        def feed(x: Tensor) -> Tensor:
            return _dropped(self.feedforward(x), c, keys, sites.AFTER_FEEDFORWARD)

        if c.norm_position == "pre":
            x = x + attend(self.attention_norm(x))
            return x + feed(self.feedforward_norm(x))
        x = self.attention_norm(x + attend(x))
        return self.feedforward_norm(x + feed(x))


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[c.feedforward]
        self.gate = Linear(c.d_model, c.d_ff, bias=c.bias) if c.gated else None
        self.up = Linear(c.d_model, c.d_ff, bias=c.bias)
        self.down = Linear(c.d_ff, c.d_model, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def _norm(c: ModelConfig) -> nn.Module:
    return RMSNorm(c.d_model) if c.norm == "rmsnorm" else LayerNorm(c.d_model, bias=c.bias)


def _dropped(x: Tensor, c: ModelConfig, keys: Tensor | None, site: int) -> Tensor:
    return x if keys is None or not c.dropout else dropout(x, c.dropout, keys[site])
