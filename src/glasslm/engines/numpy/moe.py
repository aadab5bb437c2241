"""Mixture of experts by hand: a router sends each token to a few of several feed-forwards. arXiv:2401.04088.

As in ops.py, an op gives its output and the function that goes back; docs/backward.md derives them. No token is
dropped, and no loop goes over tokens: those of one expert are put side by side, and each expert is called once.

Letters: B rows, T positions, N = B T tokens, D width, E experts, k of them for each token. A token's k choices are
numbered one after the other: choice c is that of token c // k.
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
    """What a layer's router did in one pass, beside its output."""

    balance: float  # summed over the sequences: E sum_e f_e P_e, with e's share f of the choices and mean probability P
    z: float  # summed over the sequences: the mean over the tokens of logsumexp(logits)²
    use: Array  # (E,) how many choices fell on each expert


def mixture(
    x: Array, logits: Array, experts: Sequence[Expert], k: int, rows: int, new: New
) -> tuple[Array, Routing, Callable[[Array, Gradients, float, float], tuple[Array, Array]]]:
    """x (N, D), logits (N, E) of the router, `rows` = B -> (N, D), the sum of k experts' outputs by their gates.

    backward(dy (N, D), gradients, balance_weight, z_weight) -> dx, dlogits: the gradient of y, plus balance_weight
    times that of Routing.balance, plus z_weight times that of Routing.z. What the router itself did to x is not in dx.
    """
    gates, chosen, routing, route_back = route(logits, k, rows, new)
    outputs, dispatch_back = dispatch(x, chosen, experts, new)
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
    """logits (N, E) -> gates (N, k), the chosen experts (N, k): the k most probable, of equal ones the first.

    Gates are the chosen probabilities divided by their sum (arXiv:2401.04088, section 2.1). With k = 1 that would be 1,
    and the router would learn nothing: there the gate is the probability itself (arXiv:2101.03961, equation 2).
    """
    (N, E), T = logits.shape, len(logits) // rows
    top = logits.max(-1, keepdims=True)
    p = np.subtract(logits, top, out=new(logits.shape))
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    p /= total
    log_total = np.log(total) + top  # (N, 1)

    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    gates = np.take_along_axis(p, chosen, -1)
    mass = gates.sum(-1, keepdims=True)
    if k > 1:
        gates /= mass

    # Both losses are means within a sequence, so that it does not matter which sequences are computed together.
    of_row = chosen.reshape(rows, T * k) + E * np.arange(rows)[:, None]
    counts = np.bincount(of_row.reshape(-1), minlength=rows * E).reshape(rows, E)
    pull = counts.astype(p.dtype) * (E / (T * k))  # (B, E): E f, the slope of the balance over P
    mean = p.reshape(rows, T, E).sum(1) * (1 / T)
    routing = Routing(
        float(np.vdot(pull, mean)), float(np.vdot(log_total, log_total)) / T, counts.sum(0)
    )

    def backward(dgates: Array, balance_weight: float, z_weight: float) -> Array:
        dp = new(p.shape)
        dp.reshape(rows, T, E)[...] = (pull * (balance_weight / T))[:, None]
        if k > 1:
            dgates = (dgates - np.vecdot(dgates, gates)[:, None]) / mass
        dp[np.arange(N)[:, None], chosen] += dgates
        dp -= np.vecdot(dp, p)[:, None]
        dp += log_total * (2 * z_weight / T)
        dp *= p
        return dp

    return gates, chosen, routing, backward


def dispatch(
    x: Array, chosen: Array, experts: Sequence[Expert], new: New
) -> tuple[Array, Callable[[Array, Gradients], Array]]:
    """x (N, D), chosen (N, k) -> (N, k, D), what each token's experts make of it.

    Every expert is called, also with no tokens, so that its weights get a gradient, of zeros.
    """
    (N, D), k = x.shape, chosen.shape[1]
    by_expert = chosen.reshape(-1)
    order = np.argsort(by_expert, kind="stable")  # the choices, those of an expert side by side
    ends = np.cumsum(np.bincount(by_expert, minlength=len(experts))).tolist()
    groups = [slice(start, end) for start, end in zip([0, *ends], ends)]
    sent = np.take(x, order // k, axis=0, out=new((N * k, D)), mode="clip")
    outputs = new((N * k, D))
    backs = []
    for expert, group in zip(experts, groups):
        outputs[order[group]], back = expert(sent[group])
        backs.append(back)

    def backward(doutputs: Array, gradients: Gradients) -> Array:
        returned = np.take(
            doutputs.reshape(N * k, D), order, axis=0, out=new((N * k, D)), mode="clip"
        )
        dsent = new((N * k, D))
        for back, group in zip(backs, groups):
            dsent[order[group]] = back(returned[group], gradients)
        return dsent.reshape(N, k, D).sum(1, out=new((N, D)))

    return outputs.reshape(N, k, D), backward


def in_few_sizes(new: New) -> New:
    """`new` for what an expert computes: its rows are as many as the tokens it got, hardly ever the same number again.

    An arena hands memory out again for arrays of the same size. So these take the next power of two and leave its end
    alone; in their own sizes, they would take new memory for hours.
    """

    def rounded(shape: tuple[int, ...]) -> Array:
        size = prod(shape)
        return new((1 << (size - 1).bit_length(),))[:size].reshape(shape)

    return rounded
