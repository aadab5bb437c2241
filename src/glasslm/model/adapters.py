"""Adapters made one with the weights they stand beside: W + alpha / r B A. LoRA, arXiv:2106.09685, section 4.1.

The rows of the adapters are in the parameter table; what they do in a pass is in the engines.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig


def merged(weights: dict[str, NDArray[Any]], config: ModelConfig) -> dict[str, NDArray[Any]]:
    """The weights, by name, of a model without adapters that computes the same; as they are where there are none.

    The products are summed in float64 and rounded once, to the wider type of the two: adapters that were trained in
    float64 may stand beside weights of a run in float32.
    """
    found = {name: array for name, array in weights.items() if ".lora_" not in name}
    for name in weights:
        module, _, kind = name.rpartition(".")
        if kind == "lora_a":
            a, b, whole = (weights[f"{module}.{part}"] for part in ("lora_a", "lora_b", "weight"))
            product = b.astype(np.float64) @ a.astype(np.float64)
            product *= config.lora_alpha / config.lora_rank
            found[f"{module}.weight"] = (whole + product).astype(np.result_type(whole, a))
    return found


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The architecture of the merged model."""
    return dataclasses.replace(config, lora_rank=0)
