"""The transformer in PyTorch: tokens to logits. Autograd computes the gradients.

The modules are named so that the parameters have the names of the table (model/parameters.py).
Letters: B rows, T positions, S keys, D width, H heads, Q head size, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import assert_never

import numpy as np
import torch
from torch import Tensor, nn

from glasslm.config.schema import LayerKind, ModelConfig
from glasslm.engines import dropout as sites
from glasslm.engines.documents import end_token
from glasslm.engines.torch.attention import Attention, AttentionContext, SiteDropout
from glasslm.engines.torch.kv_cache import CacheView
from glasslm.engines.torch.layers import (
    ACTIVATIONS,
    Embedding,
    Linear,
    Replaceable,
    apply_to_rows,
    dropout,
    make_linear,
    make_norm,
    soft_cap,
)
from glasslm.engines.torch.moe import MixtureOfExperts, Routing
from glasslm.engines.torch.operations import BUILT_IN, Operations
from glasslm.engines.torch.positions import POSITIONS

# Rows of dropout keys that a block receives: those of its own sites start at place 0.
BLOCK_SITES = sites.AFTER_FEEDFORWARD + 1


class Transformer(nn.Module):
    """The model. `dtype` is the type of the activations; the weights may be wider."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        dtype: torch.dtype,
        operations: Operations = BUILT_IN,
    ) -> None:
        super().__init__()
        self.config, self.dtype = (c := config), dtype
        table_dtype = np.float64 if dtype == torch.float64 else np.float32
        self.embedding = Embedding(vocab_size, c.d_model)
        self.position = POSITIONS[c.position](c, table_dtype)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        if c.has_final_norm:
            self.norm = make_norm(c)
        if not c.tie_embeddings:
            self.head = Linear(c.d_model, vocab_size, bias="head" in c.biased_modules)
        self.operations = operations
        for name, module in self.named_modules():
            if operations and isinstance(module, Replaceable):
                module.operations = operations.at(name)

    def forward(self, tokens: Tensor, keys: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """tokens (B, T) -> logits (B, T, V), and the routing of each layer with experts.

        keys (sites, B): the row keys of dropout, in training only.
        """
        x, routings = self.hidden_states(tokens, keys)
        return self.logits(x), routings

    def hidden_states(
        self, tokens: Tensor, keys: Tensor | None = None, view: CacheView | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """tokens (B, T) -> the input of the head, (B, T, D), and the routings.

        keys (sites, B) as in `forward`. With a view, the tokens follow those in its cache.
        """
        c, T = self.config, tokens.shape[1]
        x = self.embedding(tokens)
        if c.scale_embeddings:
            x = x * math.sqrt(c.d_model)
        x = self.position.add_to(x, slice(T) if view is None else view.positions)
        x = _drop(x.to(self.dtype), c, keys, sites.EMBEDDING_SITE)
        contexts = self._attention_contexts(tokens, view)
        routings = []
        for layer, block in enumerate(self.blocks):
            first = sites.site_number(layer, 0)
            block_keys = None if keys is None else keys[first : first + BLOCK_SITES]
            x, routing = block(x, contexts[c.layer_kind(layer)], block_keys, view)
            if routing is not None:
                routings.append(routing)
        return self.norm(x) if c.has_final_norm else x, routings

    def readout(self, stream: Tensor) -> Tensor:
        """Residual streams (..., D) -> logits (..., V), as the output of the last block is read."""
        return self.logits(self.norm(stream) if self.config.has_final_norm else stream)

    def logits(self, x: Tensor) -> Tensor:
        """The output of `hidden_states`, (..., D) -> logits (..., V)."""
        c = self.config
        head = self.embedding if c.tie_embeddings else self.head
        if (replaced := self.operations.at("head").get("linear")) is not None:
            logits = apply_to_rows(replaced, x, head.weight.to(x.dtype))
        else:
            logits = torch.nn.functional.linear(x, head.weight.to(x.dtype))
        if isinstance(head, Linear) and head.bias is not None:
            logits = logits + head.bias.to(x.dtype)
        return soft_cap(logits, c.logit_softcap) if c.logit_softcap else logits

    def _attention_contexts(
        self, tokens: Tensor, view: CacheView | None
    ) -> dict[LayerKind, AttentionContext]:
        """The rotation, mask and bias of new tokens (B, T), by the kind of layer."""
        text = torch.arange(tokens.shape[1], device=self.embedding.weight.device)
        queries, keys = (text, text) if view is None else (view.positions, view.key_positions)
        starts = self._document_starts(tokens) if view is None else view.starts
        return {
            kind: self._attention_context(kind, queries, keys, starts, view)
            for kind in self.config.layer_kinds
        }

    def _attention_context(
        self,
        kind: LayerKind,
        queries: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        view: CacheView | None,
    ) -> AttentionContext:
        """The context of one kind of layer: queries (T,) or (B, T), keys (S,) or (B, S)."""
        c, T, S = self.config, queries.shape[-1], keys.shape[-1]
        window = c.kind_window(kind)
        # No mask is needed for a single token that attends to every key, nor for a whole text
        # without a window, where the kernels have a causal mode.
        unmasked = (
            (T == 1 or S == T)
            and not 0 < window < S
            and (view is None or view.start is not None or view.row_keys is not None)
            and starts is None
        )
        hidden_mask = bias = None
        if self.position.has_bias or not unmasked:
            offsets = (keys[..., None, :] - queries[..., None])[..., None, :, :]
            hidden_mask = (offsets > 0) | (keys < 0)[..., None, None, :]
            if window:
                hidden_mask = hidden_mask | (offsets <= -window)
            if starts is not None:
                is_other = keys[..., None, :] < starts[..., None]  # of another document
                hidden_mask = hidden_mask | is_other[:, None]
            bias = self.position.bias(offsets)
            if bias is not None:
                bias = bias.masked_fill(hidden_mask, -math.inf)
        rotation = self.position.rotation(
            kind,
            slice(T) if view is None else view.positions,
            np.arange(T) if view is None else view.cpu_positions,
        )
        algorithm = c.attention if view is None else None
        causal = T > 1 and unmasked
        return AttentionContext(
            rotation, bias, hidden_mask, causal, algorithm, window, starts=starts
        )

    def _document_starts(self, tokens: Tensor) -> Tensor | None:
        """(B, T): engines/documents.py's document_starts, of tokens (B, T), on the device."""
        end = end_token(self.config)
        if end is None:
            return None
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where(tokens == end, positions, 0).cummax(1).values


class Block(nn.Module):
    """Attention and feed-forward, each with its norm and its residual connection.

    In training no computation depends on the layer, so that one compiled block serves all.
    """

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = c
        self.attention_norm, self.attention = make_norm(c), Attention(c, layer)
        if c.residual != "parallel_one_norm":
            self.feedforward_norm = make_norm(c)
        if c.norm_position == "sandwich":
            self.attention_output_norm = make_norm(c)
            self.feedforward_output_norm = make_norm(c)
        self.feedforward = (
            MixtureOfExperts(c, partial(FeedForward, c)) if c.n_experts else FeedForward(c)
        )

    def forward(
        self, x: Tensor, context: AttentionContext, keys: Tensor | None, view: CacheView | None
    ) -> tuple[Tensor, Routing | None]:
        """x (B, T, D) -> (B, T, D), and the routing, if the block has experts.

        keys (BLOCK_SITES, B): the row keys of dropout, in training only.
        """
        c = self.config
        if keys is not None and c.attention_dropout:
            context = context._replace(
                dropout=SiteDropout(c.attention_dropout, keys[sites.PROBABILITIES])
            )

        def attend(x: Tensor) -> Tensor:
            y = _drop(self.attention(x, context, view), c, keys, sites.AFTER_ATTENTION)
            return self.attention_output_norm(y) if c.norm_position == "sandwich" else y

        def feed(x: Tensor) -> tuple[Tensor, Routing | None]:
            y, routing = self.feedforward(x) if c.n_experts else (self.feedforward(x), None)
            y = _drop(y, c, keys, sites.AFTER_FEEDFORWARD)
            return self.feedforward_output_norm(y) if c.norm_position == "sandwich" else y, routing

        if not c.has_final_norm:
            x = self.attention_norm(x + attend(x))
            y, routing = feed(x)
            return self.feedforward_norm(x + y), routing
        h = self.attention_norm(x)
        match c.residual:
            case "serial":
                x = x + attend(h)
                h = self.feedforward_norm(x)
            case "parallel":
                x, h = x + attend(h), self.feedforward_norm(x)
            case "parallel_one_norm":
                x = x + attend(h)
            case _:
                assert_never(c.residual)
        y, routing = feed(h)
        return x + y, routing


class FeedForward(Replaceable):
    """The feed-forward sublayer, or one expert of a mixture."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.activation, bias = ACTIVATIONS[c.feedforward], "mlp" in c.biased_modules
        self.gate = make_linear(c, "gate", c.d_model, c.d_ff, bias=bias) if c.is_gated else None
        self.up = make_linear(c, "up", c.d_model, c.d_ff, bias=bias)
        self.down = make_linear(c, "down", c.d_ff, c.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        if self.gate is None:
            return self.down(self._activate(self.up(x)))
        return self.down(self._activate(self.gate(x)) * self.up(x))

    def _activate(self, x: Tensor) -> Tensor:
        if (replaced := self.operations.get(self.activation.__name__)) is not None:
            return apply_to_rows(replaced, x)
        return self.activation(x)


def _drop(x: Tensor, c: ModelConfig, keys: Tensor | None, site: int) -> Tensor:
    return x if keys is None or not c.dropout else dropout(x, c.dropout, keys[site])
