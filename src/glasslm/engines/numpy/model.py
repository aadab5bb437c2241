"""The transformer by hand: tokens to logits, and back to the gradients of all weights.

Letters: B rows, T positions, N = B T, D width, H query heads, K key-value heads, Q head size, F
inner width, V vocabulary. Activations are (N, D); attention sees them as (B, T, heads, Q).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines import dropout as sites
from glasslm.engines.documents import document_starts
from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.attention import attention, rope
from glasslm.engines.numpy.flash import flash_attention, uses_flash
from glasslm.engines.numpy.forward_context import ActivationRecorder, ForwardContext
from glasslm.engines.numpy.moe import Routing, mixture, round_up_sizes
from glasslm.engines.numpy.operations import BUILT_IN, Operations
from glasslm.engines.numpy.ops import Array, New
from glasslm.engines.numpy.positions import POSITIONS, Rotation, dense_bias, tile_slopes
from glasslm.engines.numpy.weights import Weights
from glasslm.engines.operation_call import call_site

Gradients = dict[str, Array]
# Takes the gradient of the output, adds the gradients of weights by name, and returns the gradient
# of the input.
Backward = Callable[[Array, Gradients], Array]
Sublayer = Callable[[Array], tuple[Array, Backward]]


class Model:
    """Forward and backward of the model. It computes with `weights` and never changes them."""

    def __init__(
        self, config: ModelConfig, weights: Weights, operations: Operations = BUILT_IN
    ) -> None:
        self.config = c = config
        self.weights, self.operations = weights, operations
        self.blocks = [weights.select(f"blocks.{i}.") for i in range(c.n_layers)]
        dtype = weights.flat.dtype
        self.empty: New = partial(np.empty, dtype=dtype)  # for passes that keep nothing
        tables = POSITIONS[c.position]
        self.bias = tables.bias(c, dtype) if tables.bias else None
        self.position_vectors = tables.vectors(c, dtype) if tables.vectors else None
        if "position.weight" in weights.arrays:  # learned positions
            self.position_vectors = weights["position.weight"]
        self.rotation = Rotation(c, dtype)

    def forward(
        self,
        tokens: Array,
        new: New,
        dropout_keys: Callable[[int], NDArray[np.uint32]] | None = None,
        penalties: tuple[float, float] = (0.0, 0.0),
        recorder: ActivationRecorder | None = None,
    ) -> tuple[Array, list[Routing], Callable[[Array], Gradients]]:
        """tokens (B, T) -> logits (N, V), and the statistics of the router of each layer, if any.

        backward: dlogits (N, V) -> the gradient of every trained weight by name. It contains the
        gradients of the routers' balance and z-loss, times `penalties`.
        """
        c, w = self.config, self.weights
        B, T = tokens.shape
        bias, rotation = self.score_bias(T), self.rotation(slice(T))
        starts = document_starts(c, tokens)
        ctx = ForwardContext(
            B, T, new, dropout_keys, penalties, [], bias, rotation, recorder, starts
        )
        x, embed_back = self._embed(tokens.reshape(-1), ctx)
        ctx.record("embedding", x)
        block_backs = []
        for i in range(c.n_layers):
            with call_site(f"blocks.{i}"):
                for sublayer in self.sublayers(i, ctx):
                    x, back = sublayer(x)
                    block_backs.append(back)
            ctx.record(f"blocks.{i}", x)
        logits, readout_back = self._readout(x, new, ctx.record)

        def backward(dlogits: Array) -> Gradients:
            gradients: Gradients = {}
            dx = readout_back(dlogits, gradients)
            while block_backs:  # popping frees what a block kept as soon as its gradient is done
                i = (len(block_backs) - 1) // 2
                if len(block_backs) % 2 == 0:
                    ctx.record(f"{GRADIENT_PREFIX}blocks.{i}", dx)
                with call_site(f"blocks.{i}"):
                    dx = block_backs.pop()(dx, gradients)
            ctx.record(f"{GRADIENT_PREFIX}embedding", dx)
            if c.lora_rank:  # gradients of frozen norms and biases were computed as well
                return {name: g for name, g in gradients.items() if name in w.trained_names}
            embed_back(dx, gradients)
            return gradients

        return logits, ctx.routings, backward

    def readout(self, stream: Array) -> Array:
        """Residual streams (N, D) -> logits (N, V), as the output of the last block is read."""
        return self._readout(stream, self.empty, lambda name, x: None)[0]

    def _readout(
        self, x: Array, new: New, record: Callable[[str, Array], None]
    ) -> tuple[Array, Backward]:
        norm_back: Backward | None = None
        if self.config.has_final_norm:
            with call_site("norm"):
                x, norm_back = self._norm("norm", x, new)
            record("norm", x)
        head = "embedding" if self.config.tie_embeddings else "head"
        logits, head_back = self._linear(head, x, new)
        record("logits", logits)

        def backward(dlogits: Array, gradients: Gradients) -> Array:
            dx = head_back(dlogits, gradients)
            if norm_back is None:
                return dx
            with call_site("norm"):
                return norm_back(dx, gradients)

        return logits, backward

    def _embed(
        self, tokens: Array, ctx: ForwardContext
    ) -> tuple[Array, Callable[[Array, Gradients], None]]:
        c, w, (B, T) = self.config, self.weights, (ctx.B, ctx.T)
        embed = self.operations(ops.embedding)
        x, embedding_back = embed(tokens, w["embedding.weight"], ctx.new)
        if c.scale_embeddings:
            x *= math.sqrt(c.d_model)
        if self.position_vectors is not None:
            sequences = x.reshape(B, T, -1)
            sequences += self.position_vectors[:T]
        x, dropout_back = self._dropout(x, sites.EMBEDDING_SITE, ctx)

        def backward(dx: Array, gradients: Gradients) -> None:
            dx = dropout_back(dx)
            if "position.weight" in w.arrays:
                gradients["position.weight"] = np.zeros_like(w["position.weight"])
                dx.reshape(B, T, -1).sum(0, out=gradients["position.weight"][:T])
            dtable = embedding_back(dx)
            if c.scale_embeddings:
                dtable *= math.sqrt(c.d_model)
            if c.tie_embeddings:
                dtable += gradients["embedding.weight"]
            gradients["embedding.weight"] = dtable

        return x, backward

    def sublayers(self, i: int, ctx: ForwardContext) -> tuple[Sublayer, Sublayer]:
        """Attention and feed-forward of block i, each with its norm and residual connection."""

        def attend(x: Array) -> tuple[Array, Backward]:
            return self._attention(f"blocks.{i}.attention", i, x, ctx)

        def feed_forward(x: Array) -> tuple[Array, Backward]:
            return self._feedforward(f"blocks.{i}.feedforward", i, x, ctx)

        return (
            lambda x: self._residual(f"blocks.{i}.attention_norm", attend, x, ctx.new),
            lambda x: self._residual(f"blocks.{i}.feedforward_norm", feed_forward, x, ctx.new),
        )

    def _residual(self, norm: str, inner: Sublayer, x: Array, new: New) -> tuple[Array, Backward]:
        """pre: x + inner(norm(x)); post: norm(x + inner(x))."""
        if self.config.has_final_norm:
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

    def _attention(
        self, prefix: str, layer: int, x: Array, ctx: ForwardContext
    ) -> tuple[Array, Backward]:
        c, new, (B, T) = self.config, ctx.new, (ctx.B, ctx.T)
        H, K, Q = c.n_heads, c.n_kv_heads, c.head_size
        qkv, qkv_back = self._linear(f"{prefix}.qkv", x, new)
        heads = qkv.reshape(B, T, H + 2 * K, Q)
        qk, v = heads[:, :, : H + K], heads[:, :, H + K :]
        if c.qk_norm:
            qk_norm = self.operations(ops.rms_norm)
            qk, qk_norm_back = qk_norm(qk, self.qk_gain(prefix), new, c.norm_eps)
        if ctx.rotation:
            qk, rope_back = self.operations(rope)(qk, *ctx.rotation, new)
        ctx.record_attention(prefix, qk, K, self.bias, self._window(), self.operations)
        drop = None
        if ctx.dropout_keys and c.attention_dropout:
            site = sites.site_number(layer, sites.PROBABILITIES)
            drop = (c.attention_dropout, ctx.dropout_keys(site))
        window = self._window()
        if self.uses_flash(T):
            mixed, attention_back = flash_attention(
                qk, v, tile_slopes(self.bias), window, new, starts=ctx.starts
            )
        else:
            attend = self.operations(attention)
            mixed, attention_back = attend(qk, v, ctx.bias, drop, new, window, ctx.starts)
        ctx.record(f"{prefix}.heads", mixed.reshape(B * T, H, Q))
        y, o_back = self._linear(f"{prefix}.o", mixed.reshape(B * T, H * Q), new)
        y, dropout_back = self._dropout(y, sites.site_number(layer, sites.AFTER_ATTENTION), ctx)
        ctx.record(prefix, y)

        def backward(dy: Array, gradients: Gradients) -> Array:
            dmixed = o_back(dropout_back(dy), gradients)
            dheads = attention_back(dmixed.reshape(B, T, H, Q))
            dqk = dheads[:, :, : H + K]
            if ctx.rotation:
                rope_back(dqk)
            if c.qk_norm:
                dqk[...], dgain = qk_norm_back(dqk)
                gradients[f"{prefix}.q_norm.weight"] = dgain[:H].sum(0)
                gradients[f"{prefix}.k_norm.weight"] = dgain[H:].sum(0)
            return qkv_back(dheads.reshape(qkv.shape), gradients)

        return y, backward

    def qk_gain(self, prefix: str) -> Array:
        """(H + K, Q): the gain of the queries, then that of the keys, repeated for each head."""
        c, w = self.config, self.weights
        gains = [w[f"{prefix}.q_norm.weight"]] * c.n_heads + [
            w[f"{prefix}.k_norm.weight"]
        ] * c.n_kv_heads
        return np.stack(gains)

    def score_bias(self, T: int) -> Array | None:
        """ALiBi's bias (H, T, T); None for other positions and with flash attention."""
        if self.uses_flash(T):
            return None
        return dense_bias(self.bias, np.arange(T), np.arange(T))

    def uses_flash(self, T: int) -> bool:
        """Whether attention over T positions is computed by tiles, which nothing can replace."""
        return "attention" not in self.operations and uses_flash(self.config, T)

    def _window(self) -> int:
        """The window of the mask, for attention over a whole text; 0: the causal mask."""
        mask = self.config.mask
        match mask:
            case "causal":
                return 0
            case "window":
                return self.config.window
            case _:
                assert_never(mask)

    def _feedforward(
        self, prefix: str, layer: int, x: Array, ctx: ForwardContext
    ) -> tuple[Array, Backward]:
        inner = self._mixture if self.config.n_experts else self._mlp
        y, inner_back = inner(prefix, x, ctx)
        y, dropout_back = self._dropout(y, sites.site_number(layer, sites.AFTER_FEEDFORWARD), ctx)
        ctx.record(prefix, y)
        return y, lambda dy, gradients: inner_back(dropout_back(dy), gradients)

    def _mlp(self, prefix: str, x: Array, ctx: ForwardContext) -> tuple[Array, Backward]:
        """A feed-forward or one expert: down(a(up(x))), or gated, down(a(gate(x)) up(x))."""
        c, new = self.config, ctx.new
        activation = self.operations(ops.ACTIVATIONS[c.feedforward])
        activation_back: Callable[[Array], Array]
        if c.is_gated:
            inner, up_back = self._linear(f"{prefix}.gate_up", x, new)
            ctx.record(f"{prefix}.preactivation", inner[:, : c.d_ff])
            h, activation_back = ops.gate(inner, activation, new)
        else:
            inner, up_back = self._linear(f"{prefix}.up", x, new)
            ctx.record(f"{prefix}.preactivation", inner)
            h, activation_back = activation(inner, new)
        ctx.record(f"{prefix}.activation", h)
        y, down_back = self._linear(f"{prefix}.down", h, new)

        def backward(dy: Array, gradients: Gradients) -> Array:
            return up_back(activation_back(down_back(dy, gradients)), gradients)

        return y, backward

    def _mixture(self, prefix: str, x: Array, ctx: ForwardContext) -> tuple[Array, Backward]:
        """The experts that the router chose for each token, plus the shared expert if any."""
        c = self.config
        logits, router_back = self._linear(f"{prefix}.router", x, ctx.new)
        expert_ctx = replace(ctx, new=round_up_sizes(ctx.new))
        experts = [
            partial(self._mlp, f"{prefix}.experts.{e}", ctx=expert_ctx) for e in range(c.n_experts)
        ]
        y, routing, mixture_back = mixture(x, logits, experts, c.experts_per_token, ctx.B, ctx.new)
        ctx.routings.append(routing)
        if c.shared_expert:
            shared, shared_back = self._mlp(f"{prefix}.shared", x, ctx)
            y += shared

        def backward(dy: Array, gradients: Gradients) -> Array:
            dx, dlogits = mixture_back(dy, gradients, *ctx.penalties)
            dx += router_back(dlogits, gradients)
            if c.shared_expert:
                dx += shared_back(dy, gradients)
            return dx

        return y, backward

    def _linear(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        """x (N, I) -> (N, O): a matrix, or a stack of several, with the biases of its parts."""
        if self.config.lora_rank:
            return self._linear_with_adapters(name, x, new)
        linear = self.operations(ops.linear)
        y, linear_back = linear(x, self.weights[f"{name}.weight"], new)
        biases = self._add_biases(name, y)

        def backward(dy: Array, gradients: Gradients) -> Array:
            for bias, columns in biases:
                gradients[bias] = dy[:, columns].sum(0)
            dx, gradients[f"{name}.weight"] = linear_back(dy)
            return dx

        return y, backward

    def _linear_with_adapters(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        """As _linear, with frozen weights plus the adapters of the parts that have one."""
        c, w = self.config, self.weights
        y, linear_back = ops.frozen_linear(x, w[f"{name}.weight"], new)
        self._add_biases(name, y)
        adapters = []
        for part, columns in w.parts(f"{name}.weight"):
            a, b = f"{part}.lora_a", f"{part}.lora_b"
            if a in w.arrays:
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
        """Add to y (N, O) the biases of the parts of a stack; their names and columns."""
        w = self.weights
        biases = [
            (f"{part}.bias", columns)
            for part, columns in w.parts(f"{name}.weight")
            if f"{part}.bias" in w.arrays
        ]
        for bias, columns in biases:
            y[:, columns] += w[bias]
        return biases

    def _norm(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        """x (N, D) -> (N, D): the norm of the config, with the weights `name` of the table."""
        norm = ops.NORMS[self.config.norm]
        keys = [f"{name}.{word}" for word in norm.parameters]
        parameters = [self.weights.arrays.get(key) for key in keys]
        apply_norm = self.operations(norm.op)
        y, norm_back = apply_norm(x, *parameters, new, self.config.norm_eps)

        def backward(dy: Array, gradients: Gradients) -> Array:
            dx, *dparameters = norm_back(dy)
            for key, gradient in zip(keys, dparameters):
                if key in self.weights.arrays:
                    gradients[key] = gradient
            return dx

        return y, backward

    def _dropout(
        self, x: Array, site: int, ctx: ForwardContext
    ) -> tuple[Array, Callable[[Array], Any]]:
        if not (self.config.dropout and ctx.dropout_keys):
            return x, lambda dy: dy
        return ops.dropout(x, self.config.dropout, ctx.dropout_keys(site), ctx.new)
