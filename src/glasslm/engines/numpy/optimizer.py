"""The optimizers: each updates a weight and its moments from a gradient, in place.

AdamW (arXiv:1711.05101, algorithm 2), SGD with momentum, and Muon (K. Jordan, 2024; at scale and
with the size of its updates: arXiv:2502.16982) for the hidden matrices. All functions overwrite the
weight p, the moments and the gradient g. AdamW and SGD allocate nothing.
"""

from __future__ import annotations

import math

import numpy as np

from glasslm.engines.numpy.ops import Array

ADAM_EPS = 1e-8
# Numbers updated at once: few enough for the cache, enough to outweigh a hand-over to a thread.
CHUNK_NUMBERS = 1 << 18


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    t: int,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    scale: float,
    eps: float,
) -> None:
    """One AdamW update of p at update number t = 1, 2, ...; the gradient is `scale` x g.

    p, g, m and v have the same shape (any). Overwrites all four.
    """
    b1, b2 = betas
    g *= (1 - b1) * scale
    m *= b1
    m += g
    g *= g
    g *= (1 - b2) / (1 - b1) ** 2
    v *= b2
    v += g
    np.sqrt(v, out=g)
    g *= 1 / math.sqrt(1 - b2**t)
    g += eps
    np.divide(m, g, out=g)
    g *= lr / (1 - b1**t)
    if decay:
        p *= 1 - lr * decay
    p -= g


def sgd(
    p: Array, g: Array, m: Array, *, lr: float, decay: float, momentum: float, scale: float
) -> None:
    """m = momentum m + g; p = (1 - lr decay) p - lr m. The gradient is `scale` x g.

    p, g and m have the same shape (any). Overwrites all three.
    """
    g *= scale
    m *= momentum
    m += g
    if decay:
        p *= 1 - lr * decay
    np.multiply(m, lr, out=g)
    p -= g


def move_average(average: Array, p: Array, share: float) -> None:
    """average = average + share (p - average), both of the same shape (any). Overwrites average."""
    difference = p - average
    difference *= share
    average += difference


def muon(
    p: Array, g: Array, m: Array, *, lr: float, decay: float, momentum: float, scale: float
) -> None:
    """One Muon update of p (O, I): Nesterov momentum with all singular values set to about 1.

    g and m have the shape of p. The update has the root mean square of a typical AdamW update, 0.2,
    whatever the shape (arXiv:2502.16982, equation 4), so that weight matrices share a learning rate
    with the weights that AdamW updates. The gradient is `scale` x g. Overwrites p, g and m.
    """
    g *= scale
    m *= momentum
    m += g
    update = orthogonalize(m * momentum + g)
    update *= 0.2 * lr * math.sqrt(max(p.shape))
    if decay:
        p *= 1 - lr * decay
    p -= update


def orthogonalize(g: Array) -> Array:
    """About U Vᵀ (O, I) for g = U S Vᵀ (O, I), by five steps of a Newton-Schulz iteration.

    The polynomial is a quintic with Jordan's coefficients, which are steepest at zero, so that
    small singular values grow fastest. The result has singular values of about 0.7 to 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[0] > g.shape[1]
    x = g / (np.linalg.norm(g) + 1e-7)
    for _ in range(5):
        gram = x.T @ x if tall else x @ x.T  # the smaller of the two
        polynomial = gram @ gram
        polynomial *= c
        gram *= b
        polynomial += gram
        step = x @ polynomial if tall else polynomial @ x
        x *= a
        x += step
    return x
