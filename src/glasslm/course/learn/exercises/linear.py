"""A linear layer without a bias."""

from __future__ import annotations

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
    w: Array,
    *,
    is_w_untransposed: bool = False,
    is_dx_transposed: bool = False,
) -> Reference:
    """x (N, I), w (O, I) -> y (N, O), dx (N, I), dw (O, I)."""
    dx = dy @ (w.T if is_dx_transposed else w)
    dw = dy[:, :, None] * x[:, None, :]  # (N, O, I)
    dx_parts = (dy[:, :, None] * w).swapaxes(0, 1)  # (O, N, I)
    return Reference(
        {
            "y": {"x wᵀ": x @ (w if is_w_untransposed else w.T)},
            "dx": {"dy w": dx},
            "dw": {"dyᵀ x": dw.sum(0)},
        },
        {"dy": dy},
        {"dw": (dw, 1), "dx": (dx_parts, 1)},
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, I, O = sizes.values()  # noqa: E741 - the letters of docs/backward.md
    inputs = {"x": random.array(N, I), "w": random.array(O, I)}
    return Case(dict(sizes), inputs, {}, random.array(N, O))


EXERCISE = Exercise(
    name="linear",
    title="linear layer",
    task="Multiply each token by a matrix: y = x wᵀ. Most of a model's weights are in such layers.",
    signature="linear(x, w)",
    shapes="""x  (N, I)   N tokens, I inputs
w  (O, I)   O outputs
y  (N, O)
backward(dy) -> (dx, dw) of shapes (N, I) and (O, I)""",
    reference=reference,
    sizes=Sizes.of(
        "N I O",
        small="1 1 1, 1 2 1, 1 1 2, 2 1 2, 2 2 2",
        distinct="5 7 4, 4 6 3",
        equal="4 4 4, 5 5 5",
    ),
    draw=draw,
    hints=(
        "Write one entry: y[n, o] is the sum of x[n, i] w[o, i] over i.",
        "x[n, i] enters y[n, o] for every o, with the factor w[o, i]: dx sums over the outputs.",
        "w[o, i] enters y[n, o] for every token n, with the factor x[n, i]: dw sums over them.",
        "The shapes leave one choice: dx = dy w and dw = dyᵀ x.",
    ),
    derivation="linear",
    solution="engines/numpy/ops.py:linear",
    gradients=("dx", "dw"),
    mistakes=(
        Mistake("transposed", "y", "w is not transposed", {"is_w_untransposed": True}),
        Mistake("transposed", "dx", "w is transposed in dx", {"is_dx_transposed": True}),
    ),
    token_inputs=("x",),
)
