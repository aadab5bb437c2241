"""A residual connection around a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    dy: Array,
    x: Array,
    f: Callable[[Array], Any],
    *,
    adds: bool = True,
    is_double: bool = False,
) -> Reference:
    """x (N, D), f: x -> f(x), backward of f -> y, dx. arXiv:1512.03385."""
    output, f_backward = f(x.copy())
    if is_double:
        output, _ = f(output)
    terms = {"x": x, "f(x)": output}
    if not adds:
        terms = {"x f(x)": x * output}
    return Reference(
        {"y": terms, "dx": {"dy": dy, "gradient through f": f_backward(dy.copy())}},
        {"x": x, "f(x)": output},
    )


def scaled_tanh(scale: Array) -> Callable[[Array], Any]:
    """The function x -> tanh(x) scale with its backward pass; scale (D,)."""

    def f(x: Array) -> Any:
        t = np.tanh(x)
        scales = scale.astype(x.dtype)

        def backward(dy: Array) -> Array:
            return dy * (1 - t * t) * scales

        return t * scales, backward

    f.__name__ = f"tanh(x) * {np.round(scale, 4).tolist()}"
    return f


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, D = sizes.values()
    inputs = {"x": random.array(N, D), "f": scaled_tanh(random.array(D))}
    return Case(dict(sizes), inputs, {}, random.array(N, D))


EXERCISE = Exercise(
    name="residual",
    title="residual connection",
    task="Add a sublayer's output to its input: y = x + f(x). f is a function like yours: it "
    "returns its output and its backward.",
    signature="residual(x, f)",
    shapes="""x  (N, D)
f  f(x) returns (output, backward), both of x's shape; f's backward(dy) -> dx
y  (N, D)
backward(dy) -> dx (N, D)""",
    reference=reference,
    sizes=Sizes.of("N D", small="1 1, 1 2, 2 2", distinct="5 7, 9 4", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "x goes to two places: to the sum itself, and into f.",
        "What is used twice gets the sum of both gradients.",
        "output, f_backward = f(x); the second gradient is f_backward(dy).",
        "dx = dy + f_backward(dy), in a new array: dy belongs to the caller.",
    ),
    derivation="The block",
    needs=("linear",),
    gradients=("dx",),
    mistakes=(
        Mistake("other", "y", "x is multiplied by f(x): they must add", {"adds": False}),
        Mistake("other", "y", "f is applied twice", {"is_double": True}),
    ),
    token_inputs=("x",),
)
