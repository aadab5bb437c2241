"""Families with LayerNorm and RoPE in transformers: GPT-NeoX (Pythia), Phi, StableLM, StarCoder2.

GPT-NeoX, Phi and StableLM rotate a part of each head. GPT-NeoX computes attention and feed-forward
side by side, Phi too, from one norm. GPT-NeoX stores q, k and v of one head below each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glasslm.config.schema import ModelConfig
from glasslm.interop.config_keys import known_values
from glasslm.interop.family import Family
from glasslm.interop.gpt2 import ACTIVATION_FUNCTIONS, read_activation
from glasslm.interop.llama import ACTIVATIONS, HIDDEN_ACTS
from glasslm.interop.rope_settings import read_rope, write_rope
from glasslm.interop.support import ATTENTION, Support
from glasslm.interop.untrusted_json import Values, require_supported
from glasslm.interop.weight_names import QKV, WeightNames

UNGATED = ("gelu", "gelu_exact", "relu", "relu2")


def _read_common(values: Values, dropout_key: str, eps_key: str, share: float) -> dict[str, Any]:
    """The fields of ModelConfig that all have; `share` is the default partial_rotary_factor."""
    heads = values.integer("num_attention_heads")
    return {
        "d_model": values.integer("hidden_size"),
        "n_layers": values.integer("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": values.integer("num_key_value_heads", heads),
        "d_ff": values.integer("intermediate_size"),
        "block_size": values.integer("max_position_embeddings"),
        "dropout": values.number(dropout_key, 0.0),
        "attention_dropout": values.number("attention_dropout", 0.0),
        "norm": "layernorm",
        "norm_eps": values.number(eps_key, 1e-5),
        **read_rope(values, values.object("rope_parameters"), share=share),
    }


def _write_common(c: ModelConfig, dropout_key: str, eps_key: str) -> dict[str, Any]:
    """The values of config.json that all have."""
    return {
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "intermediate_size": c.d_ff,
        "max_position_embeddings": c.block_size,
        dropout_key: c.dropout,
        "attention_dropout": c.attention_dropout,
        eps_key: c.norm_eps,
        **write_rope(c),
        "partial_rotary_factor": c.partial_rotary_factor,
    }


def _read_gpt_neox(values: Values) -> ModelConfig:
    values = known_values(values)
    biased = "norm,q,k,v,o,mlp" if values.boolean("attention_bias", True) else "norm,mlp"
    is_parallel = values.boolean("use_parallel_residual", True)
    return ModelConfig(
        **_read_common(values, "hidden_dropout", "layer_norm_eps", 0.25),
        feedforward=read_activation(values, "hidden_act", "gelu"),
        residual="parallel" if is_parallel else "serial",
        tie_embeddings=values.boolean("tie_word_embeddings", False),
        bias_targets=biased,
    )


def _write_gpt_neox(c: ModelConfig) -> dict[str, Any]:
    values = _write_common(c, "hidden_dropout", "layer_norm_eps")
    del values["num_key_value_heads"]
    values["rotary_pct"] = values.pop("partial_rotary_factor")
    values["rotary_emb_base"] = values.pop("rope_theta")
    return values | {
        "hidden_act": ACTIVATION_FUNCTIONS[c.feedforward],
        "use_parallel_residual": c.residual == "parallel",
        "attention_bias": bool(c.biased_modules & ATTENTION),
    }


def _gpt_neox_names(c: ModelConfig) -> WeightNames:
    slots = {"attention_norm", "feedforward_norm", "norm", "feedforward.up", "feedforward.down"}
    if c.biased_modules & ATTENTION:
        slots |= {*QKV, "attention.o"}
    return WeightNames(
        {"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm",
         "head": "embed_out"},
        "gpt_neox.layers",
        {
            "attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
            "attention.o": "attention.dense",
            "feedforward.up": "mlp.dense_h_to_4h", "feedforward.down": "mlp.dense_4h_to_h",
        },
        {"attention.query_key_value": QKV},
        fused_by_head=True,
        bias_slots=frozenset(slots),
    )  # fmt: skip


def _read_phi(values: Values) -> ModelConfig:
    values = known_values(values)
    is_tied = values.boolean("tie_word_embeddings", False)
    require_supported(not is_tied, "tie_word_embeddings", is_tied, "false")
    return ModelConfig(
        **_read_common(values, "resid_pdrop", "layer_norm_eps", 0.5),
        feedforward=read_activation(values, "hidden_act", "gelu_new"),
        residual="parallel_one_norm",
        tie_embeddings=False,
        bias_targets="norm,q,k,v,o,mlp,head",
    )


def _write_phi(c: ModelConfig) -> dict[str, Any]:
    values = _write_common(c, "resid_pdrop", "layer_norm_eps")
    return values | {
        "embd_pdrop": c.dropout,
        "hidden_act": ACTIVATION_FUNCTIONS[c.feedforward],
        "qk_layernorm": False,
    }


def _phi_names(c: ModelConfig) -> WeightNames:
    return WeightNames(
        {"embedding": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"},
        "model.layers",
        {
            "attention_norm": "input_layernorm",
            **{module: f"self_attn.{module[-1]}_proj" for module in QKV},
            "attention.o": "self_attn.dense", "feedforward.up": "mlp.fc1",
            "feedforward.down": "mlp.fc2",
        },
        bias_slots=frozenset({*QKV, "attention.o", "attention_norm", "norm", "feedforward.up",
                              "feedforward.down", "head"}),
    )  # fmt: skip


def _phi_refusals(c: ModelConfig) -> list[str]:
    return ["its head is its embedding matrix (--no-tie-embeddings)"] if c.tie_embeddings else []


def _read_stablelm(values: Values) -> ModelConfig:
    values = known_values(values)
    activation = values.string("hidden_act", "silu")
    require_supported(
        activation in ACTIVATIONS, "hidden_act", activation[:100], " or ".join(ACTIVATIONS)
    )
    is_parallel = values.boolean("use_parallel_residual", False)
    return ModelConfig(
        **_read_common(values, "hidden_dropout", "layer_norm_eps", 0.25),
        feedforward=ACTIVATIONS[activation],
        residual="parallel_one_norm" if is_parallel else "serial",
        tie_embeddings=values.boolean("tie_word_embeddings", False),
        bias_targets="norm,q,k,v" if values.boolean("use_qkv_bias", False) else "norm",
    )


def _write_stablelm(c: ModelConfig) -> dict[str, Any]:
    values = _write_common(c, "hidden_dropout", "layer_norm_eps")
    return values | {
        "hidden_act": HIDDEN_ACTS[c.feedforward],
        "use_parallel_residual": c.residual == "parallel_one_norm",
        "use_qkv_bias": bool(c.biased_modules & ATTENTION),
        "qk_layernorm": False,
    }


def _stablelm_names(c: ModelConfig) -> WeightNames:
    slots = {"attention_norm", "norm"}
    slots |= {"feedforward_norm"} if c.residual == "serial" else set()
    slots |= {*QKV} if c.biased_modules & ATTENTION else set()
    return WeightNames(
        {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
        "model.layers",
        {
            "attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
            **{module: f"self_attn.{module[-1]}_proj" for module in QKV},
            "attention.o": "self_attn.o_proj",
            **{f"feedforward.{word}": f"mlp.{word}_proj" for word in ("gate", "up", "down")},
        },
        bias_slots=frozenset(slots),
    )  # fmt: skip


def _read_starcoder2(values: Values) -> ModelConfig:
    values = known_values(values)
    has_bias = values.boolean("use_bias", True)
    return ModelConfig(
        **_read_common(values, "residual_dropout", "norm_epsilon", 1.0),
        feedforward=read_activation(values, "hidden_act", "gelu_pytorch_tanh"),
        tie_embeddings=values.boolean("tie_word_embeddings", True),
        window=values.integer("sliding_window", 0),
        bias_targets="norm,q,k,v,o,mlp" if has_bias else "norm",
    )


def _write_starcoder2(c: ModelConfig) -> dict[str, Any]:
    values = _write_common(c, "residual_dropout", "norm_epsilon")
    del values["partial_rotary_factor"]
    return values | {
        "embedding_dropout": c.dropout,
        "hidden_act": {"gelu": "gelu_pytorch_tanh"}.get(
            c.feedforward, ACTIVATION_FUNCTIONS[c.feedforward]
        ),
        "use_bias": bool(c.biased_modules - {"norm"}),
        "sliding_window": c.window or None,
    }


def _starcoder2_names(c: ModelConfig) -> WeightNames:
    slots = {"attention_norm", "feedforward_norm", "norm"}
    if c.biased_modules - {"norm"}:
        slots |= {*QKV, "attention.o", "feedforward.up", "feedforward.down"}
    return WeightNames(
        {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
        "model.layers",
        {
            "attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
            **{module: f"self_attn.{module[-1]}_proj" for module in QKV},
            "attention.o": "self_attn.o_proj",
            "feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj",
        },
        bias_slots=frozenset(slots),
    )  # fmt: skip


def _member(
    model_type: str,
    architecture: str,
    functions: tuple[Callable[..., Any], ...],
    **support: Any,
) -> Family:
    shared: dict[str, Any] = {
        "norms": ("layernorm",), "feedforwards": UNGATED, "partial_rotary": True,
        "has_head_dim": False, "biases": ATTENTION | {"norm", "mlp"},
    }  # fmt: skip
    return Family(model_type, architecture, Support(**shared | support), *functions)


FAMILIES = (
    _member(
        "gpt_neox", "GPTNeoXForCausalLM", (_read_gpt_neox, _write_gpt_neox, _gpt_neox_names),
        residuals=("parallel", "serial"), shares_keys=False,
    ),
    _member(
        "starcoder2", "Starcoder2ForCausalLM",
        (_read_starcoder2, _write_starcoder2, _starcoder2_names),
        partial_rotary=False, layer_kinds=frozenset("fw"),
    ),
    _member(
        "phi", "PhiForCausalLM", (_read_phi, _write_phi, _phi_names, _phi_refusals),
        residuals=("parallel_one_norm",), biases=ATTENTION | {"norm", "mlp", "head"},
    ),
    _member(
        "stablelm", "StableLmForCausalLM", (_read_stablelm, _write_stablelm, _stablelm_names),
        feedforwards=("swiglu", "geglu", "geglu_exact"),
        residuals=("serial", "parallel_one_norm"), biases=frozenset({"norm", "q", "k", "v"}),
    ),
)  # fmt: skip
