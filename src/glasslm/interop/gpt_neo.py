"""GPT-Neo and OPT in transformers: as GPT-2, with separate matrices of queries, keys and values.

GPT-Neo (TinyStories) alternates full attention and windows, and does not scale its scores. OPT
leaves two rows of its positions unused.
"""

from __future__ import annotations

from typing import Any

from glasslm.config.schema import ModelConfig
from glasslm.interop.config_keys import known_values
from glasslm.interop.family import Family
from glasslm.interop.gpt2 import ACTIVATION_FUNCTIONS, BIASES, read_activation
from glasslm.interop.layer_types import read_layer_types
from glasslm.interop.support import Support
from glasslm.interop.untrusted_json import Values, require_supported
from glasslm.interop.weight_names import QKV, WeightNames

GPT_NEO_TYPES = {"global": "full_attention", "local": "sliding_attention"}
MAX_REPEATS = 10_000  # of a pattern in attention_types


def read_gpt_neo(values: Values) -> ModelConfig:
    """The GPT-Neo that a config.json describes.

    Raises InputError for an option that glasslm does not have.
    """
    values = known_values(values)
    width, n_layers = values.integer("hidden_size", 2048), values.integer("num_layers", 24)
    layers = _gpt_neo_layers(values, n_layers)
    return ModelConfig(
        d_model=width,
        n_layers=n_layers,
        n_heads=values.integer("num_heads", 16),
        d_ff=values.integer("intermediate_size", 0) or 4 * width,
        block_size=values.integer("max_position_embeddings", 2048),
        dropout=values.number("resid_dropout", 0.0),
        attention_dropout=values.number("attention_dropout", 0.0),
        norm="layernorm",
        norm_eps=values.number("layer_norm_epsilon", 1e-5),
        feedforward=read_activation(values, "activation_function", "gelu_new"),
        position="learned",
        tie_embeddings=values.boolean("tie_word_embeddings", True),
        bias_targets="norm,o,mlp",
        attention_scale=1.0,
        **read_layer_types(layers, n_layers, values.integer("window_size", 256)),
    )


def _gpt_neo_layers(values: Values, n_layers: int) -> list[str]:
    """The type of each layer, from [[["global", "local"], 12]]."""
    names: list[Any] = []
    for part in values.array("attention_types") or [[["global", "local"], 12]]:
        is_pattern = (
            isinstance(part, list)
            and len(part) == 2
            and isinstance(part[0], list)
            and type(part[1]) is int
            and 0 <= part[1] <= MAX_REPEATS
        )
        require_supported(is_pattern, "attention_types", str(part)[:100], "[[names, repeats], ...]")
        names += part[0] * part[1] if len(names) <= n_layers else []
    known = all(isinstance(name, str) and name in GPT_NEO_TYPES for name in names)
    require_supported(
        known and len(names) == n_layers, "attention_types", str(names)[:100],
        f"global or local for each of the {n_layers} layers",
    )  # fmt: skip
    listed = values.array("attention_layers") or names
    require_supported(
        listed == names, "attention_layers", str(listed)[:100], "those of attention_types"
    )
    return [GPT_NEO_TYPES[name] for name in names]


def write_gpt_neo(c: ModelConfig) -> dict[str, Any]:
    """The values of a GPT-Neo's config.json."""
    layers = ["local" if c.layer_kind(layer) == "w" else "global" for layer in range(c.n_layers)]
    return {
        "hidden_size": c.d_model,
        "num_layers": c.n_layers,
        "num_heads": c.n_heads,
        "intermediate_size": c.d_ff,
        "max_position_embeddings": c.block_size,
        "activation_function": ACTIVATION_FUNCTIONS[c.feedforward],
        "layer_norm_epsilon": c.norm_eps,
        "resid_dropout": c.dropout,
        "embed_dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "attention_types": [[layers, 1]],
        "attention_layers": layers,
        "window_size": c.window or c.block_size,
    }


def gpt_neo_names(c: ModelConfig) -> WeightNames:
    """The names of a GPT-Neo's weights."""
    return WeightNames(
        {"embedding": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head",
         "position": "transformer.wpe"},
        "transformer.h",
        {
            "attention_norm": "ln_1", "feedforward_norm": "ln_2",
            **{module: f"attn.attention.{module[-1]}_proj" for module in QKV},
            "attention.o": "attn.attention.out_proj",
            "feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj",
        },
        bias_slots=frozenset({"attention.o", "attention_norm", "feedforward_norm", "norm",
                              "feedforward.up", "feedforward.down"}),
    )  # fmt: skip


def _unscaled_refusals(c: ModelConfig) -> list[str]:
    if c.attention_scale != 1:
        return ["it scales its attention scores (--attention-scale 1)"]
    return []


def read_opt(values: Values) -> ModelConfig:
    """The OPT that a config.json describes.

    Raises InputError for an option that glasslm does not have.
    """
    values = known_values(values)
    width = values.integer("hidden_size", 768)
    projected = values.integer("word_embed_proj_dim", width)
    require_supported(projected == width, "word_embed_proj_dim", projected, f"{width}")
    has_bias = values.boolean("enable_bias", True)
    return ModelConfig(
        d_model=width,
        n_layers=values.integer("num_hidden_layers", 12),
        n_heads=values.integer("num_attention_heads", 12),
        d_ff=values.integer("ffn_dim", 3072),
        block_size=values.integer("max_position_embeddings", 2048),
        dropout=values.number("dropout", 0.1),
        attention_dropout=values.number("attention_dropout", 0.0),
        norm="layernorm",
        norm_position="pre" if values.boolean("do_layer_norm_before", True) else "post",
        feedforward=read_activation(values, "activation_function", "relu"),
        position="learned",
        tie_embeddings=values.boolean("tie_word_embeddings", True),
        bias=has_bias,
        bias_targets="" if has_bias else "norm",
    )


def write_opt(c: ModelConfig) -> dict[str, Any]:
    """The values of an OPT's config.json."""
    return {
        "hidden_size": c.d_model,
        "word_embed_proj_dim": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "ffn_dim": c.d_ff,
        "max_position_embeddings": c.block_size,
        "activation_function": ACTIVATION_FUNCTIONS[c.feedforward],
        "do_layer_norm_before": c.norm_position == "pre",
        "enable_bias": bool(c.biased_modules - {"norm"}),
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
    }


def opt_names(c: ModelConfig) -> WeightNames:
    """The names of an OPT's weights."""
    decoder = "model.decoder"
    slots = {"attention_norm", "feedforward_norm"} | ({"norm"} if c.has_final_norm else set())
    if c.biased_modules - {"norm"}:
        slots |= {*QKV, "attention.o", "feedforward.up", "feedforward.down"}
    return WeightNames(
        {"embedding": f"{decoder}.embed_tokens", "position": f"{decoder}.embed_positions",
         "norm": f"{decoder}.final_layer_norm", "head": "lm_head"},
        f"{decoder}.layers",
        {
            "attention_norm": "self_attn_layer_norm", "feedforward_norm": "final_layer_norm",
            **{module: f"self_attn.{module[-1]}_proj" for module in QKV},
            "attention.o": "self_attn.out_proj",
            "feedforward.up": "fc1", "feedforward.down": "fc2",
        },
        skipped_positions=2,
        bias_slots=frozenset(slots),
    )  # fmt: skip


def _eps_refusals(c: ModelConfig) -> list[str]:
    return [] if c.norm_eps == 1e-5 else [f"its epsilon is {c.norm_eps:g} (--norm-eps 1e-5)"]


UNGATED = ("gelu", "gelu_exact", "relu", "relu2")
FAMILIES = (
    Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        Support(
            norms=("layernorm",), feedforwards=UNGATED, positions=("learned",),
            biases=frozenset({"norm", "o", "mlp"}), layer_kinds=frozenset("fw"), has_patterns=True,
            shares_keys=False, has_head_dim=False, attention_scale=True,
        ),
        read_gpt_neo,
        write_gpt_neo,
        gpt_neo_names,
        _unscaled_refusals,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        Support(
            norms=("layernorm",), norm_positions=("pre", "post"), feedforwards=UNGATED,
            positions=("learned",), biases=BIASES, shares_keys=False, has_head_dim=False,
        ),
        read_opt,
        write_opt,
        opt_names,
        _eps_refusals,
    ),
)  # fmt: skip
