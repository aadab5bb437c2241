"""transformers' layer_types, full_attention and sliding_attention, as windows and patterns."""

from __future__ import annotations

from typing import Any

from glasslm.config.schema import ModelConfig
from glasslm.interop.untrusted_json import require_supported

LETTERS = {"full_attention": "f", "sliding_attention": "w"}
WORDS = {letter: word for word, letter in LETTERS.items()}


def read_layer_types(layers: list[Any], n_layers: int, window: int) -> dict[str, Any]:
    """The fields window and attention_pattern of a model; without `layers` all are alike.

    Raises InputError for other types, another number of them, and windows without a length.
    """
    if not layers:
        return {"window": window}
    known = all(isinstance(layer, str) and layer in LETTERS for layer in layers)
    require_supported(
        known and len(layers) == n_layers, "layer_types", str(layers)[:100],
        f"full_attention or sliding_attention for each of the {n_layers} layers",
    )  # fmt: skip
    pattern = "".join(LETTERS[layer] for layer in layers)
    if "w" not in pattern:
        return {"window": 0}
    require_supported(
        window > 0, "layer_types", str(layers)[:100], "full_attention, without a sliding_window"
    )
    return {"window": window, "attention_pattern": _shortest_period(pattern)}


def _shortest_period(pattern: str) -> str:
    """The shortest pattern that, repeated, begins like this one; "" for windows alone."""
    for length in range(1, len(pattern) + 1):
        repeated = pattern[:length] * (len(pattern) // length + 1)
        if repeated.startswith(pattern):
            return "" if pattern[:length] == "w" else pattern[:length]
    return pattern


def write_layer_types(c: ModelConfig) -> list[str]:
    """The type of each layer."""
    return [WORDS[c.layer_kind(layer)] for layer in range(c.n_layers)]
