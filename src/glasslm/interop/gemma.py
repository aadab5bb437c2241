"""Gemma 1, 2 and 3 (text) and Phi-3 in transformers: as Llama, with other norms or fused matrices.

Gemma scales its embeddings and multiplies by 1 + w in its norms. Gemma 2 and 3 also normalize what
a sublayer returns, and alternate windows with full attention. Gemma 2 has soft caps, Gemma 3
qk-norm and a base of RoPE for its window layers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from glasslm.config.schema import ModelConfig
from glasslm.interop.config_keys import known_values
from glasslm.interop.family import Family
from glasslm.interop.layer_types import read_layer_types, write_layer_types
from glasslm.interop.llama import MODULES, TOP_LEVEL, read_common, write_common
from glasslm.interop.rope_settings import read_rope, write_rope
from glasslm.interop.support import ATTENTION, Support
from glasslm.interop.untrusted_json import Values, require_supported
from glasslm.interop.weight_names import GATE_UP, QKV, WeightNames

SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # Gemma 2's defaults
DEFAULT_BASES = {FULL: 1e6, SLIDING: 1e4}  # of Gemma 3


def _read_gemma(kind: str, values: Values) -> ModelConfig:
    values = known_values(values).with_defaults(DEFAULTS)
    if kind == "gemma" and values.values.get("hidden_act") == "gelu":
        values = values.with_value("hidden_act", "gelu_pytorch_tanh")  # an old spelling
    common = read_common(values, "hidden_act" if kind == "gemma" else "hidden_activation")
    biased = values.boolean("attention_bias", False)
    fields: dict[str, Any] = {
        **common,
        "norm": "rmsnorm1p",
        "scale_embeddings": True,
        "bias_targets": "q,k,v,o" if biased else "",
    }
    if kind == "gemma":
        return ModelConfig(**fields, **read_rope(values, values.object("rope_parameters")))
    scalar = values.number("query_pre_attn_scalar")
    require_supported(scalar > 0, "query_pre_attn_scalar", scalar, "above 0")
    head_size = common["head_dim"] or common["d_model"] // max(1, common["n_heads"])
    fields |= {
        "norm_position": "sandwich",
        "attention_scale": 0.0 if scalar == head_size else scalar**-0.5,
    }
    if kind == "gemma2":
        attention_cap, logit_cap = (
            values.number(name, default) if name not in values.values or values.values[name]
            is not None else 0.0
            for name, default in SOFTCAPS.items()
        )  # fmt: skip
        return ModelConfig(
            **fields,
            attention_softcap=attention_cap,
            logit_softcap=logit_cap,
            **read_rope(values, values.object("rope_parameters")),
            **_windows(values, period=2),
        )
    windows = _windows(values, values.integer("sliding_window_pattern", 6))
    return ModelConfig(**fields, **_read_bases(values, windows), **windows, qk_norm=True)


def _windows(values: Values, period: int) -> dict[str, Any]:
    """The fields window and attention_pattern; by default each `period`-th layer sees all."""
    n_layers = values.integer("num_hidden_layers")
    require_supported(period > 0, "sliding_window_pattern", period, "1 or more")
    layers = values.array("layer_types") or [
        FULL if (layer + 1) % period == 0 else SLIDING for layer in range(min(n_layers, 1 << 16))
    ]
    return read_layer_types(layers, n_layers, values.integer("sliding_window"))


def _read_bases(values: Values, windows: dict[str, Any]) -> dict[str, Any]:
    """The fields of RoPE of Gemma 3, which has one for each type of layer."""
    rope = values.object("rope_parameters")
    by_type = {kind: rope.object(kind) for kind in (FULL, SLIDING)}
    if not any(by_type.values()):  # an older file: the scaling of full layers alone
        local = values.number("rope_local_base_freq", DEFAULT_BASES[SLIDING])
        fields = read_rope(values, rope, DEFAULT_BASES[FULL])
    else:
        sliding = by_type[SLIDING]
        kind = sliding.string("rope_type", sliding.string("type", "default"))
        require_supported(kind == "default", f"{SLIDING} rope_type", kind, "default")
        local = sliding.number("rope_theta", DEFAULT_BASES[SLIDING])
        fields = read_rope(values, by_type[FULL], DEFAULT_BASES[FULL])
    if not windows["window"]:
        return fields
    if not windows.get("attention_pattern"):  # windows alone
        return {"position": "rope", "rope_base": local}
    return fields | {"window_rope_base": local}


def _write_gemma(kind: str, c: ModelConfig) -> dict[str, Any]:
    values = write_common(c) | {"attention_bias": bool(c.biased_modules & ATTENTION)}
    if kind == "gemma":
        return values
    del values["hidden_act"]
    scale = c.attention_scale or c.head_size**-0.5
    scalar = scale**-2
    whole = round(scalar)
    values |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": whole if math.isclose(scalar, whole, rel_tol=1e-6) else scalar,
        "sliding_window": c.window or c.block_size,
        "layer_types": write_layer_types(c),
        "attn_logit_softcapping": c.attention_softcap or None,
        "final_logit_softcapping": c.logit_softcap or None,
    }
    if kind == "gemma3_text":
        rope = write_rope(c)
        scaling = rope["rope_scaling"] or {"rope_type": "default"}
        local = c.window_rope_base or rope["rope_theta"]
        del values["rope_theta"], values["rope_scaling"]
        values["rope_parameters"] = {
            FULL: {"rope_theta": rope["rope_theta"], **scaling},
            SLIDING: {"rope_theta": local, "rope_type": "default"},
        }
    return values


GEMMA2_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "feedforward_norm": "pre_feedforward_layernorm",
    "feedforward_output_norm": "post_feedforward_layernorm",
}


def _gemma_names(kind: str, c: ModelConfig) -> WeightNames:
    slots = {*QKV, "attention.o"} if c.biased_modules & ATTENTION else set()
    modules = MODULES if kind == "gemma" else MODULES | GEMMA2_NORMS
    return WeightNames(TOP_LEVEL, "model.layers", modules, bias_slots=frozenset(slots))


def _gemma_refusals(kind: str, c: ModelConfig) -> list[str]:
    """What the three differ in, besides their variants."""
    reasons = []
    scalar = (c.attention_scale or c.head_size**-0.5) ** -2
    if kind != "gemma" and not math.isclose(scalar, round(scalar), rel_tol=1e-6):
        reasons.append("1 / attention_scale² is no whole number (--attention-scale 0)")
    if kind == "gemma3_text" and (c.attention_softcap or c.logit_softcap):
        reasons.append("it has soft caps (--attention-softcap 0 --logit-softcap 0)")
    has_one_base = "w" in c.layer_kinds and not c.window_rope_base
    if kind == "gemma3_text" and has_one_base and c.rope_scaling != "none":
        reasons.append(f"its window layers are scaled (--window-rope-base {c.rope_base:g})")
    if kind != "gemma" and c.d_model % c.n_heads:
        reasons.append(f"its heads do not divide its width (--d-model {c.n_heads * c.head_size})")
    return reasons


def _gemma(kind: str, architecture: str, **support: Any) -> Family:
    shared: dict[str, Any] = {
        "norms": ("rmsnorm1p",), "feedforwards": ("geglu",), "biases": ATTENTION,
        "scaled_embeddings": (True,),
    }  # fmt: skip
    return Family(
        kind,
        architecture,
        Support(**shared | support),
        partial(_read_gemma, kind),
        partial(_write_gemma, kind),
        partial(_gemma_names, kind),
        partial(_gemma_refusals, kind),
    )


def _read_phi3(values: Values) -> ModelConfig:
    values = known_values(values).with_defaults({"rms_norm_eps": 1e-5})
    fields = read_common(values)
    return ModelConfig(
        **fields,
        **read_rope(values, values.object("rope_parameters")),
        dropout=values.number("resid_pdrop", 0.0),
        window=values.integer("sliding_window", 0),
    )


def _write_phi3(c: ModelConfig) -> dict[str, Any]:
    values = write_common(c)
    del values["head_dim"]
    return values | {
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "sliding_window": c.window or None,
        "original_max_position_embeddings": c.block_size,
    }


def _phi3_names(c: ModelConfig) -> WeightNames:
    fused = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP}
    return WeightNames(TOP_LEVEL, "model.layers", MODULES, fused)


FAMILIES = (
    _gemma("gemma", "GemmaForCausalLM"),
    _gemma(
        "gemma2", "Gemma2ForCausalLM", norm_positions=("sandwich",), attention_scale=True,
        layer_kinds=frozenset("fw"), has_patterns=True, softcaps=True,
    ),
    _gemma(
        "gemma3_text", "Gemma3ForCausalLM", norm_positions=("sandwich",), attention_scale=True,
        layer_kinds=frozenset("fw"), has_patterns=True, qk_norm=True, window_rope_base=True,
        softcaps=True,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        Support(
            feedforwards=("swiglu", "geglu"), rope_scalings=("none", "ntk"),
            layer_kinds=frozenset("fw"), has_head_dim=False, partial_rotary=True,
        ),
        _read_phi3,
        _write_phi3,
        _phi3_names,
    ),
)  # fmt: skip
