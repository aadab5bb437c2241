"""Merging LoRA adapters into the weights: W + alpha / r B A. arXiv:2106.09685, section 4.1.

The parameter table has the adapters, and the engines compute with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig


def merge_adapters(
    weights: dict[str, NDArray[Any]], config: ModelConfig
) -> dict[str, NDArray[Any]]:
    """The weights of the model without adapters that computes the same, by name.

    `weights` have the names and shapes of the table of `config`, and so has the result for
    `without_adapters(config)`. Without adapters they are returned unchanged. Products are computed
    in float64 and rounded once, to the wider type of weight and adapter, because adapters trained
    in float64 may belong to float32 weights.
    """
    merged = {name: array for name, array in weights.items() if ".lora_" not in name}
    for name in weights:
        module, _, kind = name.rpartition(".")
        if kind == "lora_a":
            dtype = np.result_type(weights[f"{module}.weight"], weights[name])
            merged[f"{module}.weight"] = effective_matrix(weights, module, config).astype(dtype)
    return merged


def effective_matrix(
    weights: Mapping[str, NDArray[Any]], module: str, config: ModelConfig
) -> NDArray[np.float64]:
    """(out, in): the matrix of a module such as blocks.0.attention.o, with its adapter."""
    matrix = weights[f"{module}.weight"].astype(np.float64)
    if f"{module}.lora_a" in weights:
        a, b = (weights[f"{module}.lora_{word}"].astype(np.float64) for word in "ab")
        matrix += (config.lora_alpha / config.lora_rank) * (b @ a)
    return matrix


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The architecture of the merged model."""
    return dataclasses.replace(config, lora_rank=0)
