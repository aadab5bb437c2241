"""The Llama family in transformers: Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE and SmolLM3.

Mistral adds a window, Mixtral experts, Qwen2 biases of queries, keys and values, Qwen3 qk-norm,
Qwen3-MoE both experts and qk-norm, and SmolLM3 layers without positions. The members differ in a
few names and keys. Weights keep their shapes: glasslm and transformers both store (out, in)
matrices and rotate split halves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from glasslm.config.schema import FeedForward, ModelConfig
from glasslm.interop.config_keys import known_values
from glasslm.interop.family import Family
from glasslm.interop.layer_types import read_layer_types, write_layer_types
from glasslm.interop.rope_settings import read_rope, write_rope
from glasslm.interop.support import ATTENTION, Support
from glasslm.interop.untrusted_json import Values, require_supported
from glasslm.interop.weight_names import WeightNames

HIDDEN_ACTS: dict[str, str] = {
    "swiglu": "silu", "geglu": "gelu_pytorch_tanh", "geglu_exact": "gelu",
}  # fmt: skip
# Activations of a config.json that glasslm computes, by their names in transformers.
ACTIVATIONS: dict[str, FeedForward] = {
    "silu": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu": "geglu_exact",
}


def write_common(c: ModelConfig) -> dict[str, Any]:
    """The values of config.json that all members have."""
    return {
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_size,
        "hidden_act": HIDDEN_ACTS[c.feedforward],
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        **write_rope(c),
        "attention_dropout": c.attention_dropout,
    }


def read_common(values: Values, activation_key: str = "hidden_act") -> dict[str, Any]:
    """The fields of ModelConfig that all members have, from known values."""
    width, heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    head_size = values.integer("head_dim", width // max(1, heads))
    activation = values.string(activation_key, "silu")
    require_supported(
        activation in ACTIVATIONS, activation_key, activation[:100], " or ".join(ACTIVATIONS)
    )
    return {
        "d_model": width,
        "n_layers": values.integer("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": values.integer("num_key_value_heads", heads),
        "head_dim": 0 if head_size * heads == width else head_size,
        "d_ff": values.integer("intermediate_size"),
        "block_size": values.integer("max_position_embeddings"),
        "attention_dropout": values.number("attention_dropout", 0.0),
        "norm_eps": values.number("rms_norm_eps"),
        "feedforward": ACTIVATIONS[activation],
        "tie_embeddings": values.boolean("tie_word_embeddings", False),
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
    "qwen2": {
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
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
    "smollm3": {
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
    },
}


def read_config(kind: str, values: Values) -> ModelConfig:
    """The model that a config.json of a member describes.

    Raises InputError for an option that glasslm does not have.
    """
    values = known_values(values).with_defaults(DEFAULTS[kind])
    if kind == "qwen3_moe":
        values = values.with_value("intermediate_size", values.integer("moe_intermediate_size"))
    biased = {
        "qkvo": values.boolean("attention_bias", False),
        "m": values.boolean("mlp_bias", False),
    }
    modules = [*"qkvo"] * biased["qkvo"] + ["mlp"] * biased["m"]
    modules = [*"qkv"] if kind == "qwen2" else modules
    return ModelConfig(
        **read_common(values),
        **read_rope(values, values.object("rope_parameters")),
        **_attention_kinds(kind, values),
        **_experts(kind, values),
        qk_norm=kind.startswith("qwen3"),
        bias_targets=",".join(modules),
    )


def _attention_kinds(kind: str, values: Values) -> dict[str, Any]:
    """The fields window and attention_pattern."""
    n_layers = values.integer("num_hidden_layers")
    if kind == "smollm3":
        return _positionless_layers(values, n_layers)
    layers = values.array("layer_types")
    window = 0 if kind == "llama" else values.integer("sliding_window", 0)
    if kind.startswith("qwen") and not values.boolean("use_sliding_window", False):
        window = 0
    if kind in ("qwen2", "qwen3"):
        if not layers and window:
            full = min(n_layers, values.integer("max_window_layers"))
            layers = ["full_attention"] * full + ["sliding_attention"] * (n_layers - full)
        return read_layer_types(layers, n_layers, window)
    if layers:  # of the other model types transformers ignores them, so they may only agree
        layer_type = "sliding_attention" if window else "full_attention"
        require_supported(
            layers == [layer_type] * n_layers,
            "layer_types",
            str(layers)[:100],
            f"{layer_type} in each of the {n_layers} layers, or no layer_types",
        )
    return {"window": window}


def _positionless_layers(values: Values, n_layers: int) -> dict[str, Any]:
    """The pattern of SmolLM3: 0 in no_rope_layers is a layer without RoPE."""
    has_window = values.boolean("use_sliding_window", False) and values.integer("sliding_window", 0)
    require_supported(not has_window, "use_sliding_window", "true", "false")
    types = values.array("layer_types")
    require_supported(
        not types or types == ["full_attention"] * n_layers, "layer_types", str(types)[:100],
        "full_attention in each layer",
    )  # fmt: skip
    interval = values.integer("no_rope_layer_interval", 4)
    require_supported(interval > 0, "no_rope_layer_interval", interval, "1 or more")
    has_rope = values.array("no_rope_layers") or [
        int((layer + 1) % interval != 0) for layer in range(min(n_layers, 1 << 16))
    ]
    require_supported(
        len(has_rope) == n_layers and all(flag in (0, 1) for flag in has_rope), "no_rope_layers",
        str(has_rope)[:100], f"0 or 1 for each of the {n_layers} layers",
    )  # fmt: skip
    return {"attention_pattern": "" if all(has_rope) else "".join("nf"[flag] for flag in has_rope)}


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


def write_config(kind: str, c: ModelConfig) -> dict[str, Any]:
    """The values of a member's config.json."""
    values = write_common(c)
    if kind in ("llama", "smollm3"):
        values["attention_bias"] = bool(c.biased_modules & ATTENTION)
        values["mlp_bias"] = "mlp" in c.biased_modules
    if kind in ("mistral", "mixtral"):
        values["sliding_window"] = c.window or None
    if kind in ("qwen2", "qwen3"):
        values |= {
            "use_sliding_window": bool(c.window),
            "sliding_window": c.window or None,
            "max_window_layers": 0 if c.window else c.n_layers,
            "layer_types": write_layer_types(c),
        }
    if kind == "qwen3_moe" and c.window:
        values |= {"use_sliding_window": True, "sliding_window": c.window, "max_window_layers": 0}
    if kind == "smollm3":
        has_rope = [int(c.layer_kind(layer) != "n") for layer in range(c.n_layers)]
        values |= {"no_rope_layers": has_rope, "use_sliding_window": False}
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


# glasslm's names -> transformers' names, of modules outside the blocks and inside them.
TOP_LEVEL = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
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
EXPERTS: dict[str, dict[str, str]] = {
    "mixtral": {
        "feedforward.router": "block_sparse_moe.gate",
        "feedforward.experts": "block_sparse_moe.experts",
        "experts.gate": "w1", "experts.up": "w3", "experts.down": "w2",
    },
    "qwen3_moe": {
        "feedforward.router": "mlp.gate",
        "feedforward.experts": "mlp.experts",
        "experts.gate": "gate_proj", "experts.up": "up_proj", "experts.down": "down_proj",
    },
}  # fmt: skip


def names(kind: str, c: ModelConfig) -> WeightNames:
    """The names of a member's weights."""
    slots: set[str] = set()
    if kind == "qwen2":
        slots = {f"attention.{word}" for word in "qkv"}
    elif c.biased_modules & ATTENTION:
        slots = {f"attention.{word}" for word in "qkvo"}
    return WeightNames(
        TOP_LEVEL, "model.layers", MODULES | EXPERTS.get(kind, {}), bias_slots=frozenset(slots)
    )


def _one_expert_refusals(c: ModelConfig) -> list[str]:
    if c.n_experts and c.experts_per_token == 1:
        return [
            "it weights a token's only expert by the expert's probability (--experts-per-token 2, "
            "or --qk-norm)"
        ]
    return []


def _member(kind: str, architecture: str, **support: Any) -> Family:
    shared: dict[str, Any] = {"scaled_embeddings": (False, True)}
    return Family(
        kind,
        architecture,
        Support(**shared | support),
        partial(read_config, kind),
        partial(write_config, kind),
        partial(names, kind),
        **({"more_refusals": _one_expert_refusals} if kind == "mixtral" else {}),
    )


FULL, ANY_WINDOW = frozenset("f"), frozenset("fw")
FAMILIES = (
    _member("llama", "LlamaForCausalLM", biases=ATTENTION | {"mlp"}),
    _member("mistral", "MistralForCausalLM", layer_kinds=ANY_WINDOW),
    _member("mixtral", "MixtralForCausalLM", layer_kinds=ANY_WINDOW, experts=True),
    _member("qwen3", "Qwen3ForCausalLM", layer_kinds=ANY_WINDOW, has_patterns=True, qk_norm=True),
    _member(
        "qwen3_moe", "Qwen3MoeForCausalLM", layer_kinds=ANY_WINDOW, qk_norm=True, experts=True
    ),
    _member(
        "qwen2", "Qwen2ForCausalLM", layer_kinds=ANY_WINDOW, has_patterns=True,
        biases=frozenset("qkv"),
    ),
    _member(
        "smollm3", "SmolLM3ForCausalLM", layer_kinds=frozenset("fn"),
        biases=ATTENTION | {"mlp"},
    ),
)  # fmt: skip
