"""SiLU, the activation of Llama's feed-forward."""

from __future__ import annotations

import numpy as np

from glasslm.course.learn.exercise import (
    Array,
    Exercise,
    Mistake,
    Reference,
    Sizes,
    draw_activation,
)


def reference(
    dy: Array,
    x: Array,
    *,
    exponent: float = -1,
    slope_sign: int = -1,
    derivative: str = "product rule",
) -> Reference:
    """x of any shape -> y, dx. arXiv:1702.03118."""
    s = 1 / (1 + np.exp(exponent * x))
    first, factor = (0 * x, 1) if derivative == "of the sigmoid" else (dy * s, x)
    return Reference(
        {
            "y": {"x s": x * s},
            "dx": {"dy s": first, "dy x s (1 - s)": dy * factor * s * (1 + slope_sign * s)},
        },
        {"x": x, "s": s, "1 - s": 1 - s, "dy": dy},
    )


EXERCISE = Exercise(
    name="silu",
    title="SiLU",
    task="The input times its sigmoid, entry by entry: y = x s with s = 1 / (1 + exp(-x)).",
    signature="silu(x)",
    shapes="""x  (N, D), or any other shape
y  the shape of x
backward(dy) -> dx, the shape of x""",
    reference=reference,
    sizes=Sizes.of("N D", small="1 1, 1 2, 2 2", distinct="5 7, 9 4", equal="4 4, 5 5"),
    draw=draw_activation,
    hints=(
        "y is a product of x and s(x): use the product rule.",
        "The derivative of the sigmoid is s (1 - s).",
        "dy/dx = s + x s (1 - s).",
        "exp(-x) overflows for large negative x. tanh does not: s = (1 + tanh(x / 2)) / 2.",
    ),
    derivation="silu",
    solution="engines/numpy/ops.py:silu",
    gradients=("dx",),
    mistakes=(
        Mistake(
            "missing_term",
            "dx",
            "the derivative of the sigmoid alone: the product rule has two terms",
            {"derivative": "of the sigmoid"},
        ),
        Mistake("sign", "y", "the sign in the exponent", {"exponent": 1}),
        *(
            Mistake("factor", "y", f"the sigmoid is taken of {-e:g} x", {"exponent": e})
            for e in (-2, -0.5, -1.702)
        ),
        Mistake("sign", "dx", "1 + s where 1 - s belongs", {"slope_sign": 1}),
    ),
    token_inputs=("x",),
)
