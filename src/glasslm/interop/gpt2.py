"""GPT-2 in transformers: LayerNorm, an ungated feed-forward, positions that are added to the embeddings.

Its linear layers are (in, out), the transpose of ours, and q, k and v lie side by side in one. Sinusoids, and no
positions at all, are positions that somebody could have learned: they are written out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import FeedForward, ModelConfig
from glasslm.engines.positions import sinusoids
from glasslm.errors import InputError
from glasslm.interop.untrusted_json import Values, drop_tied_head, refuse_others
from glasslm.model.parameters import STD

Array = NDArray[Any]

MODEL_TYPES = ("gpt2",)
ACTIVATIONS: dict[str, FeedForward] = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def refusals(c: ModelConfig) -> list[str]:
    """Why no GPT-2 computes what this model does; empty where one does."""
    reasons = []
    if c.norm != "layernorm":
        reasons.append(f"its norm is {c.norm} (--norm layernorm)")
    if c.norm_position != "pre":
        reasons.append("it normalises after the sublayers (--norm-position pre)")
    if c.gated:
        reasons.append(f"its feed-forward is {c.feedforward}, with a gate (--feedforward gelu)")
    if c.position not in ("learned", "sinusoidal", "none"):
        reasons.append(f"its positions are {c.position} (--position learned)")
    if c.resolved().n_kv_heads != c.n_heads:
        reasons.append(
            f"{c.n_heads // c.n_kv_heads} heads share their keys (--n-kv-heads {c.n_heads})"
        )
    if c.qk_norm:
        reasons.append("it normalises queries and keys (--no-qk-norm)")
    if 0 < c.window < c.block_size:
        reasons.append("a token sees only a window (--window 0)")
    if c.n_experts:
        reasons.append("it has experts (--n-experts 0)")
    return reasons


def to_config(c: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """config.json of a model without refusals."""
    c = c.resolved()
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.d_ff,
        "n_positions": c.block_size,
        "activation_function": {"gelu": "gelu_new"}.get(c.feedforward, c.feedforward),
        "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
        "tie_word_embeddings": c.tie_embeddings and not c.scale_embeddings,
    }


def from_config(values: Values) -> ModelConfig:
    """What a config.json describes. Raises InputError for what glasslm has no switch for."""
    activation = values.word("activation_function", "gelu_new")
    refuse_others(
        activation in ACTIVATIONS, "activation_function", activation, ", ".join(ACTIVATIONS)
    )
    for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                        ("add_cross_attention", False)):  # fmt: skip
        refuse_others(values.flag(name, usual) == usual, name, not usual, str(usual).lower())
    width = values.whole("n_embd", 768)
    return ModelConfig(
        d_model=width,
        n_layers=values.whole("n_layer", 12),
        n_heads=values.whole("n_head", 12),
        d_ff=values.whole("n_inner", 0) or 4 * width,
        block_size=values.whole("n_positions", 1024),
        dropout=values.number("resid_pdrop", 0.1),
        attention_dropout=values.number("attn_pdrop", 0.1),
        norm="layernorm",
        norm_eps=values.number("layer_norm_epsilon", 1e-5),
        feedforward=ACTIVATIONS[activation],
        position="learned",
        tie_embeddings=values.flag("tie_word_embeddings", True),
        bias=True,
    )


OUTSIDE = {"embedding.weight": "transformer.wte.weight", "norm.weight": "transformer.ln_f.weight",
           "norm.bias": "transformer.ln_f.bias", "head.weight": "lm_head.weight",
           "position.weight": "transformer.wpe.weight"}  # fmt: skip
NORMS = {"attention_norm": "ln_1", "feedforward_norm": "ln_2"}
LINEARS = {
    "attention.o": "attn.c_proj",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}


def to_weights(c: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]:
    """Weights by their names there, from all of them by their names here."""

    def bias(name: str, width: int) -> Array:
        return weights.get(f"{name}.bias", np.zeros(width, np.float32))

    there = {theirs: weights[ours] for ours, theirs in OUTSIDE.items() if ours in weights}
    there["transformer.wpe.weight"] = _positions(c, weights)
    there["transformer.ln_f.bias"] = bias("norm", c.d_model)
    for i in range(c.n_layers):
        here, layer = f"blocks.{i}", f"transformer.h.{i}"
        for ours, theirs in NORMS.items():
            there[f"{layer}.{theirs}.weight"] = weights[f"{here}.{ours}.weight"]
            there[f"{layer}.{theirs}.bias"] = bias(f"{here}.{ours}", c.d_model)
        parts = [f"{here}.attention.{part}" for part in "qkv"]
        there[f"{layer}.attn.c_attn.weight"] = np.concatenate(
            [weights[f"{part}.weight"].T for part in parts], axis=1
        )
        there[f"{layer}.attn.c_attn.bias"] = np.concatenate(
            [bias(part, c.d_model) for part in parts]
        )
        for ours, theirs in LINEARS.items():
            matrix = weights[f"{here}.{ours}.weight"]
            there[f"{layer}.{theirs}.weight"] = np.ascontiguousarray(matrix.T)
            there[f"{layer}.{theirs}.bias"] = bias(f"{here}.{ours}", len(matrix))
    if c.scale_embeddings:
        there.setdefault("lm_head.weight", weights["embedding.weight"])
        there["transformer.wte.weight"] = weights["embedding.weight"] * math.sqrt(c.d_model)
    return there


def _positions(c: ModelConfig, weights: dict[str, Array]) -> Array:
    """(T, D) what is added to the embeddings."""
    if c.position == "learned":
        return weights["position.weight"]
    if c.position == "sinusoidal":
        return sinusoids(c.block_size, c.d_model, STD, np.float32)
    return np.zeros((c.block_size, c.d_model), np.float32)


def from_weights(c: ModelConfig, there: dict[str, Array], wanted: list[str]) -> dict[str, Array]:
    """The `wanted` weights of the table, taken out of `there`. Raises InputError where one is missing.

    The bias of the keys is dropped: it adds the same to all scores of a query, which softmax does not see.
    """
    for name in [name for name in there if not name.startswith(("transformer.", "lm_head."))]:
        there[f"transformer.{name}"] = there.pop(
            name
        )  # the oldest files, of the model without its head

    def take(name: str) -> Array:
        if name not in there:
            raise InputError(f"the model lacks the weight {name}, which its config.json asks for")
        return there.pop(name)

    here = {ours: take(theirs) for ours, theirs in OUTSIDE.items() if ours in wanted}
    for i in range(c.n_layers):
        layer = f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            for ours, theirs in (NORMS | LINEARS).items():
                here[f"blocks.{i}.{ours}.{kind}"] = take(f"{layer}.{theirs}.{kind}").T
            fused = take(f"{layer}.attn.c_attn.{kind}").T
            if len(fused) != 3 * c.d_model:
                raise InputError(
                    f"the model's {layer}.attn.c_attn.{kind} has {len(fused)} rows: expected 3 x {c.d_model}"
                )
            for part, rows in zip("qkv", np.split(fused, 3)):
                if (part, kind) != ("k", "bias"):
                    here[f"blocks.{i}.attention.{part}.{kind}"] = rows
    if c.tie_embeddings:
        drop_tied_head(there, here["embedding.weight"])
    return here
