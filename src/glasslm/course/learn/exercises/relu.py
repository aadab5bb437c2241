"""ReLU."""

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


def reference(dy: Array, x: Array, *, form: str = "max(x, 0)", passes: str = "x > 0") -> Reference:
    """x of any shape -> y, dx; the slope at 0 is 0."""
    y = {
        "max(x, 0)": np.maximum(x, 0),
        "min(x, 0)": np.minimum(x, 0),
        "|x|": abs(x),
        "x": x,
        "leaky": np.maximum(x, 0.01 * x),
    }[form]
    mask = {"x > 0": x > 0, "all": x == x, "dy > 0": dy > 0, "x < 0": x < 0}[passes]
    return Reference(
        {"y": {"max(x, 0)": y}, "dx": {"dy where x > 0": dy * mask}}, {"x": x, "dy": dy}
    )


EXERCISE = Exercise(
    name="relu",
    title="ReLU",
    task="Keep positive entries and set the others to 0: y = max(x, 0).",
    signature="relu(x)",
    shapes="""x  (N, D), or any other shape
y  the shape of x
backward(dy) -> dx, the shape of x""",
    reference=reference,
    sizes=Sizes.of("N D", small="1 1, 1 2, 2 2", distinct="5 7, 9 4", equal="4 4, 5 5"),
    draw=draw_activation,
    hints=(
        "The slope is 1 where x is positive and 0 where it is negative.",
        "dx = dy * (x > 0)",
    ),
    derivation="relu",
    solution="engines/numpy/ops.py:relu",
    gradients=("dx",),
    mistakes=(
        Mistake("mask", "y", "the negative half is kept instead", {"form": "min(x, 0)"}),
        Mistake("other", "y", "the absolute value", {"form": "|x|"}),
        Mistake("mask", "y", "x passes unchanged", {"form": "x"}),
        Mistake("other", "y", "a leaky ReLU", {"form": "leaky"}),
        Mistake("mask", "dx", "dy passes everywhere: it must be 0 where x < 0", {"passes": "all"}),
        Mistake("mask", "dx", "the mask looks at dy instead of x", {"passes": "dy > 0"}),
        Mistake("mask", "dx", "the mask is inverted", {"passes": "x < 0"}),
    ),
    token_inputs=("x",),
)
