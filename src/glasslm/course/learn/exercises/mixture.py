"""Routing in a mixture of experts: the top-k gates, and backward through the chosen experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glasslm import ops
from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Reference,
    Sizes,
    VerdictName,
)


def mixture(
    logits: Array, outputs: Array, k: int
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """The k chosen experts' outputs times their gates; k >= 2. arXiv:2401.04088, section 2.1."""
    chosen = mark_top(logits, k)
    gates, softmax_back = ops.softmax(np.where(chosen, logits, -np.inf))  # 0 for the others

    def backward(dy: Array) -> tuple[Array, Array]:
        dgates = np.vecdot(outputs, dy[:, None])
        return softmax_back(dgates), gates[:, :, None] * dy[:, None]

    return np.vecmat(gates, outputs), backward


def reference(
    dy: Array,
    logits: Array,
    outputs: Array,
    k: int,
    *,
    choice: Callable[[Array, int], Array] = lambda logits, k: mark_top(logits, k),
    gate: str = "renormalized",
    inside: str = "g dg",
    outer: str = "g",
    sums: str = "the chosen",
    output_gate: str = "g",
    mean: bool = False,
) -> Reference:
    """logits (N, E), outputs (N, E, D) -> y (N, D), dlogits, doutputs in named terms."""
    chosen = choice(logits, k)
    p = softmax(logits)
    mass = (p * chosen).sum(-1, keepdims=True)
    gates = {
        "renormalized": p * chosen / mass,
        "not renormalized": p * chosen,
        "equal": chosen / chosen.sum(-1, keepdims=True),
        "logits": logits * chosen,
        "masked to 0": softmax(np.where(chosen, logits, 0)),
        "over the tokens": softmax_over_tokens(np.where(chosen, logits, -np.inf)),
    }[gate]
    y = np.einsum("ne,ned->nd", gates, outputs) / (k if mean else 1)
    dg = np.einsum("nd,ned->ne", dy, outputs)
    around = {"g": gates, "1": chosen * 1.0, "p": p, "p chosen": p * chosen}[outer]
    weighed = {"g dg": gates * dg, "dg": dg, "chosen dg": chosen * dg, "p dg": p * dg}[inside]
    first = dg
    if sums == "the mass is constant":  # the softmax of all, with gates p / mass
        first = chosen * dg / mass
        weighed = p * first
        around = p
    seen = {"g": gates, "1": chosen * 1.0, "all": np.ones_like(gates), "p": p}[output_gate]
    return Reference(
        {
            "y": {"sum of g outputs": y},
            "dlogits": {
                "g dg": around * first,
                "-g sum(g dg)": -around * weighed.sum(-1, keepdims=True),
            },
            "doutputs": {"g dy": seen[:, :, None] * dy[:, None]},
        },
        {"g": gates + 0 * logits, "dg": dg},
    )


def mark_top(logits: Array, k: int) -> Array:
    """(N, E): marks the k largest logits of each token; of equal ones the first."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    marks = np.zeros(logits.shape, bool)
    np.put_along_axis(marks, order[:, :k], True, -1)
    return marks


def mark_for_all(logits: Array, k: int) -> Array:
    """(N, E): marks the same k experts for all tokens, those with the largest sum of logits."""
    return np.repeat(mark_top(logits.sum(0, keepdims=True), k), len(logits), axis=0)


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_over_tokens(z: Array) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(0, keepdims=True)


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, E, D, k = sizes.values()
    # Steps of 0.2 and more in a random order: no two logits of a token are nearly equal.
    steps = 0.2 + random.generator.integers(0, 4, (N, E)) / 10
    logits = random.generator.permuted(np.cumsum(steps, -1) - E / 5, axis=-1)
    logits = np.round(logits, 1) * (1000 if is_large else 1)
    for n in range(min(N, E)):  # each expert is the first choice of a token
        first = logits[n].argmax()
        logits[n, [n, first]] = logits[n, [first, n]]
    inputs = {"logits": logits, "outputs": random.array(N, E, D), "k": k}
    return Case(dict(sizes), inputs, {}, random.array(N, D))


MISTAKES: tuple[tuple[VerdictName, str, str, dict[str, Any]], ...] = (
    (
        "factor",
        "y",
        "the gates are not renormalized: divide them by the sum over the k chosen experts",
        {"gate": "not renormalized"},
    ),
    (
        "mask",
        "y",
        "all experts are used: each token uses the k with the largest logits",
        {"choice": lambda logits, k: logits == logits},
    ),
    (
        "mask",
        "y",
        "the experts with the smallest logits are chosen",
        {"choice": lambda logits, k: mark_top(-logits, k)},
    ),
    (
        "mask",
        "y",
        "one expert too many is chosen",
        {"choice": lambda logits, k: mark_top(logits, k + 1)},
    ),
    (
        "mask",
        "y",
        "one expert is missing: k are chosen",
        {"choice": lambda logits, k: mark_top(logits, k - 1)},
    ),
    (
        "axis",
        "y",
        "all tokens have the same experts: each token chooses its own",
        {"choice": mark_for_all},
    ),
    (
        "other",
        "y",
        "the chosen experts have equal weights: their gates are their probabilities",
        {"gate": "equal"},
    ),
    (
        "other",
        "y",
        "the gates are the logits: take their softmax",
        {"gate": "logits"},
    ),
    (
        "mask",
        "y",
        "the logits of the other experts are 0, so they have a share: minus infinity hides them",
        {"gate": "masked to 0"},
    ),
    (
        "axis",
        "y",
        "the softmax runs over the tokens: it runs over the experts of a token",
        {"gate": "over the tokens"},
    ),
    (
        "factor",
        "y",
        "y is divided by k: the gates have the sum 1 already",
        {"mean": True},
    ),
    (
        "missing_term",
        "dlogits",
        "the gates' sum is taken as a constant: p / mass depends on the logits through "
        "mass, too, which adds a term",
        {"sums": "the mass is constant"},
    ),
    (
        "factor",
        "dlogits",
        "the gates are left out inside the sum: g (dg - sum(g dg))",
        {"inside": "chosen dg"},
    ),
    (
        "factor",
        "dlogits",
        "the gates are left out inside the sum, which runs over all experts: g (dg - sum(g dg))",
        {"inside": "dg"},
    ),
    (
        "factor",
        "dlogits",
        "dlogits is not multiplied by the gates: g (dg - sum(g dg))",
        {"outer": "1"},
    ),
    (
        "mask",
        "dlogits",
        "the gradient is that of the softmax over all experts: those that were not chosen "
        "have no influence, so their gradient is 0",
        {"outer": "p", "inside": "p dg"},
    ),
    (
        "mask",
        "dlogits",
        "the sum runs over the probabilities of all experts: it runs over the gates of the chosen",
        {"inside": "p dg"},
    ),
    (
        "factor",
        "dlogits",
        "the probabilities p stand where the renormalized gates belong",
        {"outer": "p chosen"},
    ),
    (
        "factor",
        "doutputs",
        "doutputs is not multiplied by the gates",
        {"output_gate": "1"},
    ),
    (
        "mask",
        "doutputs",
        "all experts get dy: those that were not chosen get 0, the others gate times dy",
        {"output_gate": "all"},
    ),
    (
        "mask",
        "doutputs",
        "all experts get a gradient, by their probabilities: those that were not chosen get 0",
        {"output_gate": "p"},
    ),
)

EXERCISE = Exercise(
    name="mixture",
    title="MoE routing",
    task="Each token uses the k experts with the largest logits. Their gates g are the "
    "softmax probabilities divided by the sum over the k chosen, and y = sum over the chosen of g "
    "times output. The choice itself has no gradient.",
    signature="mixture(logits, outputs, k)",
    shapes="""logits   (N, E)     of the router; N tokens, E experts
outputs  (N, E, D)  the output of every expert for every token
k        experts per token, 2 or more; of equal logits the lower index is chosen
y        (N, D)
backward(dy) -> (dlogits, doutputs) of shapes (N, E) and (N, E, D)""",
    reference=reference,
    sizes=Sizes.of(
        "N E D k",
        small="1 2 1 2, 1 3 1 2, 2 3 1 2",
        distinct="9 5 4 3, 8 6 3 2, 7 5 2 4",
        equal="4 4 4 2, 5 5 5 3",
    ),
    draw=draw,
    hints=(
        "Renormalized, the gates are the softmax of the chosen logits alone: the sum over all "
        "cancels.",
        "So set the logits of the others to minus infinity and take the softmax: their gates are "
        "0.",
        "dgates = dy · outputs, one number for each expert, and doutputs = gate times dy.",
        "dlogits = g (dg - sum(g dg)), the gradient of a softmax. It is 0 for experts that were "
        "not chosen.",
    ),
    derivation="route",
    solution="course/learn/exercises/mixture.py:mixture",
    needs=("softmax", "linear"),
    gradients=("dlogits", "doutputs"),
    mistakes=tuple(
        Mistake(verdict, output, sentence, changes)
        for verdict, output, sentence, changes in MISTAKES
    ),
    token_inputs=("logits",),
)
