"""Rotary positions in a config.json of transformers: rope_parameters to ModelConfig and back."""

from __future__ import annotations

import math
from typing import Any

from glasslm.config.schema import ModelConfig
from glasslm.interop.untrusted_json import Values, require_supported

# Keys of rope_parameters that each rope_type has, besides those of all types.
ROPE_TYPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
         "truncate", "original_max_position_embeddings"}
    ),
}  # fmt: skip


def read_rope(
    values: Values, rope: Values, base: float = 1e4, share: float = 1.0
) -> dict[str, Any]:
    """The fields of ModelConfig for RoPE: `rope` is the object rope_parameters of the file.

    `base` and `share` are transformers' defaults of rope_theta and partial_rotary_factor. Raises
    InputError for settings that glasslm does not have.
    """
    kind = rope.string("rope_type", rope.string("type", "default"))
    fields: dict[str, Any] = {
        "position": "rope",
        "rope_base": rope.number("rope_theta", values.number("rope_theta", base)),
        "partial_rotary_factor": rope.number(
            "partial_rotary_factor", values.number("partial_rotary_factor", share)
        ),
    }
    if kind == "default":
        return fields
    factor = rope.number("factor")
    require_supported(factor >= 1, "factor", factor, "1 or more")
    if factor > 1:
        fields |= {"rope_scaling": kind, "rope_factor": factor}
    context = values.integer("max_position_embeddings")
    if kind == "dynamic":
        fields["rope_original_context"] = context
    if kind in ("llama3", "yarn"):
        fields["rope_original_context"] = rope.integer("original_max_position_embeddings", context)
    if kind == "llama3":
        fields["rope_low_rotations"] = rope.number("low_freq_factor")
        fields["rope_high_rotations"] = rope.number("high_freq_factor")
    if kind == "yarn":
        fields["rope_low_rotations"] = rope.number("beta_slow", 1.0) or 1.0
        fields["rope_high_rotations"] = rope.number("beta_fast", 32.0) or 32.0
        amplitude = _yarn_amplitude(rope, factor)
        is_computed = factor > 1 or amplitude in (0.0, 1.0)
        require_supported(is_computed, "attention_factor", amplitude, "1 where factor is 1")
        fields["rope_attention_factor"] = amplitude
        truncate = rope.boolean("truncate", True)
        require_supported(truncate, "truncate", truncate, "true")
    return fields if factor > 1 else {name: fields[name] for name in tuple(fields)[:3]}


def _yarn_amplitude(rope: Values, factor: float) -> float:
    """attention_factor, or what follows from mscale and mscale_all_dim; 0: the default."""
    if rope.values.get("attention_factor") is not None:
        given = rope.number("attention_factor")
        require_supported(given > 0, "attention_factor", given, "more than 0")
        return given
    scale, scale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if not (scale and scale_all):
        return 0.0
    numerator, denominator = (0.1 * s * math.log(factor) + 1 for s in (scale, scale_all))
    return numerator / denominator


def write_rope(c: ModelConfig) -> dict[str, Any]:
    """rope_theta, rope_scaling and, where it is not 1, partial_rotary_factor of a config.json."""
    values: dict[str, Any] = {"rope_theta": rope_base(c), "rope_scaling": _rope_scaling(c)}
    if c.partial_rotary_factor != 1:
        values["partial_rotary_factor"] = c.partial_rotary_factor
    return values


def _rope_scaling(c: ModelConfig) -> dict[str, Any] | None:
    if c.rope_scaling in ("none", "ntk") or _is_stretched_dynamic(c):
        return None
    scaling: dict[str, Any] = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = round(_original_context(c))
    if c.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": c.rope_low_rotations, "high_freq_factor": c.high_rotations}
    if c.rope_scaling == "yarn":
        scaling |= {"beta_slow": c.rope_low_rotations, "beta_fast": c.high_rotations}
        if c.rope_attention_factor:
            scaling["attention_factor"] = c.rope_attention_factor
    return scaling


def rope_refusals(c: ModelConfig) -> list[str]:
    """Why transformers cannot scale RoPE as this model does; empty if it can."""
    if c.rope_scaling in ("llama3", "yarn") and _original_context(c) % 1:
        return [
            f"its original context is {_original_context(c):g} tokens (--rope-original-context "
            f"{round(_original_context(c))})"
        ]
    return []


def _original_context(c: ModelConfig) -> float:
    return c.rope_original_context or c.block_size / c.rope_factor


def rope_base(c: ModelConfig) -> float:
    """The base that transformers needs: ntk scaling is a larger base."""
    R = c.rotary_size
    growth = 1.0
    if c.rope_scaling == "ntk":
        growth = c.rope_factor
    elif _is_stretched_dynamic(c):
        growth = c.rope_factor * c.block_size / _original_context(c) - (c.rope_factor - 1)
    return c.rope_base * growth ** (R / (R - 2)) if R > 2 else c.rope_base


def _is_stretched_dynamic(c: ModelConfig) -> bool:
    """Whether a dynamic scaling stretches this context: transformers stretches that of each text.

    With the base of the whole context it computes the same for texts of every length.
    """
    return c.rope_scaling == "dynamic" and c.block_size > _original_context(c)
