"""Losses that are a constant plus falling power laws, fitted in log space.

log L = log(e^c0 + sum_k e^(c_k - p_k x_k)). The log-sum-exp form and the Huber loss are those of
Hoffmann et al. 2022 (arXiv:2203.15556, sections 3.3 and D.2). Many fits run at once, each from its
own start or with its own weights, which makes a bootstrap cheap. S fits, K power laws, n losses, P
= 1 + 2 K parameters in the order c0, c_1, p_1, c_2, p_2, ...
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EXPONENT_BOUNDS = (0.01, 3.0)  # at the lower bound a power law cannot be told from a constant
MIN_LOG_TERM = 12.0  # a term is at least e^-12 of the smallest loss: a smaller one is negligible
GRID_POINTS, MAX_STARTS, MAX_ITERATIONS = 24, 24, 300
REFIT_ITERATIONS = 60  # from the minimum of nearly the same losses


def predict_log_losses(theta: Array, x: Array) -> tuple[Array, Array]:
    """(S, n) log losses, and (S, 1 + K, n) the share of each term in the loss.

    theta (S, P) are the parameters, x is (K, n).
    """
    constant = np.broadcast_to(theta[:, :1, None], (len(theta), 1, x.shape[1]))
    terms = np.concatenate([constant, theta[:, 1::2, None] - theta[:, 2::2, None] * x], 1)
    top = terms.max(1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(1, keepdims=True)
    return (top + np.log(total))[:, 0], shares / total


def jacobian(shares: Array, x: Array) -> Array:
    """(S, n, P): the derivative of each log loss by each parameter.

    shares is (S, 1 + K, n), x is (K, n).
    """
    S, terms, n = shares.shape
    J = np.empty((S, n, 2 * terms - 1))
    J[:, :, 0] = shares[:, 0]
    J[:, :, 1::2] = shares[:, 1:].transpose(0, 2, 1)
    J[:, :, 2::2] = -(shares[:, 1:] * x).transpose(0, 2, 1)
    return J


def huber(r: Array, delta: float) -> Array:
    """r^2 / 2 within delta and a straight line outside, in the shape of r.

    An infinite delta is least squares.
    """
    size = np.abs(r)
    inner = np.minimum(size, delta)
    return inner * (size - inner / 2)


def bounds(y: Array, K: int) -> tuple[Array, Array]:
    """(P,) lowest and (P,) highest parameters for the log losses y (n,) and K power laws.

    No term can exceed the loss, but the value of a power law at x = 0 may lie outside the data.
    """
    low, high = np.empty(1 + 2 * K), np.empty(1 + 2 * K)
    low[0], high[0] = y.min() - MIN_LOG_TERM, y.max()
    low[1::2], high[1::2] = y.min() - MIN_LOG_TERM, y.max() + 3
    low[2::2], high[2::2] = EXPONENT_BOUNDS
    return low, high


def starting_points(x: Array, y: Array, delta: float) -> Array:
    """(MAX_STARTS, P): the best points of a grid over the exponents, for x (K, n) and y (n,).

    For given exponents the law is linear in its other parameters (variable projection; Czech,
    arXiv:2603.22339), and a small relative error equals the error of the logarithm.
    """
    K = len(x)
    axes = np.meshgrid(*[np.geomspace(0.03, 2.0, GRID_POINTS)] * K, indexing="ij")
    exponents = np.stack([axis.ravel() for axis in axes], 1)  # (S, K)
    powers = np.exp(-exponents[:, None, :] * x.T)  # (S, n, K)
    M = np.concatenate([np.ones((*powers.shape[:2], 1)), powers], 2) / np.exp(y)[:, None]
    square = M.transpose(0, 2, 1) @ M
    square *= 1 + 1e-10 * np.eye(K + 1)  # equal exponents or few values make it singular
    coefficients = np.linalg.solve(square, M.sum(1)[:, :, None])[:, :, 0]
    theta = np.empty((len(exponents), 1 + 2 * K))
    logs = np.log(np.maximum(coefficients, np.exp(y.min()) / 100))  # a coefficient may be negative
    theta[:, 0], theta[:, 1::2], theta[:, 2::2] = logs[:, 0], logs[:, 1:], exponents
    theta = np.clip(theta, *bounds(y, K))
    objective = huber(predict_log_losses(theta, x)[0] - y, delta).sum(1)
    return theta[np.argsort(objective, kind="stable")[:MAX_STARTS]]


def minimize(
    theta: Array,
    x: Array,
    y: Array,
    weights: Array,
    delta: float,
    equal_exponents: bool = False,
    max_iterations: int = MAX_ITERATIONS,
) -> tuple[Array, Array]:
    """(S, P) parameters and (S,) objectives at the minima that the starts theta (S, P) lead to.

    The objective is the sum of Huber losses, weighted by `weights` (S, n); x is (K, n), y is (n,),
    or (S, n) with losses of its own for each fit. With `equal_exponents` all power laws have the
    exponent of the first.
    Gauss-Newton steps: outside of delta the Huber loss has no curvature, and a step without
    curvature may go anywhere. The quadratic that touches the loss there from above (iteratively
    reweighted least squares) always descends, but slowly. So its curvature is added in a share mu,
    as Levenberg and Marquardt add theirs: more after a failed step, less after a successful one.
    Each fit stops when it gains nothing, relative to its objective, which is far smaller than the
    tolerances of general minimizers.
    """
    theta, (low, high) = theta.copy(), bounds(y, len(x))
    y = np.broadcast_to(y, weights.shape)
    if equal_exponents:
        theta[:, 4::2] = theta[:, 2:3]
    objective = (weights * huber(predict_log_losses(theta, x)[0] - y, delta)).sum(1)
    mu = np.full(len(theta), 1e-2)
    active = np.arange(len(theta))
    for _ in range(max_iterations):
        old, w, losses = theta[active], weights[active], y[active]
        step = _step(old, x, losses, w, delta, mu[active], low, high, equal_exponents)
        new = np.clip(old + step, low, high)
        new_objective = (w * huber(predict_log_losses(new, x)[0] - losses, delta)).sum(1)
        gain = objective[active] - new_objective
        better = gain > 0
        theta[active[better]], objective[active[better]] = new[better], new_objective[better]
        settled = (gain >= 0) & (gain <= 1e-13 * new_objective) & (mu[active] <= 1)
        exact = objective[active] <= 1e-28 * w.sum(1)  # only rounding is left
        mu[active] = np.where(better, np.maximum(mu[active] / 5, 1e-9), mu[active] * 4)
        active = active[~(settled | exact | (mu[active] > 1e9))]
        if not len(active):
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
    equal_exponents: bool,
) -> Array:
    """(S, P): the next step of each fit. A parameter at a bound does not move across it."""
    log_loss, shares = predict_log_losses(theta, x)
    r, J = log_loss - y, jacobian(shares, x)
    if equal_exponents:
        J[:, :, 2] = J[:, :, 2::2].sum(2)
        J[:, :, 4::2] = 0
    size = np.abs(r)
    reweighted = weights * np.minimum(size, delta) / np.maximum(size, 1e-300)
    reweighted[size <= delta] = weights[size <= delta]
    gradient = np.einsum("snp,sn->sp", J, reweighted * r)
    at_bound = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    if equal_exponents:
        at_bound[:, 4::2] = True  # they move with the first
    J = np.where(at_bound[:, None, :], 0, J)
    curvature = weights * (size <= delta) + mu[:, None] * reweighted
    H = (J * curvature[:, :, None]).transpose(0, 2, 1) @ J
    i = np.arange(H.shape[1])
    H[:, i, i] += 1e-12 * H[:, i, i].max(1, keepdims=True) + np.where(at_bound, 1.0, 1e-300)
    step = -np.linalg.solve(H, np.where(at_bound, 0, gradient)[:, :, None])[:, :, 0]
    if equal_exponents:
        step[:, 4::2] = step[:, 2:3]
    return step
