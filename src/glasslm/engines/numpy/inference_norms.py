"""Norms of inference, in fewer calls of NumPy than the ops of training need.

Letters: N rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from glasslm.config.schema import Norm
from glasslm.engines.numpy.ops import Array


def _rms_norm(x: Array, weights: dict[str, Array], name: str, eps: float) -> Array:
    y = divide_by_rms(x, eps)
    y *= weights[f"{name}.weight"]
    return y


def _rms_norm_1p(x: Array, weights: dict[str, Array], name: str, eps: float) -> Array:
    y = divide_by_rms(x, eps)
    y *= weights[f"{name}.weight"] + 1
    return y


def _layer_norm(x: Array, weights: dict[str, Array], name: str, eps: float) -> Array:
    y = divide_by_rms(x - x.mean(-1, keepdims=True), eps)
    y *= weights[f"{name}.weight"]
    if (bias := weights.get(f"{name}.bias")) is not None:
        y += bias
    return y


# x (N, D), weights, name, eps -> (N, D).
FAST_NORMS: dict[Norm, Callable[[Array, dict[str, Array], str, float], Array]] = {
    "rmsnorm": _rms_norm,
    "layernorm": _layer_norm,
    "rmsnorm1p": _rms_norm_1p,
}


def divide_by_rms(x: Array, eps: float) -> Array:
    """x (..., D) -> x / rms(x), (..., D)."""
    if x.shape[0] == 1 and x.ndim == 2:
        # One token at a time: arithmetic on a Python number is 4 times as fast.
        square = float(np.vdot(x, x)) / x.shape[1]
        return x * (1 / math.sqrt(square + eps))
    scale = np.vecdot(x, x)[..., None]
    scale /= x.shape[-1]
    scale += eps
    unit: Array = x / np.sqrt(scale)
    return unit
