"""The gradient check's cases of the operations of a file, and models that use each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig, OptimizerName
from glasslm.engines import positions
from glasslm.engines.operations import OperationsFile

Array = NDArray[Any]

B, T, H, K, Q = 2, 5, 4, 2, 4  # rows, positions, query heads, key-value heads, head size
N, D, F, V = B * T, 6, 4, 7  # tokens, width, inner width, vocabulary
NORM_EPS = 1e-5

# The settings with which the model of the check uses an operation.
MODEL_SETTINGS: dict[str, dict[str, Any]] = {
    "silu": {"feedforward": "swiglu"},
    "gelu": {"feedforward": "geglu"},
    "relu": {"feedforward": "relu"},
    "relu2": {"feedforward": "relu2"},
    "rms_norm": {"norm": "rmsnorm", "qk_norm": True},
    "layer_norm": {"norm": "layernorm", "bias": True},
    "rope": {"position": "rope"},
    "attention": {"n_kv_heads": 2},
}
OPTIMIZERS: dict[str, OptimizerName] = {"adamw": "adamw", "muon": "muon", "sgd": "sgd"}


def make_inputs(name: str, rng: np.random.Generator) -> tuple[Array, ...]:
    """Random inputs of an operation, in float64; those with a gradient may be changed."""
    normal = rng.standard_normal
    if name == "rope":
        cos, sin = positions.rope_cos_sin(np.arange(T), 1, Q, np.float64, "none", 1.0, 10_000.0)
        return normal((B, T, H, Q)), cos[:, 0, Q // 2 :].copy(), sin[:, 0, Q // 2 :].copy()
    if name == "embedding":
        return rng.integers(0, V - 1, N), normal((V, D))  # the last symbol never occurs
    if name == "cross_entropy":
        return normal((N, V)), rng.integers(0, V, N)
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "linear": ((N, D), (F, D)),
        "rms_norm": ((N, D), (D,)),
        "layer_norm": ((N, D), (D,), (D,)),
        "softmax": ((N, V),),
        "attention": ((B, T, H, Q), (B, T, K, Q), (B, T, K, Q)),
    }
    return tuple(map(normal, shapes.get(name, ((N, F),))))


def models_of(
    operations: OperationsFile, base: ModelConfig
) -> Iterator[tuple[str, ModelConfig, OptimizerName]]:
    """A name, a model and an optimizer for each operation of a file: together they use all."""
    for name in operations.functions:
        config = dataclasses.replace(base, **MODEL_SETTINGS.get(name, {}))
        settings = ", ".join(
            f"{key} {value}" for key, value in MODEL_SETTINGS.get(name, {}).items()
        )
        optimizer = OPTIMIZERS.get(name, "adamw")
        yield f"{name}{': ' if settings else ''}{settings}", config, optimizer
