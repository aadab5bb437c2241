"""The transformer by hand: tokens to logits, and back to the gradients of all weights.

Letters: B rows, T positions, N = B T, D width, H query heads, K key-value heads, Q head size, F
inner width, V vocabulary. Activations are (N, D); attention sees them as (B, T, heads, Q).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines import dropout as sites
from glasslm.engines.documents import document_starts
from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.attention import attention, rope
from glasslm.engines.numpy.column_pieces import ColumnPieces
from glasslm.engines.numpy.flash import flash_attention, uses_flash
from glasslm.engines.numpy.forward_context import ActivationRecorder, ForwardContext
from glasslm.engines.numpy.layers import Backward, Gradients, Layers
from glasslm.engines.numpy.moe import Routing, mixture, round_up_sizes
from glasslm.engines.numpy.operations import BUILT_IN, Operations
from glasslm.engines.numpy.ops import Array, New
from glasslm.engines.numpy.positions import POSITIONS, dense_bias, make_rotations, tile_slopes
from glasslm.engines.numpy.soft_cap import soft_cap
from glasslm.engines.numpy.weights import Weights
from glasslm.engines.operation_call import call_site

Sublayer = Callable[[Array], tuple[Array, Backward]]


class Model(Layers):
    """Forward and backward of the model. It computes with `weights` and never changes them."""

    pieces: ColumnPieces | None = None  # for single tokens of several texts, in inference.py

    def __init__(
        self, config: ModelConfig, weights: Weights, operations: Operations = BUILT_IN
    ) -> None:
        super().__init__(config, weights, operations)
        c = config
        self.blocks = [weights.select(f"blocks.{i}.") for i in range(c.n_layers)]
        # For inference.py, which needs them again for each token.
        self.layer_kinds = c.layer_kinds
        self.adds_to_products = bool(c.biased_modules or c.lora_rank)
        dtype = weights.flat.dtype
        self.empty: New = partial(np.empty, dtype=dtype)  # for passes that keep nothing
        tables = POSITIONS[c.position]
        self.bias = tables.bias(c, dtype) if tables.bias else None
        self.position_vectors = tables.vectors(c, dtype) if tables.vectors else None
        if "position.weight" in weights.arrays:  # learned positions
            self.position_vectors = weights["position.weight"]
        self.rotations = make_rotations(c, dtype)

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
        bias, starts = self.score_bias(T), document_starts(c, tokens)
        rotations = {kind: rotation(slice(T)) for kind, rotation in self.rotations.items()}
        ctx = ForwardContext(
            B, T, new, dropout_keys, penalties, [], bias, rotations, recorder, starts
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
        n_sublayers = len(block_backs) // c.n_layers

        def backward(dlogits: Array) -> Gradients:
            gradients: Gradients = {}
            dx = readout_back(dlogits, gradients)
            while block_backs:  # popping frees what a block kept as soon as its gradient is done
                i = (len(block_backs) - 1) // n_sublayers
                if len(block_backs) % n_sublayers == 0:
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
        cap, cap_back = self.config.logit_softcap, None
        if cap:
            logits, cap_back = soft_cap(logits, cap, new)
        record("logits", logits)

        def backward(dlogits: Array, gradients: Gradients) -> Array:
            dx = head_back(dlogits if cap_back is None else cap_back(dlogits), gradients)
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

    def sublayers(self, i: int, ctx: ForwardContext) -> tuple[Sublayer, ...]:
        """Attention and feed-forward of block i, each with its norm and residual connection.

        With a parallel residual connection they are one sublayer.
        """
        block, new = f"blocks.{i}", ctx.new

        def attend(x: Array) -> tuple[Array, Backward]:
            return self._attention(f"{block}.attention", i, x, ctx)

        def feed(x: Array) -> tuple[Array, Backward]:
            return self._feedforward(f"{block}.feedforward", i, x, ctx)

        def both(x: Array) -> tuple[Array, Backward]:
            return _add_sublayers(attend, feed, x)

        norms = f"{block}.attention_norm", f"{block}.feedforward_norm"
        residual = self.config.residual
        match residual:
            case "serial":
                return (
                    lambda x: self._residual(norms[0], attend, x, new),
                    lambda x: self._residual(norms[1], feed, x, new),
                )
            case "parallel":
                parts = (norms[0], attend), (norms[1], feed)
                return (lambda x: self._parallel(parts, x, new),)
            case "parallel_one_norm":
                return (lambda x: self._residual(norms[0], both, x, new),)
            case _:
                assert_never(residual)

    def _residual(self, norm: str, inner: Sublayer, x: Array, new: New) -> tuple[Array, Backward]:
        """pre: x + inner(norm(x)); post: norm(x + inner(x)); sandwich: x + norm(inner(norm(x)))."""
        if self.config.has_final_norm:
            y, inner_back = self._normed_sublayer(norm, inner, x, new)
            y += x

            def pre_backward(dy: Array, gradients: Gradients) -> Array:
                dx = inner_back(dy, gradients)
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

    def _normed_sublayer(
        self, norm: str, inner: Sublayer, x: Array, new: New
    ) -> tuple[Array, Backward]:
        """inner(norm(x)), and in a sandwich the norm of that; backward never overwrites dy."""
        h, norm_back = self._norm(norm, x, new)
        y, inner_back = inner(h)
        if self.config.norm_position != "sandwich":
            return y, lambda dy, gradients: norm_back(inner_back(dy, gradients), gradients)
        out, out_back = self._norm(f"{norm.removesuffix('_norm')}_output_norm", y, new)

        def backward(dy: Array, gradients: Gradients) -> Array:
            copied = new(dy.shape)  # the norm overwrites it, and the residual connection needs dy
            copied[...] = dy
            return norm_back(inner_back(out_back(copied, gradients), gradients), gradients)

        return out, backward

    def _parallel(
        self, parts: tuple[tuple[str, Sublayer], ...], x: Array, new: New
    ) -> tuple[Array, Backward]:
        """x + attention(norm(x)) + feedforward(norm'(x)). arXiv:2204.06745, section 2.1."""
        (y, attention_back), (fed, feedforward_back) = (
            self._normed_sublayer(norm, inner, x, new) for norm, inner in parts
        )
        y += fed
        y += x

        def backward(dy: Array, gradients: Gradients) -> Array:
            dx = feedforward_back(dy, gradients)
            dx += attention_back(dy, gradients)
            dx += dy
            return dx

        return y, backward

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
        rotation = ctx.rotations.get(kind := c.layer_kind(layer))
        if rotation:
            qk, rope_back = self._rotate(qk, rotation, new)
        if c.query_factor != 1:
            qk[:, :, :H] *= c.query_factor
        window = c.kind_window(kind)
        ctx.record_attention(prefix, qk, K, self.bias, window, self.operations, c.attention_softcap)
        drop = None
        if ctx.dropout_keys and c.attention_dropout:
            site = sites.site_number(layer, sites.PROBABILITIES)
            drop = (c.attention_dropout, ctx.dropout_keys(site))
        if self.uses_flash(T):
            mixed, attention_back = flash_attention(
                qk, v, tile_slopes(self.bias), window, new, starts=ctx.starts
            )
        else:
            attend = self.operations(attention)
            if c.attention_softcap:
                attend = partial(attend, softcap=c.attention_softcap)
            mixed, attention_back = attend(qk, v, ctx.bias, drop, new, window, ctx.starts)
        ctx.record(f"{prefix}.heads", mixed.reshape(B * T, H, Q))
        y, o_back = self._linear(f"{prefix}.o", mixed.reshape(B * T, H * Q), new)
        y, dropout_back = self._dropout(y, sites.site_number(layer, sites.AFTER_ATTENTION), ctx)
        ctx.record(prefix, y)

        def backward(dy: Array, gradients: Gradients) -> Array:
            dmixed = o_back(dropout_back(dy), gradients)
            dheads = attention_back(dmixed.reshape(B, T, H, Q))
            dqk = dheads[:, :, : H + K]
            if c.query_factor != 1:
                dqk[:, :, :H] *= c.query_factor
            if rotation:
                rope_back(dqk[..., : c.rotary_size])
            if c.qk_norm:
                dqk[...], dgain = qk_norm_back(dqk)
                gradients[f"{prefix}.q_norm.weight"] = dgain[:H].sum(0)
                gradients[f"{prefix}.k_norm.weight"] = dgain[H:].sum(0)
            return qkv_back(dheads.reshape(qkv.shape), gradients)

        return y, backward

    def _rotate(
        self, qk: Array, rotation: tuple[Array, Array], new: New
    ) -> tuple[Array, Callable[[Array], Array]]:
        """qk (B, T, H + K, Q) with the first R dimensions of each head rotated. Overwrites qk."""
        apply_rope, R = self.operations(rope), self.config.rotary_size
        if qk.shape[-1] == R:
            return apply_rope(qk, *rotation, new)
        rotated, back = apply_rope(qk[..., :R], *rotation, new)
        qk[..., :R] = rotated
        return qk, back

    def score_bias(self, T: int) -> Array | None:
        """ALiBi's bias (H, T, T); None for other positions and with flash attention."""
        if self.uses_flash(T):
            return None
        return dense_bias(self.bias, np.arange(T), np.arange(T))

    def uses_flash(self, T: int) -> bool:
        """Whether attention over T positions is computed by tiles, which nothing can replace."""
        return "attention" not in self.operations and uses_flash(self.config, T)

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


def _add_sublayers(first: Sublayer, second: Sublayer, x: Array) -> tuple[Array, Backward]:
    """first(x) + second(x)."""
    (y, first_back), (added, second_back) = first(x), second(x)
    y += added

    def backward(dy: Array, gradients: Gradients) -> Array:
        dx = second_back(dy, gradients)
        dx += first_back(dy, gradients)
        return dx

    return y, backward
