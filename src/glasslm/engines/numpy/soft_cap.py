"""The soft cap of attention scores and logits, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from glasslm.engines.numpy.ops import Array, New


def soft_cap(x: Array, cap: float, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """cap tanh(x / cap), any shape. Overwrites x; backward overwrites dy. arXiv:2408.00118."""
    x *= 1 / cap
    t = np.tanh(x, out=new(x.shape))
    y = np.multiply(t, cap, out=x)

    def backward(dy: Array) -> Array:
        slope = np.multiply(t, t, out=new(t.shape))
        np.subtract(1, slope, out=slope)
        dy *= slope
        return dy

    return y, backward


def cap_scores(x: Array, cap: float) -> None:
    """Overwrite x (any shape) by cap tanh(x / cap): soft_cap without its backward pass."""
    soft_cap(x, cap, lambda shape: x)  # tanh needs memory of its own for the backward pass alone
