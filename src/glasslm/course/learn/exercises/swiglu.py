"""The gate of SwiGLU."""

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
    dy: Array,
    gates: Array,
    values: Array,
    *,
    activation: str = "silu",
    is_exchanged: bool = False,
    slope: str = "of silu",
) -> Reference:
    """gates and values (N, F) -> y, dgates, dvalues. arXiv:2002.05202."""
    if is_exchanged:
        gates, values = values, gates
    s = 1 / (1 + np.exp(-gates))
    silu = {
        "silu": gates * s,
        "sigmoid": s,
        "none": gates,
        "relu": np.maximum(gates, 0),
        "tanh": np.tanh(gates),
    }[activation]
    first, factor = (0 * s, 1) if slope == "of the sigmoid" else (dy * values * s, gates)
    dgates = {
        "dy values s": first,
        "dy values gates s (1 - s)": dy * values * factor * s * (1 - s),
    }
    if slope == "none":
        dgates = {"dy values": dy * values}
    elif slope == "value of silu":
        dgates = {"dy values silu": dy * values * silu}
    gradients = {"dgates": dgates, "dvalues": {"dy silu(gates)": dy * silu}}
    if is_exchanged:
        gradients = {"dgates": gradients["dvalues"], "dvalues": dgates}
    return Reference(
        {"y": {"silu(gates) values": silu * values}, **gradients},
        {"s": s, "1 - s": 1 - s, "gates": gates, "values": values, "dy": dy, "silu": silu},
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, F = sizes.values()
    gates = random.array(N, F) * (300 if is_large else 1)
    return Case(dict(sizes), {"gates": gates, "values": random.array(N, F)}, {}, random.array(N, F))


EXERCISE = Exercise(
    name="swiglu",
    title="SwiGLU",
    task="One half of a feed-forward's inner layer gates the other: y = silu(gates) values, with "
    "silu(g) = g / (1 + exp(-g)).",
    signature="swiglu(gates, values)",
    shapes="""gates   (N, F)   N tokens, inner width F
values  (N, F)
y       (N, F)
backward(dy) -> (dgates, dvalues), both (N, F)""",
    reference=reference,
    sizes=Sizes.of("N F", small="1 1, 1 2, 2 2", distinct="5 7, 9 4", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "y is a product of two functions: each gets dy times the other.",
        "dvalues = dy silu(gates)",
        "dgates = dy values silu'(gates), and silu' = s + g s (1 - s) with the sigmoid s.",
    ),
    derivation="gate",
    solution="engines/numpy/ops.py:gate",
    needs=("silu",),
    gradients=("dgates", "dvalues"),
    mistakes=(
        Mistake(
            "other",
            "y",
            "gates and values are exchanged: silu belongs to the gates",
            {"is_exchanged": True},
        ),
        Mistake("factor", "y", "the sigmoid alone, not silu", {"activation": "sigmoid"}),
        Mistake("missing_term", "y", "the gates have no activation", {"activation": "none"}),
        Mistake("other", "y", "ReLU, not silu: that is ReGLU", {"activation": "relu"}),
        Mistake("other", "y", "tanh, not silu", {"activation": "tanh"}),
        Mistake(
            "other",
            "gradients",
            "gates and values are exchanged in the gradient",
            {"is_exchanged": True},
        ),
        Mistake(
            "missing_term",
            "dgates",
            "the slope of the sigmoid alone: silu is a product, so its slope has two terms",
            {"slope": "of the sigmoid"},
        ),
        Mistake("missing_term", "dgates", "the slope of silu is left out", {"slope": "none"}),
        Mistake("other", "dgates", "silu in place of its slope", {"slope": "value of silu"}),
        Mistake("factor", "dvalues", "the sigmoid alone, not silu", {"activation": "sigmoid"}),
        Mistake("factor", "dvalues", "the gates have no activation", {"activation": "none"}),
    ),
    token_inputs=("gates", "values"),
)
