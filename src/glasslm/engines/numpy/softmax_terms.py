"""Auxiliary terms of the loss that are functions of the logits: label smoothing and z-loss.

Like the operations in ops.py, each has its backward pass beside it. N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from glasslm.engines.numpy.ops import Array, New


def smoothing(logits: Array, targets: Array, new: New) -> tuple[Array, Callable[[float], Array]]:
    """logits (N, V), targets (N,) -> (N,) mean nats of all symbols minus those of the target.

    It is 0 for target -1. Label smoothing adds a share of it to the loss (arXiv:1512.00567, section
    7). The sum of the softmax is in both terms and cancels: the logit of the target minus the mean
    logit remains. backward(weight) returns the gradient of weight x the sum, (N, V).
    """
    (N, V), valid = logits.shape, targets >= 0
    rows, columns = np.arange(N), np.where(valid, targets, 0)
    nats = (logits[rows, columns] - logits.mean(-1)) * valid

    def backward(weight: float) -> Array:
        dlogits = new((N, V))
        dlogits[...] = (valid[:, None] * (-weight / V)).astype(dlogits.dtype)
        dlogits[rows, columns] += (weight * valid).astype(dlogits.dtype)
        return dlogits

    return nats, backward


def z_loss(logits: Array, targets: Array, new: New) -> tuple[Array, Callable[[float], Array]]:
    """logits (N, V), targets (N,) -> (N,) log² Z, which keeps the sum Z of the softmax near 1.

    It is 0 for target -1. arXiv:2204.02311, section 5. backward(weight) returns the gradient of
    weight x the sum, (N, V).
    """
    top = logits.max(-1, keepdims=True)
    p = np.subtract(logits, top, out=new(logits.shape))
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    log_z = (np.log(total) + top) * (targets >= 0)[:, None]

    def backward(weight: float) -> Array:
        return np.multiply(p, (2 * weight * log_z / total).astype(p.dtype), out=new(p.shape))

    return (log_z * log_z)[:, 0], backward


# By the names that engines/objective.py gives the terms.
SOFTMAX_TERMS = {"smoothing": smoothing, "z": z_loss}
