"""GPT-2 in transformers: LayerNorm, no gate, positions that are added to the embeddings.

transformers stores GPT-2's linear layers as (in, out), the transpose of glasslm's, with q, k and v
side by side in one. Sinusoidal positions, and none, are written as learned positions with these
values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import FeedForward, ModelConfig
from glasslm.engines.positions import sinusoids
from glasslm.errors import InputError
from glasslm.interop.config_keys import known_values
from glasslm.interop.hf_weights import drop_tied_head
from glasslm.interop.untrusted_json import Values, require_supported
from glasslm.model.parameters import INIT_STD

Array = NDArray[Any]

# What transformers has for the variants of glasslm. A variant that is not listed here is refused by
# `refusals`.
MODEL_TYPES = ("gpt2",)
ACTIVATION_FUNCTIONS: dict[str, str] = {"gelu": "gelu_new", "relu": "relu", "relu2": "relu2"}
POSITIONS = ("learned", "sinusoidal", "none")
MASKS = ("causal", "window")  # a window as long as the context hides nothing

# Activations of a config.json that glasslm computes, by their names in transformers.
ACTIVATIONS: dict[str, FeedForward] = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def refusals(c: ModelConfig) -> list[str]:
    """Reasons why no GPT-2 computes this model, each with a flag that helps; empty if one does."""
    reasons = []
    if c.norm != "layernorm":
        reasons.append(f"its norm is {c.norm} (--norm layernorm)")
    if c.norm_position != "pre":
        reasons.append(f"its norms are in the position {c.norm_position} (--norm-position pre)")
    if c.feedforward not in ACTIVATION_FUNCTIONS:
        reasons.append(f"its feed-forward is {c.feedforward} (--feedforward gelu)")
    if c.position not in POSITIONS:
        reasons.append(f"its positions are {c.position} (--position learned)")
    if c.mask not in MASKS:
        reasons.append(f"its mask is {c.mask} (--window 0)")
    if c.resolve().n_kv_heads != c.n_heads:
        reasons.append(
            f"{c.n_heads // c.n_kv_heads} heads share their keys (--n-kv-heads {c.n_heads})"
        )
    if c.qk_norm:
        reasons.append("it normalizes queries and keys (--no-qk-norm)")
    if 0 < c.window < c.block_size:
        reasons.append(f"its attention has a window of {c.window} tokens (--window 0)")
    if c.n_experts:
        reasons.append("it has experts (--n-experts 0)")
    return reasons


def to_hf_config(c: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The values of config.json, for a model without refusals."""
    c = c.resolve()
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.d_ff,
        "n_positions": c.block_size,
        "activation_function": ACTIVATION_FUNCTIONS[c.feedforward],
        "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
        "tie_word_embeddings": c.tie_embeddings and not c.scale_embeddings,
    }


def from_hf_config(values: Values) -> ModelConfig:
    """The model that a config.json describes.

    Raises InputError for an option that glasslm does not have.
    """
    values = known_values(values)
    activation = values.string("activation_function", "gelu_new")
    require_supported(
        activation in ACTIVATIONS, "activation_function", activation, ", ".join(ACTIVATIONS)
    )
    for name, supported in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
    ):
        value = values.boolean(name, supported)
        require_supported(value == supported, name, value, str(supported).lower())
    width = values.integer("n_embd", 768)
    return ModelConfig(
        d_model=width,
        n_layers=values.integer("n_layer", 12),
        n_heads=values.integer("n_head", 12),
        d_ff=values.integer("n_inner", 0) or 4 * width,
        block_size=values.integer("n_positions", 1024),
        dropout=values.number("resid_pdrop", 0.1),
        attention_dropout=values.number("attn_pdrop", 0.1),
        norm="layernorm",
        norm_eps=values.number("layer_norm_epsilon", 1e-5),
        feedforward=ACTIVATIONS[activation],
        position="learned",
        tie_embeddings=values.boolean("tie_word_embeddings", True),
        bias=True,
    )


# glasslm's names -> transformers' names, of weights outside the blocks and of modules inside them.
TOP_LEVEL = {"embedding.weight": "transformer.wte.weight", "norm.weight": "transformer.ln_f.weight",
             "norm.bias": "transformer.ln_f.bias", "head.weight": "lm_head.weight",
             "position.weight": "transformer.wpe.weight"}  # fmt: skip
NORMS = {"attention_norm": "ln_1", "feedforward_norm": "ln_2"}
LINEARS = {
    "attention.o": "attn.c_proj",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}


def to_hf_weights(c: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]:
    """All weights by transformers' names, from all weights by glasslm's names."""

    def bias(name: str, width: int) -> Array:
        return weights.get(f"{name}.bias", np.zeros(width, np.float32))

    hf_weights = {hf_name: weights[name] for name, hf_name in TOP_LEVEL.items() if name in weights}
    hf_weights["transformer.wpe.weight"] = _positions(c, weights)
    hf_weights["transformer.ln_f.bias"] = bias("norm", c.d_model)
    for i in range(c.n_layers):
        block, layer = f"blocks.{i}", f"transformer.h.{i}"
        for name, hf_name in NORMS.items():
            hf_weights[f"{layer}.{hf_name}.weight"] = weights[f"{block}.{name}.weight"]
            hf_weights[f"{layer}.{hf_name}.bias"] = bias(f"{block}.{name}", c.d_model)
        parts = [f"{block}.attention.{part}" for part in "qkv"]
        hf_weights[f"{layer}.attn.c_attn.weight"] = np.concatenate(
            [weights[f"{part}.weight"].T for part in parts], axis=1
        )
        hf_weights[f"{layer}.attn.c_attn.bias"] = np.concatenate(
            [bias(part, c.d_model) for part in parts]
        )
        for name, hf_name in LINEARS.items():
            matrix = weights[f"{block}.{name}.weight"]
            hf_weights[f"{layer}.{hf_name}.weight"] = np.ascontiguousarray(matrix.T)
            hf_weights[f"{layer}.{hf_name}.bias"] = bias(f"{block}.{name}", len(matrix))
    if c.scale_embeddings:  # the scale goes into the embeddings, and the head is kept without it
        hf_weights.setdefault("lm_head.weight", weights["embedding.weight"])
        hf_weights["transformer.wte.weight"] = weights["embedding.weight"] * math.sqrt(c.d_model)
    return hf_weights


def _positions(c: ModelConfig, weights: dict[str, Array]) -> Array:
    """(T, D) what is added to the embeddings."""
    assert c.position in POSITIONS
    if c.position == "learned":
        return weights["position.weight"]
    if c.position == "sinusoidal":
        return sinusoids(c.block_size, c.d_model, INIT_STD, np.float32)
    return np.zeros((c.block_size, c.d_model), np.float32)


def from_hf_weights(
    c: ModelConfig, hf_weights: dict[str, Array], names: list[str]
) -> dict[str, Array]:
    """The weights `names` of the parameter table; they are removed from `hf_weights`.

    The bias of the keys is dropped: it adds the same number to all scores of a query, and softmax
    ignores that. Raises InputError where a weight is missing.
    """
    # The oldest files hold the model without its head, under names without the prefix.
    for name in [n for n in hf_weights if not n.startswith(("transformer.", "lm_head."))]:
        hf_weights[f"transformer.{name}"] = hf_weights.pop(name)

    def take(name: str) -> Array:
        if name not in hf_weights:
            raise InputError(f"the model lacks the weight {name}, which its config.json asks for")
        return hf_weights.pop(name)

    weights = {name: take(hf_name) for name, hf_name in TOP_LEVEL.items() if name in names}
    for i in range(c.n_layers):
        layer = f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            for name, hf_name in (NORMS | LINEARS).items():
                weights[f"blocks.{i}.{name}.{kind}"] = take(f"{layer}.{hf_name}.{kind}").T
            fused = take(f"{layer}.attn.c_attn.{kind}").T
            if len(fused) != 3 * c.d_model:
                raise InputError(
                    f"the model's {layer}.attn.c_attn.{kind} has {len(fused)} rows: expected 3 x "
                    f"{c.d_model}"
                )
            for part, rows in zip("qkv", np.split(fused, 3)):
                if (part, kind) != ("k", "bias"):
                    weights[f"blocks.{i}.attention.{part}.{kind}"] = rows
    if c.tie_embeddings:
        drop_tied_head(hf_weights, weights["embedding.weight"])
    return weights
