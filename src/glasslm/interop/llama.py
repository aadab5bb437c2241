"""The Llama family in transformers: Llama, Mistral, Mixtral, Qwen3 and Qwen3-MoE.

Mistral adds a window, Mixtral experts, Qwen3 qk-norm, and Qwen3-MoE both. The members differ in a
few names and keys. Weights keep their shapes: glasslm and transformers both store (out, in)
matrices and rotate split halves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import FeedForward, ModelConfig
from glasslm.errors import InputError
from glasslm.interop.config_keys import known_values
from glasslm.interop.hf_weights import drop_tied_head
from glasslm.interop.untrusted_json import Values, require_supported

Array = NDArray[Any]

# What transformers has for the variants of glasslm. A variant that is not listed here is refused by
# `refusals`.
MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe")
HIDDEN_ACTS: dict[str, str] = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
ROPE_SCALINGS = ("none", "linear", "ntk")
MASKS = ("causal", "window")

# Activations of a config.json that glasslm computes, by their names in transformers.
ACTIVATIONS: dict[str, FeedForward] = {
    "silu": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
}


def refusals(c: ModelConfig) -> list[str]:
    """Reasons why no member of this family computes this model; empty if one does.

    Each reason names a flag that helps.
    """
    reasons = []
    if c.norm != "rmsnorm":
        reasons.append(f"its norm is {c.norm} (--norm rmsnorm)")
    if c.norm_position != "pre":
        reasons.append(f"its norms are in the position {c.norm_position} (--norm-position pre)")
    if c.feedforward not in HIDDEN_ACTS:
        reasons.append(f"its feed-forward is {c.feedforward} (--feedforward swiglu)")
    if c.position != "rope":
        reasons.append(f"its positions are {c.position} (--position rope)")
    if c.mask not in MASKS:
        reasons.append(f"its mask is {c.mask} (--window 0)")
    if c.rope_scaling not in ROPE_SCALINGS:
        reasons.append(f"its rope is scaled by {c.rope_scaling} (--rope-scaling linear)")
    kind = model_type(c)
    if c.bias and kind != "llama":
        reasons.append(f"a {kind} has no biases (--no-bias)")
    if c.shared_expert:
        reasons.append("it has a shared expert (--no-shared-expert)")
    if c.n_experts and c.experts_per_token == 1 and kind == "mixtral":
        reasons.append(
            "it weights a token's only expert by the expert's probability (--experts-per-token 2, "
            "or --qk-norm)"
        )
    return reasons


def model_type(c: ModelConfig) -> str:
    """The member of the family, by its model_type in transformers."""
    if c.qk_norm:
        return "qwen3_moe" if c.n_experts else "qwen3"
    if c.n_experts:
        return "mixtral"
    return "mistral" if c.window else "llama"


def to_hf_config(c: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The values of config.json, for a model without refusals."""
    c, kind = c.resolve(), model_type(c)
    base = c.rope_base
    if c.rope_scaling == "ntk" and c.head_size > 2:  # ntk scaling is a larger base
        base *= c.rope_factor ** (c.head_size / (c.head_size - 2))
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_size,
        "hidden_act": HIDDEN_ACTS[c.feedforward],
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": base,
        "rope_scaling": {"rope_type": "linear", "factor": c.rope_factor}
        if c.rope_scaling == "linear"
        else None,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tie_embeddings and not c.scale_embeddings,
    }
    if kind == "llama":
        values |= {"attention_bias": c.bias, "mlp_bias": c.bias}
    if c.window:
        values["sliding_window"] = c.window
    if c.window and c.qk_norm:
        values |= {"use_sliding_window": True, "max_window_layers": 0}
    if kind == "mixtral":
        values |= {"num_local_experts": c.n_experts, "num_experts_per_tok": c.experts_per_token}
    if kind == "qwen3_moe":
        values |= {
            "num_experts": c.n_experts,
            "num_experts_per_tok": c.experts_per_token,
            "moe_intermediate_size": c.d_ff,
            "norm_topk_prob": c.experts_per_token > 1,
        }
    return values


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


# The values that transformers uses for keys that config.json lacks. A key that is null has no
# value.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "mixtral": {
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3": {
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
    },
}


def from_hf_config(values: Values) -> ModelConfig:
    """The model that a config.json describes.

    Raises InputError for an option that glasslm does not have.
    """
    kind = values.string("model_type")
    values = known_values(values).with_defaults(DEFAULTS[kind])
    width, heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    head_size = values.integer("head_dim", width // max(1, heads))
    require_supported(
        head_size * heads == width,
        "head_dim",
        head_size,
        f"hidden_size / heads, {width // max(1, heads)}",
    )
    activation = values.string("hidden_act", "silu")
    require_supported(
        activation in ACTIVATIONS, "hidden_act", activation[:100], " or ".join(ACTIVATIONS)
    )
    biases = {name: values.boolean(name, False) for name in ("attention_bias", "mlp_bias")}
    require_supported(
        len(set(biases.values())) == 1, "attention_bias and mlp_bias", biases, "both or neither"
    )
    base, linear_factor = _rope(values)
    return ModelConfig(
        d_model=width,
        n_layers=values.integer("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=values.integer("num_key_value_heads", heads),
        d_ff=values.integer(
            "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
        ),
        block_size=values.integer("max_position_embeddings"),
        attention_dropout=values.number("attention_dropout", 0.0),
        norm_eps=values.number("rms_norm_eps"),
        feedforward=ACTIVATIONS[activation],
        position="rope",
        rope_base=base,
        rope_scaling="linear" if linear_factor > 1 else "none",
        rope_factor=linear_factor,
        tie_embeddings=values.boolean("tie_word_embeddings", False),
        qk_norm=kind.startswith("qwen3"),
        bias=biases["attention_bias"],
        window=_window(kind, values),
        **_experts(kind, values),
    )


def _window(kind: str, values: Values) -> int:
    """The window of every layer in tokens; 0 for none.

    Raises InputError where layers have different windows.
    """
    layers, n_layers = values.array("layer_types"), values.integer("num_hidden_layers")
    window = 0 if kind == "llama" else values.integer("sliding_window", 0)
    if kind.startswith("qwen3") and not values.boolean("use_sliding_window", False):
        window = 0
    if kind == "qwen3" and layers == ["full_attention"] * n_layers:
        return 0
    if layers:  # of the other model types transformers ignores them, so they may only agree
        layer_type = "sliding_attention" if window else "full_attention"
        require_supported(
            layers == [layer_type] * n_layers,
            "layer_types",
            str(layers)[:100],
            f"{layer_type} in each of the {n_layers} layers, or no layer_types",
        )
    elif window and kind == "qwen3":
        full_layers = values.integer("max_window_layers")
        require_supported(
            full_layers == 0, "max_window_layers", full_layers, "0, a window in every layer"
        )
    return window


def _experts(kind: str, values: Values) -> dict[str, Any]:
    """The fields of ModelConfig for experts; empty for a model without.

    Raises InputError for other routing.
    """
    if kind not in ("mixtral", "qwen3_moe"):
        return {}
    count = values.integer("num_local_experts")
    per_token = values.integer("num_experts_per_tok")
    if kind == "mixtral":  # Mixtral gives a token's only expert the weight 1
        require_supported(per_token > 1, "num_experts_per_tok", per_token, "2 or more")
    else:
        normalized = values.boolean("norm_topk_prob", False)
        require_supported(
            normalized == (per_token > 1),
            "norm_topk_prob",
            normalized,
            "true, with 2 or more experts per token",
        )
        dense = (values.integer("decoder_sparse_step", 1), values.array("mlp_only_layers"))
        require_supported(
            dense == (1, []),
            "decoder_sparse_step, mlp_only_layers",
            dense,
            "experts in every layer",
        )
    return {"n_experts": count, "experts_per_token": per_token}


def _rope(values: Values) -> tuple[float, float]:
    """Rope's base, and the factor of linear scaling (1 without)."""
    rope = values.object("rope_parameters")
    base = rope.number("rope_theta", values.number("rope_theta", 1e4))
    kind = rope.string("rope_type", rope.string("type", "default"))
    share = rope.number("partial_rotary_factor", values.number("partial_rotary_factor", 1.0))
    require_supported(share == 1, "partial_rotary_factor", share, "1")
    if kind == "default":
        return base, 1.0
    factor = rope.number("factor")
    require_supported(factor >= 1, "factor", factor, "1 or more")
    return base, factor


def to_hf_weights(c: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]:
    """All weights by transformers' names, from all weights by glasslm's names."""
    hf_weights = {hf_name: weights[name] for name, hf_name in hf_names(c, weights).items()}
    if c.bias:  # glasslm's keys have no bias
        for i in range(c.n_layers):
            name = f"model.layers.{i}.self_attn.k_proj"
            hf_weights[f"{name}.bias"] = np.zeros(len(hf_weights[f"{name}.weight"]), np.float32)
    if c.scale_embeddings:  # the scale goes into the embeddings, and the head is kept without it
        embedding = hf_weights["model.embed_tokens.weight"]
        hf_weights.setdefault("lm_head.weight", embedding)
        hf_weights["model.embed_tokens.weight"] = embedding * math.sqrt(c.d_model)
    return hf_weights


def from_hf_weights(
    c: ModelConfig, hf_weights: dict[str, Array], names: list[str]
) -> dict[str, Array]:
    """The weights `names` of the parameter table; they are removed from `hf_weights`.

    Raises InputError where one is missing, or keys have a bias that is not zero.
    """
    weights = {}
    for name, hf_name in hf_names(c, names).items():
        if hf_name not in hf_weights:
            raise InputError(
                f"the model lacks the weight {hf_name}, which its config.json asks for"
            )
        weights[name] = hf_weights.pop(hf_name)
    for hf_name in [name for name in hf_weights if name.endswith("self_attn.k_proj.bias")]:
        if hf_weights.pop(hf_name).any():
            raise InputError(
                f"the model's {hf_name} is not zero: expected zeros, because glasslm's keys have "
                "no bias"
            )
    if c.tie_embeddings:
        drop_tied_head(hf_weights, weights["embedding.weight"])
    return weights


# glasslm's names -> transformers' names, of weights outside the blocks and of modules inside them.
TOP_LEVEL = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
             "head.weight": "lm_head.weight"}  # fmt: skip
MODULES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
MIXTRAL = {"router": "block_sparse_moe.gate", "experts": "block_sparse_moe.experts",
           "gate": "w1", "up": "w3", "down": "w2"}  # fmt: skip
QWEN3_MOE = {"router": "mlp.gate", "experts": "mlp.experts",
             "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}  # fmt: skip


def hf_names(c: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """glasslm's name -> transformers' name of each weight.

    blocks.0.attention.q.weight -> model.layers.0.self_attn.q_proj.weight
    """
    return {name: _hf_name(c, name) for name in names}


def _hf_name(c: ModelConfig, name: str) -> str:
    if name in TOP_LEVEL:
        return TOP_LEVEL[name]
    _, i, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    if module in MODULES:
        return f"model.layers.{i}.{MODULES[module]}.{kind}"
    words = QWEN3_MOE if c.qk_norm else MIXTRAL
    if module == "feedforward.router":
        return f"model.layers.{i}.{words['router']}.{kind}"
    _, _, expert, matrix = module.split(".")  # feedforward.experts.3.up
    return f"model.layers.{i}.{words['experts']}.{expert}.{words[matrix]}.{kind}"
