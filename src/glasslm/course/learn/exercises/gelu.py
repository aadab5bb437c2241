"""GELU, in the tanh form of GPT-2."""

from __future__ import annotations

import math

import numpy as np

from glasslm.course.learn.exercise import (
    Array,
    Exercise,
    Mistake,
    Reference,
    Sizes,
    draw_activation,
)

ROOT = math.sqrt(2 / math.pi)


def reference(
    dy: Array,
    x: Array,
    *,
    form: str = "tanh",
    c: float = 0.044715,
    k: float = ROOT,
    power: int = 3,
    tanh_sign: int = -1,
    has_inner_slope: bool = True,
) -> Reference:
    """x of any shape -> y, dx. arXiv:1606.08415."""
    if form == "sigmoid":
        return Reference({"y": {"y": x / (1 + np.exp(-1.702 * x))}, "dx": {"dx": x}})
    if form == "erf":
        return _erf_form(dy, x)
    t = np.tanh(k * (x + c * x**power))
    slope = 0.5 * dy * x * (1 + tanh_sign * t * t)
    slope = slope * k if has_inner_slope else slope
    return Reference(
        {
            "y": {"x / 2": x / 2, "x t / 2": x * t / 2},
            "dx": {
                "dy (1 + t) / 2": dy * (1 + t) / 2,
                "dy x (1 - t²) k / 2": slope,
                "dy x (1 - t²) k 3 c x² / 2": slope * 3 * c * x * x * has_inner_slope,
            },
        },
        {
            "x": x,
            "1 - t²": 1 - t * t,
            "dy": dy,
            "x²": x * x,
            "k": np.full_like(x, k),
            "1 + t": 1 + t,
        },
    )


def _erf_form(dy: Array, x: Array) -> Reference:
    """The exact GELU, x times the normal distribution's integral."""
    erf = np.vectorize(math.erf, otypes=[float])
    phi = (1 + erf(x / math.sqrt(2))) / 2
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return Reference({"y": {"y": x * phi}, "dx": {"dx": dy * (phi + x * density)}})


EXERCISE = Exercise(
    name="gelu",
    title="GELU",
    task="The activation of GPT-2, in its tanh form: y = x (1 + t) / 2 with "
    "t = tanh(k (x + c x³)), k = sqrt(2 / pi) and c = 0.044715.",
    signature="gelu(x)",
    shapes="""x  (N, D), or any other shape
y  the shape of x
backward(dy) -> dx, the shape of x""",
    reference=reference,
    sizes=Sizes.of("N D", small="1 1, 1 2, 2 2", distinct="5 7, 9 4", equal="4 4, 5 5"),
    draw=draw_activation,
    hints=(
        "Name the inner part: u = k (x + c x³), t = tanh(u). Then y = x (1 + t) / 2, a product.",
        "The derivative of tanh(u) by u is 1 - t².",
        "The derivative of u by x is k (1 + 3 c x²).",
        "dx = dy ((1 + t) + x (1 - t²) k (1 + 3 c x²)) / 2",
    ),
    derivation="gelu",
    solution="engines/numpy/ops.py:gelu",
    gradients=("dx",),
    mistakes=(
        Mistake("other", "y", "the exact GELU with erf, not the tanh form", {"form": "erf"}),
        Mistake("other", "y", "the sigmoid form, x sigmoid(1.702 x)", {"form": "sigmoid"}),
        Mistake("factor", "y", "sqrt(2 / pi) is left out", {"k": 1.0}),
        Mistake("missing_term", "y", "the cubic term is left out", {"c": 0.0}),
        Mistake("sign", "y", "the sign of the cubic term", {"c": -0.044715}),
        Mistake("factor", "y", "0.044715 is left out", {"c": 1.0}),
        Mistake("factor", "y", "0.44715 in place of 0.044715", {"c": 0.44715}),
        Mistake("factor", "y", "2 / pi without its root", {"k": 2 / math.pi}),
        Mistake("other", "y", "x² where x³ belongs", {"power": 2}),
        Mistake(
            "factor", "y", "sqrt(pi / 2) in place of sqrt(2 / pi)", {"k": math.sqrt(math.pi / 2)}
        ),
        Mistake(
            "factor",
            "dx",
            "the derivative of the inner part is left out",
            {"has_inner_slope": False},
        ),
        Mistake("sign", "dx", "1 + t² where 1 - t² belongs", {"tanh_sign": 1}),
        Mistake("other", "dx", "the gradient of the exact GELU with erf", {"form": "erf"}),
    ),
    token_inputs=("x",),
)
