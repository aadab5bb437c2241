"""Mixture of experts by hand: a router sends each token to k of E feed-forwards. arXiv:2401.04088.

As in ops.py, an op returns its output and its backward function; docs/backward.md derives them. No
token is dropped, and no loop goes over tokens: the tokens of one expert are made contiguous, and
each expert is called once.

Letters: B rows, T positions, N = B T tokens, D width, E experts, k of them for each token. A token
makes k choices, numbered in sequence: choice c belongs to token c // k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from glasslm.engines.numpy.ops import Array, New

Gradients = dict[str, Array]
Expert = Callable[[Array], tuple[Array, Callable[[Array, Gradients], Array]]]


class Routing(NamedTuple):
    """The statistics of a router in one pass, summed over the sequences."""

    balance: float  # E sum_e f_e P_e, with expert e's share f of the choices and mean probability P
    z: float  # the mean over the tokens of logsumexp(logits)²
    use: Array  # (E,) the number of choices of each expert


def mixture(
    x: Array, logits: Array, experts: Sequence[Expert], k: int, rows: int, new: New
) -> tuple[Array, Routing, Callable[[Array, Gradients, float, float], tuple[Array, Array]]]:
    """x (N, D), logits (N, E) of the router, `rows` = B -> (N, D), k experts' outputs times gates.

    backward(dy (N, D), gradients, balance_weight, z_weight) -> dx (N, D), dlogits (N, E): the
    gradient of y, plus balance_weight times that of Routing.balance, plus z_weight times that of
    Routing.z. dx does not contain the gradient that flows back through the router.
    """
    gates, expert_ids, routing, route_back = route(logits, k, rows, new)
    outputs, dispatch_back = dispatch(x, expert_ids, experts, new)
    y = np.matmul(gates[:, None], outputs, out=new((len(x), 1, x.shape[1])))[:, 0]

    def backward(
        dy: Array, gradients: Gradients, balance_weight: float, z_weight: float
    ) -> tuple[Array, Array]:
        dgates = np.vecdot(outputs, dy[:, None])
        doutputs = np.multiply(dy[:, None], gates[..., None], out=new(outputs.shape))
        dx = dispatch_back(doutputs, gradients)
        return dx, route_back(dgates, balance_weight, z_weight)

    return y, routing, backward


def route(
    logits: Array, k: int, rows: int, new: New
) -> tuple[Array, Array, Routing, Callable[[Array, float, float], Array]]:
    """logits (N, E), `rows` = B -> gates and ids of the experts, (N, k) each, and statistics.

    The k most probable experts are chosen; of equally probable ones, those with the lower index.
    Gates are their probabilities divided by their sum (arXiv:2401.04088, section 2.1). With k = 1
    that would be 1, and the router would learn nothing: there the gate is the probability itself
    (arXiv:2101.03961, equation 2). backward(dgates (N, k), balance_weight, z_weight) -> dlogits
    (N, E), as in `mixture`.
    """
    (N, E), T = logits.shape, len(logits) // rows
    top = logits.max(-1, keepdims=True)
    p = np.subtract(logits, top, out=new(logits.shape))
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    p /= total
    log_total = np.log(total) + top  # (N, 1)

    expert_ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    gates = np.take_along_axis(p, expert_ids, -1)
    mass = gates.sum(-1, keepdims=True)
    if k > 1:
        gates /= mass

    # Both losses are means within a sequence, so that they do not depend on the micro-batch.
    row_experts = expert_ids.reshape(rows, T * k) + E * np.arange(rows)[:, None]
    counts = np.bincount(row_experts.reshape(-1), minlength=rows * E).reshape(rows, E)
    # (B, E): E f, the derivative of the balance by P.
    balance_slope = counts.astype(p.dtype) * (E / (T * k))
    mean = p.reshape(rows, T, E).sum(1) * (1 / T)
    balance = float(np.vdot(balance_slope, mean))
    routing = Routing(balance, float(np.vdot(log_total, log_total)) / T, counts.sum(0))

    def backward(dgates: Array, balance_weight: float, z_weight: float) -> Array:
        dp = new(p.shape)
        dp.reshape(rows, T, E)[...] = (balance_slope * (balance_weight / T))[:, None]
        if k > 1:
            dgates = (dgates - np.vecdot(dgates, gates)[:, None]) / mass
        dp[np.arange(N)[:, None], expert_ids] += dgates
        dp -= np.vecdot(dp, p)[:, None]
        dp += log_total * (2 * z_weight / T)
        dp *= p
        return dp

    return gates, expert_ids, routing, backward


def dispatch(
    x: Array, expert_ids: Array, experts: Sequence[Expert], new: New
) -> tuple[Array, Callable[[Array, Gradients], Array]]:
    """x (N, D), ids of the chosen experts (N, k) -> (N, k, D), the output of each chosen expert.

    Every expert is called, also with no tokens, so that its weights get a gradient, of zeros.
    backward(doutputs (N, k, D), gradients) -> dx (N, D).
    """
    (N, D), k = x.shape, expert_ids.shape[1]
    expert_of_choice = expert_ids.reshape(-1)
    order = np.argsort(expert_of_choice, kind="stable")  # the choices, sorted by expert
    ends = np.cumsum(np.bincount(expert_of_choice, minlength=len(experts))).tolist()
    groups = [slice(start, end) for start, end in zip([0, *ends], ends)]
    inputs = np.take(x, order // k, axis=0, out=new((N * k, D)), mode="clip")
    outputs = new((N * k, D))
    backs = []
    for expert, group in zip(experts, groups):
        outputs[order[group]], back = expert(inputs[group])
        backs.append(back)

    def backward(doutputs: Array, gradients: Gradients) -> Array:
        doutputs = doutputs.reshape(N * k, D)
        dsorted = np.take(doutputs, order, axis=0, out=new((N * k, D)), mode="clip")
        dchoices = new((N * k, D))
        for back, group in zip(backs, groups):
            dchoices[order[group]] = back(dsorted[group], gradients)
        return dchoices.reshape(N, k, D).sum(1, out=new((N, D)))

    return outputs.reshape(N, k, D), backward


def round_up_sizes(new: New) -> New:
    """`new` with sizes rounded up to powers of two, for the arrays of an expert.

    A buffer pool reuses memory for arrays of the same size only, and an expert hardly ever gets the
    same number of tokens twice. Without rounding, the pool would grow for hours.
    """

    def allocate_rounded(shape: tuple[int, ...]) -> Array:
        size = prod(shape)
        return new((1 << (size - 1).bit_length(),))[:size].reshape(shape)

    return allocate_rounded
