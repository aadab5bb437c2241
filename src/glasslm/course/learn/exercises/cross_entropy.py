"""Cross-entropy of logits and targets."""

from __future__ import annotations

import numpy as np

from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Reference,
    Sizes,
)


def reference(
    weight: float,
    logits: Array,
    targets: Array,
    *,
    axis: int = -1,
    max_axis: int | None = None,
    softmax_axis: int = -1,
    has_all_rows: bool = False,
    has_logarithm: bool = True,
) -> Reference:
    """logits (N, V), targets (N,) -> nats (N,), dlogits. The terms of y add to log p[target]."""
    rows = np.arange(targets.size)
    top = logits.max(axis if max_axis is None else max_axis, keepdims=True)
    exponentials = np.exp(logits - logits.max(softmax_axis, keepdims=True))
    total = exponentials.sum(softmax_axis, keepdims=True)
    p = exponentials / total
    one_hot = np.zeros_like(logits)
    one_hot[(slice(None) if has_all_rows else rows, targets)] = 1
    log_sum = np.log(np.exp(logits - top).sum(axis, keepdims=True)) + 0 * logits
    top = top + 0 * logits
    is_flat = axis == 0 and max_axis == -1  # sums of the columns, subtracted as if of the rows
    y = {
        "max": top[rows, targets],
        "log sum exp": log_sum[rows, rows if is_flat else targets],
        "-logit": -logits[rows, targets],
    }
    if not has_logarithm:
        y = {"-p": -np.exp(-(y["max"] + y["log sum exp"] + y["-logit"]))}
    return Reference(
        {
            "y": y,
            "dlogits": {"weight p": weight * p, "-weight at the target": -weight * one_hot},
        },
        {"p": p, "1 / sum of exponentials": 1 / total + 0 * p},
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, V = sizes.values()
    logits = random.array(N, V)
    if is_large:
        logits = logits * 400 + np.resize([0.0, 3e3, -3e3], N)[:, None]
    weight = random.number(0.3, 0.8)
    inputs = {"logits": logits, "targets": random.integers(0, V, N)}
    return Case({**sizes, "weight": weight}, inputs, {}, weight)


EXERCISE = Exercise(
    name="cross_entropy",
    title="cross-entropy",
    task="The nats of each target: minus the logarithm of its probability in p, the softmax of "
    "its row. backward gets one number, the weight of the sum of all nats in the loss "
    "(1/N for the mean).",
    signature="cross_entropy(logits, targets)",
    shapes="""logits   (N, V)   N tokens, a vocabulary of V
targets  (N,)     integers from 0 to V - 1
y        (N,)     nats of each token
backward(weight) -> dlogits (N, V), the gradient of weight * y.sum()""",
    reference=reference,
    sizes=Sizes.of("N V", small="1 2, 1 3, 2 2, 2 3", distinct="5 7, 9 4", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "-log softmax = log(sum(exp(logits))) - logits[target]: no division is needed.",
        "Subtract the largest logit of each row first, so that exp does not overflow.",
        "The gradient of log(sum(exp(logits))) by the logits is softmax(logits).",
        "dlogits = weight * p, and at the target of each row weight less.",
    ),
    derivation="cross_entropy",
    solution="engines/numpy/ops.py:cross_entropy",
    needs=("softmax",),
    gradients=("dlogits",),
    mistakes=(
        Mistake("axis", "y", "the softmax runs over the tokens, not the vocabulary", {"axis": 0}),
        Mistake(
            "axis",
            "y",
            "the sum of the exponentials runs over the tokens",
            {"axis": 0, "max_axis": -1},
        ),
        Mistake(
            "other", "y", "minus the probability, without the logarithm", {"has_logarithm": False}
        ),
        Mistake(
            "axis",
            "dlogits",
            "the softmax of the gradient runs over the tokens",
            {"softmax_axis": 0},
        ),
        Mistake(
            "axis",
            "dlogits",
            "1 is subtracted in the targets' columns of all tokens, not of each row alone",
            {"has_all_rows": True},
        ),
    ),
    token_inputs=("logits",),
)
