"""Softmax over the last axis."""

from __future__ import annotations

import math

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

Axis = int | tuple[int, ...] | None


def reference(
    dy: Array,
    x: Array,
    *,
    axis: Axis = -1,
    max_axis: Axis = -1,
    sum_axis: Axis = -1,
    exponent: float = 1,
    has_y_inside: bool = True,
    has_diagonal: bool = True,
) -> Reference:
    """x (..., V) -> y and dx of the same shape."""
    x = exponent * x
    exponentials = np.exp(x - x.max(max_axis, keepdims=True))
    y = exponentials / exponentials.sum(axis, keepdims=True)
    along = (dy * y if has_y_inside else dy).sum(sum_axis, keepdims=True)
    jacobian = np.eye(y.shape[-1]) * y[..., None] - y[..., None] * y[..., None, :]  # (..., i, j)
    parts = np.moveaxis(jacobian * dy[..., None, :], -1, 0)
    inverse = 1 / exponentials.sum(-1, keepdims=True) + 0 * y
    return Reference(
        {
            "y": {"y": y},
            "dx": {"y dy": y * dy * (1 if has_diagonal else y), "-y sum(y dy)": -y * along},
        },
        {"y": y, "dy": dy, "1 / sum of exponentials": inverse},
        {"dx": (parts, 1)},
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    shape = tuple(sizes.values())
    x = random.array(*shape)
    if is_large:  # rows far apart: the largest of all entries is no help for most rows
        offsets = np.resize([0.0, 2e3, -2e3], shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        x = x * 300 + offsets
    return Case(dict(sizes), {"x": x}, {}, random.array(*shape))


EXERCISE = Exercise(
    name="softmax",
    title="softmax",
    task="Turn each row of scores into positive numbers with the sum 1: "
    "y_i = exp(x_i) / sum_j exp(x_j), over the last axis.",
    signature="softmax(x)",
    shapes="""x  (N, V), or any number of axes before the last
y  the shape of x
backward(dy) -> dx, the shape of x""",
    reference=reference,
    sizes=Sizes.of("N D", small="1 2, 1 3, 2 2, 2 3", distinct="5 7, 9 4", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "softmax does not change when a number is subtracted from a row: subtract the row's "
        "largest entry, so that exp does not overflow.",
        "Every x_j changes the sum, so every y_i depends on every x_j of its row.",
        "dy_i / dx_j is y_i (1 - y_i) where i = j, and -y_i y_j elsewhere.",
        "Multiply that matrix by dy: dx = y (dy - sum(y dy)), without building it.",
    ),
    derivation="softmax",
    solution="ops/layers.py:softmax",
    gradients=("dx",),
    mistakes=(
        Mistake("axis", "y", "the sum runs over the first axis, not the last", {"axis": 0}),
        Mistake(
            "axis",
            "y",
            "the softmax runs over the first axis, not the last",
            {"axis": 0, "max_axis": 0},
        ),
        Mistake(
            "axis",
            "y",
            "the sum runs over the whole array, not the last axis",
            {"axis": None, "max_axis": None},
        ),
        Mistake(
            "axis",
            "y",
            "the sum runs over axis 1, which is the last only in a matrix",
            {"axis": 1, "max_axis": 1},
        ),
        Mistake("axis", "y", "the sum runs over the whole array", {"axis": None}),
        Mistake("sign", "y", "the sign in the exponent", {"exponent": -1}),
        *(
            Mistake("factor", "y", f"the scores are multiplied by {e:g}", {"exponent": e})
            for e in (2, 0.5, math.log(2))
        ),
        Mistake(
            "missing_term",
            "dx",
            "only the diagonal of the Jacobian: every entry also changes the sum",
            {"sum_axis": ()},
        ),
        Mistake(
            "missing_term",
            "dx",
            "the diagonal of the Jacobian is left out",
            {"has_diagonal": False},
        ),
        Mistake("axis", "dx", "the sum in the gradient runs over the first axis", {"sum_axis": 0}),
        Mistake(
            "axis", "dx", "the sum in the gradient runs over the whole array", {"sum_axis": None}
        ),
        Mistake(
            "axis",
            "dx",
            "the sum in the gradient runs over axis 1, which is the last only in a matrix",
            {"sum_axis": 1},
        ),
        Mistake("factor", "dx", "y is left out inside the sum", {"has_y_inside": False}),
    ),
    token_inputs=("x",),
    more_axes=({"B": 2, "T": 3, "D": 5}, {"B": 3, "T": 4, "D": 2}),
)
