"""Llama and its next of kin in transformers: Mistral (a window), Mixtral (experts), Qwen3 (qk-norm), Qwen3-MoE (both).

They differ from each other in a few names and keys. Weights keep their shapes: both sides have (out, in) matrices and
rotate split halves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import FeedForward, ModelConfig
from glasslm.errors import InputError
from glasslm.interop.untrusted_json import Values, drop_tied_head, refuse_others

Array = NDArray[Any]

MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe")
ACTIVATIONS: dict[str, FeedForward] = {
    "silu": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
}


def refusals(c: ModelConfig) -> list[str]:
    """Why no model of this family computes what this one does; empty where one does."""
    reasons = []
    if c.norm != "rmsnorm":
        reasons.append(f"its norm is {c.norm} (--norm rmsnorm)")
    if c.norm_position != "pre":
        reasons.append("it normalises after the sublayers (--norm-position pre)")
    if not c.gated:
        reasons.append(
            f"its feed-forward is {c.feedforward}, without a gate (--feedforward swiglu)"
        )
    if c.position != "rope":
        reasons.append(f"its positions are {c.position} (--position rope)")
    kind = model_type(c)
    if c.bias and kind != "llama":
        reasons.append(f"a {kind} has no biases (--no-bias)")
    if c.shared_expert:
        reasons.append("one expert computes every token (--no-shared-expert)")
    if c.n_experts and c.experts_per_token == 1 and kind == "mixtral":
        reasons.append(
            "a token's only expert is weighted by its probability (--experts-per-token 2, or --qk-norm)"
        )
    return reasons


def model_type(c: ModelConfig) -> str:
    """Which member of the family."""
    if c.qk_norm:
        return "qwen3_moe" if c.n_experts else "qwen3"
    if c.n_experts:
        return "mixtral"
    return "mistral" if c.window else "llama"


def to_config(c: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """config.json of a model without refusals."""
    c, kind = c.resolved(), model_type(c)
    base = c.rope_base
    if c.rope_scaling == "ntk" and c.head_size > 2:  # another base is all that it is
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
        "hidden_act": {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}[c.feedforward],
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
            "num_experts": c.n_experts, "num_experts_per_tok": c.experts_per_token, "moe_intermediate_size": c.d_ff,
            "norm_topk_prob": c.experts_per_token > 1,
        }  # fmt: skip
    return values


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


# What transformers takes for a key that config.json does not have; null means none of it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {"max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "num_key_value_heads": 8,
                "sliding_window": 4096},
    "mixtral": {"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6,
                "num_experts": 8, "num_experts_per_tok": 2},
    "qwen3": {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128,
              "sliding_window": 4096, "max_window_layers": 28},
    "qwen3_moe": {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "num_key_value_heads": 4,
                  "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8},
}  # fmt: skip


def from_config(values: Values) -> ModelConfig:
    """What a config.json describes. Raises InputError for what glasslm has no switch for."""
    kind = values.word("model_type")
    values = values.over(DEFAULTS[kind])
    width, heads = values.whole("hidden_size"), values.whole("num_attention_heads")
    head_size = values.whole("head_dim", width // max(1, heads))
    refuse_others(
        head_size * heads == width,
        "head_dim",
        head_size,
        f"hidden_size / heads, {width // max(1, heads)}",
    )
    activation = values.word("hidden_act", "silu")
    refuse_others(
        activation in ACTIVATIONS, "hidden_act", activation[:100], " or ".join(ACTIVATIONS)
    )
    biases = {name: values.flag(name, False) for name in ("attention_bias", "mlp_bias")}
    refuse_others(
        len(set(biases.values())) == 1, "attention_bias and mlp_bias", biases, "both or neither"
    )
    base, linear = _rope(values)
    return ModelConfig(
        d_model=width,
        n_layers=values.whole("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=values.whole("num_key_value_heads", heads),
        d_ff=values.whole("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        block_size=values.whole("max_position_embeddings"),
        attention_dropout=values.number("attention_dropout", 0.0),
        norm_eps=values.number("rms_norm_eps"),
        feedforward=ACTIVATIONS[activation],
        position="rope",
        rope_base=base,
        rope_scaling="linear" if linear > 1 else "none",
        rope_factor=linear,
        tie_embeddings=values.flag("tie_word_embeddings", False),
        qk_norm=kind.startswith("qwen3"),
        bias=biases["attention_bias"],
        window=_window(kind, values),
        **_experts(kind, values),
    )


def _window(kind: str, values: Values) -> int:
    """The window of every layer; 0 for none."""
    layers = values.list("layer_types")  # which have the last word
    alike = all(layer == layers[0] for layer in layers)
    known = not layers or layers[0] in ("full_attention", "sliding_attention")
    refuse_others(
        alike and known,
        "layer_types",
        layers[:100],
        "full_attention or sliding_attention in every layer",
    )
    if kind == "llama" or layers[:1] == ["full_attention"]:
        return 0
    if kind.startswith("qwen3") and not values.flag("use_sliding_window", False):
        return 0
    window = values.whole("sliding_window", 0)
    if window and not layers and kind == "qwen3":
        whole = values.whole("max_window_layers")
        refuse_others(whole == 0, "max_window_layers", whole, "0, a window in every layer")
    return window


def _experts(kind: str, values: Values) -> dict[str, Any]:
    if kind not in ("mixtral", "qwen3_moe"):
        return {}
    count = values.whole(
        "num_local_experts", values.whole("num_experts")
    )  # transformers takes both words
    per_token = values.whole("num_experts_per_tok")
    if kind == "mixtral":  # which would give a token's only expert the weight 1
        refuse_others(per_token > 1, "num_experts_per_tok", per_token, "2 or more")
    else:
        divided = values.flag("norm_topk_prob", False)
        refuse_others(
            divided == (per_token > 1), "norm_topk_prob", divided, "true, with 2 or more a token"
        )
        dense = (values.whole("decoder_sparse_step", 1), values.list("mlp_only_layers"))
        refuse_others(
            dense == (1, []),
            "decoder_sparse_step, mlp_only_layers",
            dense,
            "experts in every layer",
        )
    return {"n_experts": count, "experts_per_token": per_token}


def _rope(values: Values) -> tuple[float, float]:
    """Base, and the factor of a linear stretch. Newer files have both in rope_parameters."""
    newer = values.part("rope_parameters")
    told = newer or values.part("rope_scaling")
    base = told.number("rope_theta", values.number("rope_theta", 1e4))
    kind = told.word("rope_type", told.word("type", "default"))
    refuse_others(kind in ("default", "linear"), "rope_type", kind[:100], "default or linear")
    share = told.number("partial_rotary_factor", values.number("partial_rotary_factor", 1.0))
    refuse_others(share == 1, "partial_rotary_factor", share, "1")
    return base, told.number("factor", 1.0) if kind == "linear" else 1.0


def to_weights(c: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]:
    """Weights by their names there, from all of them by their names here."""
    there = {theirs: weights[ours] for ours, theirs in names(c, weights).items()}
    if c.bias:  # keys have none here
        for i in range(c.n_layers):
            name = f"model.layers.{i}.self_attn.k_proj"
            there[f"{name}.bias"] = np.zeros(len(there[f"{name}.weight"]), np.float32)
    if c.scale_embeddings:
        head = there.setdefault("lm_head.weight", there["model.embed_tokens.weight"])
        assert head is not None
        there["model.embed_tokens.weight"] = there["model.embed_tokens.weight"] * math.sqrt(
            c.d_model
        )
    return there


def from_weights(c: ModelConfig, there: dict[str, Array], wanted: list[str]) -> dict[str, Array]:
    """The `wanted` weights of the table, taken out of `there`. Raises InputError where one is missing."""
    here = {}
    for ours, theirs in names(c, wanted).items():
        if theirs not in there:
            raise InputError(f"the model lacks the weight {theirs}, which its config.json asks for")
        here[ours] = there.pop(theirs)
    for name in [name for name in there if name.endswith("self_attn.k_proj.bias")]:
        if there.pop(name).any():
            raise InputError(
                f"the model's {name} is not zero: keys have no bias in glasslm, and rotated ones need it"
            )
    if c.tie_embeddings:
        drop_tied_head(there, here["embedding.weight"])
    return here


OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
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


def names(c: ModelConfig, ours: Any) -> dict[str, str]:
    """Our name -> theirs: blocks.0.attention.q.weight -> model.layers.0.self_attn.q_proj.weight."""
    return {name: _name(c, name) for name in ours}


def _name(c: ModelConfig, name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, i, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    if module in MODULES:
        return f"model.layers.{i}.{MODULES[module]}.{kind}"
    words = QWEN3_MOE if c.qk_norm else MIXTRAL
    if module == "feedforward.router":
        return f"model.layers.{i}.{words['router']}.{kind}"
    _, _, expert, matrix = module.split(".")  # feedforward.experts.3.up
    return f"model.layers.{i}.{words['experts']}.{expert}.{words[matrix]}.{kind}"
