"""The transformer by hand: tokens to logits, and the gradient of the logits to the gradients of all weights.

Letters: B rows, T positions, N = B T, D width, H query heads, K key-value heads, Q head size, F inner width, V
vocabulary. Activations are (N, D); attention sees them as (B, T, heads, Q).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines import dropout as sites
from glasslm.engines.choice import attends_by_tiles
from glasslm.engines.inspection import GRADIENT
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.attention import alibi_bias, attention, rope, scores_and_weights
from glasslm.engines.numpy.flash import flash_attention
from glasslm.engines.numpy.moe import Routing, in_few_sizes, mixture
from glasslm.engines.numpy.ops import Array, New
from glasslm.engines.numpy.weights import Weights
from glasslm.engines.positions import alibi_slopes, rope_at, sinusoids
from glasslm.model.parameters import STD

Gradients = dict[str, Array]
Backward = Callable[
    [Array, Gradients], Array
]  # takes d_output, writes weights' gradients, returns d_input
Sublayer = Callable[[Array], tuple[Array, Backward]]


class Look:
    """Copies of what is computed under some names, those of engines/inspection.py."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.found: dict[str, Array] = {}

    def at(self, name: str, array: Array, shape: tuple[int, ...] | None = None) -> None:
        if name in self.names:
            self.found[name] = array.reshape(shape or array.shape).copy()


@dataclass(frozen=True)
class Pass:
    """What one forward pass is about, beside weights and input."""

    B: int
    T: int
    new: New
    dropout_keys: Callable[[int], NDArray[np.uint32]] | None  # site -> (B,); None: no dropout
    penalties: tuple[
        float, float
    ]  # of each sequence's and layer's balance and router z-loss, in the gradient
    routings: list[Routing]  # what the routers did so far, layer by layer
    bias: Array | None  # (H, T, T) of the scores
    rotation: tuple[Array, Array] | None  # cos and sin (T, H + K, Q)
    look: Look | None  # what is looked at on the way

    def show(self, name: str, x: Array) -> None:
        """x (N, any) to whoever looks, as (B, T, any); an expert's, of the tokens that it got, as it is."""
        if self.look is not None:
            self.look.at(name, x, x.shape if ".experts." in name else (self.B, self.T, -1))


class Model:
    """Forward and backward over weights that somebody else owns."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = c = config
        self.weights = weights
        self.blocks = [weights.under(f"blocks.{i}.") for i in range(c.n_layers)]
        dtype = weights.flat.dtype
        self.empty: New = partial(np.empty, dtype=dtype)  # for passes that keep nothing
        if c.position == "rope":
            self.cos, self.sin = self._rotation_at(np.arange(c.block_size))
        elif c.position == "sinusoidal":
            self.sinusoids = sinusoids(c.block_size, c.d_model, STD, dtype)
        elif c.position == "alibi":
            self.slopes = alibi_slopes(c.n_heads, dtype)

    def forward(
        self,
        tokens: Array,
        new: New,
        dropout_keys: Callable[[int], NDArray[np.uint32]] | None = None,
        penalties: tuple[float, float] = (0.0, 0.0),
        look: Look | None = None,
    ) -> tuple[Array, list[Routing], Callable[[Array], Gradients]]:
        """tokens (B, T) -> logits (N, V), and what the router of each layer did, if there are any.

        backward: d_logits (N, V) -> the gradient of every trained weight by name, to which the routings' balance and z
        contribute, times `penalties`.
        """
        c, w = self.config, self.weights
        B, T = tokens.shape
        run = Pass(
            B, T, new, dropout_keys, penalties, [], self._bias(T), self.rotation(slice(T)), look
        )
        x, embed_back = self._embed(tokens.reshape(-1), run)
        run.show("embedding", x)
        block_backs = []
        for i in range(c.n_layers):
            for sublayer in self._sublayers(i, run):
                x, back = sublayer(x)
                block_backs.append(back)
            run.show(f"blocks.{i}", x)
        final_back = None
        if c.norm_position == "pre":
            x, final_back = self._norm("norm", x, new)
            run.show("norm", x)
        logits, head_back = self._linear("embedding" if c.tie_embeddings else "head", x, new)
        run.show("logits", logits)

        def backward(dlogits: Array) -> Gradients:
            gradients: Gradients = {}
            dx = head_back(dlogits, gradients)
            if final_back is not None:
                dx = final_back(dx, gradients)
            while block_backs:  # popping frees what a block kept as soon as its gradient is done
                if len(block_backs) % 2 == 0:
                    run.show(f"{GRADIENT}blocks.{len(block_backs) // 2 - 1}", dx)
                dx = block_backs.pop()(dx, gradients)
            run.show(f"{GRADIENT}embedding", dx)
            if c.lora_rank:  # norms and biases gave theirs, too
                return {name: gradient for name, gradient in gradients.items() if name in w.trained}
            embed_back(dx, gradients)
            return gradients

        return logits, run.routings, backward

    def _embed(self, tokens: Array, run: Pass) -> tuple[Array, Callable[[Array, Gradients], None]]:
        c, w, (B, T) = self.config, self.weights, (run.B, run.T)
        x, embedding_back = ops.embedding(tokens, w["embedding.weight"], run.new)
        if c.scale_embeddings:
            x *= math.sqrt(c.d_model)
        positions = x.reshape(B, T, -1)
        if c.position == "learned":
            positions += w["position.weight"][:T]
        elif c.position == "sinusoidal":
            positions += self.sinusoids[:T]
        x, dropout_back = self._dropout(x, sites.EMBEDDING_SITE, run)

        def backward(dx: Array, gradients: Gradients) -> None:
            dx = dropout_back(dx)
            if c.position == "learned":
                gradients["position.weight"] = np.zeros_like(w["position.weight"])
                dx.reshape(B, T, -1).sum(0, out=gradients["position.weight"][:T])
            dtable = embedding_back(dx)
            if c.scale_embeddings:
                dtable *= math.sqrt(c.d_model)
            if c.tie_embeddings:
                dtable += gradients["embedding.weight"]
            gradients["embedding.weight"] = dtable

        return x, backward

    def _sublayers(self, i: int, run: Pass) -> tuple[Sublayer, Sublayer]:
        """Attention and feed-forward of block i, each with its norm and its residual connection."""

        def attend(x: Array) -> tuple[Array, Backward]:
            return self._attention(f"blocks.{i}.attention", i, x, run)

        def feed(x: Array) -> tuple[Array, Backward]:
            return self._feedforward(f"blocks.{i}.feedforward", i, x, run)

        return (
            lambda x: self._residual(f"blocks.{i}.attention_norm", attend, x, run.new),
            lambda x: self._residual(f"blocks.{i}.feedforward_norm", feed, x, run.new),
        )

    def _residual(self, norm: str, inner: Sublayer, x: Array, new: New) -> tuple[Array, Backward]:
        """pre: x + inner(norm(x)); post: norm(x + inner(x))."""
        if self.config.norm_position == "pre":
            h, norm_back = self._norm(norm, x, new)
            y, inner_back = inner(h)
            y += x

            def pre_backward(dy: Array, gradients: Gradients) -> Array:
                dx = norm_back(inner_back(dy, gradients), gradients)
                dx += dy
                return dx

            return y, pre_backward

        h, inner_back = inner(x)
        h += x
        y, norm_back = self._norm(norm, h, new)

        def post_backward(dy: Array, gradients: Gradients) -> Array:
            dh = norm_back(dy, gradients)
            dx = inner_back(dh, gradients)
            dx += dh
            return dx

        return y, post_backward

    def _attention(self, prefix: str, layer: int, x: Array, run: Pass) -> tuple[Array, Backward]:
        c, new, (B, T) = self.config, run.new, (run.B, run.T)
        H, K, Q = c.n_heads, c.n_kv_heads, c.head_size
        qkv, qkv_back = self._linear(f"{prefix}.qkv", x, new)
        heads = qkv.reshape(B, T, H + 2 * K, Q)
        qk, v = heads[:, :, : H + K], heads[:, :, H + K :]
        if c.qk_norm:
            qk, qk_norm_back = ops.rms_norm(qk, self.qk_gain(prefix), new, c.norm_eps)
        if run.rotation:
            qk, rope_back = rope(qk, *run.rotation, new)
        if run.look is not None:
            self._look_at_attention(prefix, qk, run.look)
        drop = None
        if run.dropout_keys and c.attention_dropout:
            drop = (c.attention_dropout, run.dropout_keys(sites.site(layer, sites.PROBABILITIES)))
        if attends_by_tiles(c, T):
            slopes = self.slopes if c.position == "alibi" else None
            mixed, attention_back = flash_attention(qk, v, slopes, c.window, new)
        else:
            mixed, attention_back = attention(qk, v, run.bias, drop, new, c.window)
        y, o_back = self._linear(f"{prefix}.o", mixed.reshape(B * T, H * Q), new)
        y, dropout_back = self._dropout(y, sites.site(layer, sites.AFTER_ATTENTION), run)
        run.show(prefix, y)

        def backward(dy: Array, gradients: Gradients) -> Array:
            dmixed = o_back(dropout_back(dy), gradients)
            dheads = attention_back(dmixed.reshape(B, T, H, Q))
            dqk = dheads[:, :, : H + K]
            if run.rotation:
                rope_back(dqk)
            if c.qk_norm:
                dqk[...], dgain = qk_norm_back(dqk)
                gradients[f"{prefix}.q_norm.weight"] = dgain[:H].sum(0)
                gradients[f"{prefix}.k_norm.weight"] = dgain[H:].sum(0)
            return qkv_back(dheads.reshape(qkv.shape), gradients)

        return y, backward

    def _look_at_attention(self, prefix: str, qk: Array, look: Look) -> None:
        """The scores and the weights (B, H, T, T), whichever way attention is computed."""
        names = f"{prefix}.scores", f"{prefix}.weights"
        if look.names.isdisjoint(names):
            return
        c, positions = self.config, np.arange(qk.shape[1])
        bias = alibi_bias(self.slopes, positions, positions) if c.position == "alibi" else None
        for name, array in zip(names, scores_and_weights(qk, c.n_kv_heads, bias, c.window)):
            look.at(name, array)

    def qk_gain(self, prefix: str) -> Array:
        """(H + K, Q): the gain of the queries, then that of the keys, repeated for each head."""
        c, w = self.config, self.weights
        gains = [w[f"{prefix}.q_norm.weight"]] * c.n_heads + [
            w[f"{prefix}.k_norm.weight"]
        ] * c.n_kv_heads
        return np.stack(gains)

    def rotation(self, positions: slice | NDArray[np.int64]) -> tuple[Array, Array] | None:
        """cos and sin (..., H + K, Q) at positions, if it is rope: from a table up to the context, made beyond it."""
        if self.config.position != "rope":
            return None
        end = positions.stop if isinstance(positions, slice) else int(positions.max()) + 1
        if end <= len(self.cos):
            return self.cos[positions], self.sin[positions]
        return self._rotation_at(
            np.arange(positions.start or 0, end) if isinstance(positions, slice) else positions
        )

    def _rotation_at(self, positions: NDArray[np.int64]) -> tuple[Array, Array]:
        c, dtype = self.config, self.weights.flat.dtype
        heads = c.n_heads + c.n_kv_heads
        return rope_at(
            positions, heads, c.head_size, dtype, c.rope_scaling, c.rope_factor, c.rope_base
        )

    def _bias(self, T: int) -> Array | None:
        if self.config.position != "alibi" or attends_by_tiles(self.config, T):
            return None
        return alibi_bias(self.slopes, np.arange(T), np.arange(T))

    def _feedforward(self, prefix: str, layer: int, x: Array, run: Pass) -> tuple[Array, Backward]:
        inner = self._mixture if self.config.n_experts else self._mlp
        y, inner_back = inner(prefix, x, run)
        y, dropout_back = self._dropout(y, sites.site(layer, sites.AFTER_FEEDFORWARD), run)
        run.show(prefix, y)
        return y, lambda dy, gradients: inner_back(dropout_back(dy), gradients)

    def _mlp(self, prefix: str, x: Array, run: Pass) -> tuple[Array, Backward]:
        """A feed-forward, or one expert: down(activation(up(x))), or down(activation(gate(x)) up(x))."""
        c, new = self.config, run.new
        activation = ops.ACTIVATIONS[c.feedforward]
        activation_back: Callable[[Array], Array]
        if c.gated:
            inner, into_back = self._linear(f"{prefix}.gate_up", x, new)
            run.show(f"{prefix}.preactivation", inner[:, : c.d_ff])
            h, activation_back = ops.gate(inner, activation, new)
        else:
            inner, into_back = self._linear(f"{prefix}.up", x, new)
            run.show(f"{prefix}.preactivation", inner)
            h, activation_back = activation(inner, new)
        y, down_back = self._linear(f"{prefix}.down", h, new)

        def backward(dy: Array, gradients: Gradients) -> Array:
            return into_back(activation_back(down_back(dy, gradients)), gradients)

        return y, backward

    def _mixture(self, prefix: str, x: Array, run: Pass) -> tuple[Array, Backward]:
        """The experts that the router chose for each token, and the shared one, if there is one."""
        c = self.config
        logits, router_back = self._linear(f"{prefix}.router", x, run.new)
        of_experts = replace(run, new=in_few_sizes(run.new))
        experts = [
            partial(self._mlp, f"{prefix}.experts.{e}", run=of_experts) for e in range(c.n_experts)
        ]
        y, routing, mixture_back = mixture(x, logits, experts, c.experts_per_token, run.B, run.new)
        run.routings.append(routing)
        if c.shared_expert:
            shared, shared_back = self._mlp(f"{prefix}.shared", x, run)
            y += shared

        def backward(dy: Array, gradients: Gradients) -> Array:
            dx, dlogits = mixture_back(dy, gradients, *run.penalties)
            dx += router_back(dlogits, gradients)
            if c.shared_expert:
                dx += shared_back(dy, gradients)
            return dx

        return y, backward

    def _linear(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        """x (N, I) -> (N, O): a matrix, or a stack of some, with the biases of its parts."""
        if self.config.lora_rank:
            return self._adapted(name, x, new)
        y, linear_back = ops.linear(x, self.weights[f"{name}.weight"], new)
        biases = self._add_biases(name, y)

        def backward(dy: Array, gradients: Gradients) -> Array:
            for bias, columns in biases:
                gradients[bias] = dy[:, columns].sum(0)
            dx, gradients[f"{name}.weight"] = linear_back(dy)
            return dx

        return y, backward

    def _adapted(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        """The same with weights that stay as they are, and the adapters of the parts that have one."""
        c, w = self.config, self.weights
        y, linear_back = ops.frozen_linear(x, w[f"{name}.weight"], new)
        self._add_biases(name, y)
        adapters = []
        for part, columns in w.parts(f"{name}.weight"):
            a, b = f"{part}.lora_a", f"{part}.lora_b"
            if a in w.rows:
                added, adapter_back = ops.adapter(x, w[a], w[b], c.lora_alpha / c.lora_rank, new)
                y[:, columns] += added
                adapters.append((a, b, columns, adapter_back))

        def backward(dy: Array, gradients: Gradients) -> Array:
            dx = linear_back(dy)
            for a, b, columns, adapter_back in adapters:
                dx_adapter, gradients[a], gradients[b] = adapter_back(dy[:, columns])
                dx += dx_adapter
            return dx

        return y, backward

    def _add_biases(self, name: str, y: Array) -> list[tuple[str, slice]]:
        """Adds to each part of a stack's product its bias, if it has one; their names and columns."""
        w = self.weights
        biases = [
            (f"{part}.bias", columns)
            for part, columns in w.parts(f"{name}.weight")
            if f"{part}.bias" in w.rows
        ]
        for bias, columns in biases:
            y[:, columns] += w[bias]
        return biases

    def _norm(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        if self.config.norm == "none":
            return x, lambda dy, gradients: dy
        gain = self.weights[f"{name}.weight"]
        if self.config.norm == "rmsnorm":
            y, rms_back = ops.rms_norm(x, gain, new, self.config.norm_eps)

            def rms_backward(dy: Array, gradients: Gradients) -> Array:
                dx, gradients[f"{name}.weight"] = rms_back(dy)
                return dx

            return y, rms_backward

        bias = self.weights[f"{name}.bias"] if self.config.bias else None
        y, layer_back = ops.layer_norm(x, gain, bias, new, self.config.norm_eps)

        def layer_backward(dy: Array, gradients: Gradients) -> Array:
            dx, gradients[f"{name}.weight"], dbias = layer_back(dy)
            if self.config.bias:
                gradients[f"{name}.bias"] = dbias
            return dx

        return y, layer_backward

    def _dropout(self, x: Array, site: int, run: Pass) -> tuple[Array, Callable[[Array], Any]]:
        if not (self.config.dropout and run.dropout_keys):
            return x, lambda dy: dy
        return ops.dropout(x, self.config.dropout, run.dropout_keys(site), run.new)
