"""Losses that are a constant plus falling power laws, fitted in log space: log L = log(e^c0 + sum_k e^(c_k - p_k x_k)).

The log-sum-exp form and the Huber loss of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3 and D.2). Many fits run
at once, each from its own start or with its own weights, which makes a bootstrap cheap. S fits, K power laws, n losses,
P = 1 + 2 K parameters in the order c0, c_1, p_1, c_2, p_2, ...
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EXPONENTS = (0.01, 3.0)  # searched; at the lower end a power law cannot be told from a constant
SMALLEST = 12.0  # a term e^12 times smaller than the smallest loss is as good as none
GRID, KEPT, ITERATIONS = 24, 24, 300


def predicted(theta: Array, x: Array) -> tuple[Array, Array]:
    """(S, n) log losses of (S, P) parameters at (K, n), and (S, 1 + K, n) the share that each term has of the loss."""
    constant = np.broadcast_to(theta[:, :1, None], (len(theta), 1, x.shape[1]))
    terms = np.concatenate([constant, theta[:, 1::2, None] - theta[:, 2::2, None] * x], 1)
    top = terms.max(1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(1, keepdims=True)
    return (top + np.log(total))[:, 0], shares / total


def jacobian(shares: Array, x: Array) -> Array:
    """(S, n, P): the derivative of each log loss by each parameter."""
    S, terms, n = shares.shape
    J = np.empty((S, n, 2 * terms - 1))
    J[:, :, 0] = shares[:, 0]
    J[:, :, 1::2] = shares[:, 1:].transpose(0, 2, 1)
    J[:, :, 2::2] = -(shares[:, 1:] * x).transpose(0, 2, 1)
    return J


def huber(r: Array, delta: float) -> Array:
    """r^2 / 2 within delta, straight lines beyond; an infinite delta is least squares."""
    size = np.abs(r)
    inner = np.minimum(size, delta)
    return inner * (size - inner / 2)


def bounds(y: Array, K: int) -> tuple[Array, Array]:
    """(P,) lowest and highest parameters. No term can exceed the loss, but its value at x = 0 may lie off the data."""
    low, high = np.empty(1 + 2 * K), np.empty(1 + 2 * K)
    low[0], high[0] = y.min() - SMALLEST, y.max()
    low[1::2], high[1::2] = y.min() - SMALLEST, y.max() + 3
    low[2::2], high[2::2] = EXPONENTS
    return low, high


def starts(x: Array, y: Array, delta: float) -> Array:
    """(KEPT, P): the best points of a grid over the exponents.

    For given exponents the law is linear in its other parameters (variable projection; Czech, arXiv:2603.22339), and
    a relative error is, where it is small, the error of the logarithm.
    """
    K = len(x)
    axes = np.meshgrid(*[np.geomspace(0.03, 2.0, GRID)] * K, indexing="ij")
    exponents = np.stack([axis.ravel() for axis in axes], 1)  # (S, K)
    powers = np.exp(-exponents[:, None, :] * x.T)  # (S, n, K)
    M = np.concatenate([np.ones((*powers.shape[:2], 1)), powers], 2) / np.exp(y)[:, None]
    square = M.transpose(0, 2, 1) @ M
    square *= 1 + 1e-10 * np.eye(K + 1)  # equal exponents and few values leave it singular
    coefficients = np.linalg.solve(square, M.sum(1)[:, :, None])[:, :, 0]
    theta = np.empty((len(exponents), 1 + 2 * K))
    logs = np.log(np.maximum(coefficients, np.exp(y.min()) / 100))  # none may be negative
    theta[:, 0], theta[:, 1::2], theta[:, 2::2] = logs[:, 0], logs[:, 1:], exponents
    theta = np.clip(theta, *bounds(y, K))
    objective = huber(predicted(theta, x)[0] - y, delta).sum(1)
    return theta[np.argsort(objective, kind="stable")[:KEPT]]


def minimise(theta: Array, x: Array, y: Array, weights: Array, delta: float) -> tuple[Array, Array]:
    """(S, P) parameters and (S,) objectives, the weighted sum of Huber losses, from (S, P) starts and (S, n) weights.

    Gauss-Newton steps. Beyond delta the Huber loss has no curvature, and a step without it may go anywhere; the
    quadratic that touches the loss there from above (iteratively reweighted least squares) always goes down, but
    slowly. So its curvature is added in a share mu, as Levenberg and Marquardt add theirs: more after a step that
    failed, less after one that did not. Every fit goes on by itself until it gains nothing, relative to an objective
    that is far smaller than the tolerances of general minimisers take it for.
    """
    theta, (low, high) = theta.copy(), bounds(y, len(x))
    objective = (weights * huber(predicted(theta, x)[0] - y, delta)).sum(1)
    mu = np.full(len(theta), 1e-2)
    going = np.arange(len(theta))
    for _ in range(ITERATIONS):
        old, w = theta[going], weights[going]
        new = np.clip(old + _step(old, x, y, w, delta, mu[going], low, high), low, high)
        found = (w * huber(predicted(new, x)[0] - y, delta)).sum(1)
        gain = objective[going] - found
        better = gain > 0
        theta[going[better]], objective[going[better]] = new[better], found[better]
        settled = (gain >= 0) & (gain <= 1e-13 * found) & (mu[going] <= 1)
        exact = objective[going] <= 1e-28 * w.sum(1)  # rounding is all that is left
        mu[going] = np.where(better, np.maximum(mu[going] / 5, 1e-9), mu[going] * 4)
        going = going[~(settled | exact | (mu[going] > 1e9))]
        if not len(going):
            break
    return theta, objective


def _step(
    theta: Array,
    x: Array,
    y: Array,
    weights: Array,
    delta: float,
    mu: Array,
    low: Array,
    high: Array,
) -> Array:
    """(S, P): how far each fit goes next. A parameter at its bound that would leave it stays."""
    log_loss, shares = predicted(theta, x)
    r, J = log_loss - y, jacobian(shares, x)
    size = np.abs(r)
    reweighted = weights * np.minimum(size, delta) / np.maximum(size, 1e-300)
    reweighted[size <= delta] = weights[size <= delta]
    gradient = np.einsum("snp,sn->sp", J, reweighted * r)
    held = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    J = np.where(held[:, None, :], 0, J)
    curvature = weights * (size <= delta) + mu[:, None] * reweighted
    H = (J * curvature[:, :, None]).transpose(0, 2, 1) @ J
    i = np.arange(H.shape[1])
    H[:, i, i] += 1e-12 * H[:, i, i].max(1, keepdims=True) + np.where(held, 1.0, 1e-300)
    return -np.linalg.solve(H, np.where(held, 0, gradient)[:, :, None])[:, :, 0]
