"""RMSNorm."""

from __future__ import annotations

from typing import Any

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
    gain: Array,
    eps: float = 1e-5,
    *,
    axis: int | None = -1,
    size: str = "mean square",
    eps_place: str = "inside",
    is_centered: bool = False,
    has_root: bool = True,
    mean_axis: int | tuple[()] | None = -1,
    dunit_is: str = "dy gain",
    along: str = "unit",
) -> Reference:
    """x (N, D), gain (D,) -> y, dx, dgain. arXiv:1910.07467, equation 4."""
    z = x - x.mean(-1, keepdims=True) if is_centered else x
    mean_square = {
        "mean square": lambda: (z * z).mean(axis, keepdims=True),
        "sum of squares": lambda: (z * z).sum(axis, keepdims=True),
        "variance": lambda: x.var(-1, keepdims=True),
        "mean of |x|": lambda: abs(x).mean(-1, keepdims=True) ** 2,
    }[size]()
    rstd = reciprocal_root(mean_square, eps, eps_place, has_root)
    unit, dunit = z * rstd, gradient_of_unit(dy, gain, dunit_is)
    inside = (dy if dunit_is == "dy in the mean" else dunit) * (unit if along == "unit" else 1)
    return Reference(
        {
            "y": {"gain u": gain * unit},
            "dx": {
                "r du": rstd * dunit,
                "-r u mean(du u)": -rstd * unit * inside.mean(mean_axis, keepdims=True),
            },
            "dgain": {"sum(dy u)": (dy * unit).sum(0)},
        },
        {"gain": gain + 0 * x, "r": rstd + 0 * x, "u": unit, "x": x, "dy": dy},
        {"dgain": (dy * unit, 1)},
    )


def gradient_of_unit(dy: Array, gain: Array, dunit_is: str) -> Array:
    """dy gain, or what a usual mistake makes of it."""
    if dunit_is == "dy everywhere":
        return dy
    return dy * gain * gain if dunit_is == "dy gain²" else dy * gain


def reciprocal_root(square: Array, eps: float, eps_place: str, has_root: bool = True) -> Any:
    """1 / sqrt(square + eps), with the usual mistakes about eps and the root."""
    if not has_root:
        return 1 / (square + eps)
    return {
        "inside": lambda: (square + eps) ** -0.5,
        "none": lambda: square**-0.5,
        "outside": lambda: 1 / (square**0.5 + eps),
        "fixed": lambda: (square + 1e-5) ** -0.5,
    }[eps_place]()


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, D = sizes.values()
    inputs = {"x": random.array(N, D) * (1e3 if is_large else 1), "gain": random.array(D)}
    # 1e-5 vanishes in rounding, so one case has an eps that does not.
    return Case(dict(sizes), inputs, {"eps": 0.3} if number == 1 else {}, random.array(N, D))


NORM_MISTAKES = (
    Mistake("axis", "y", "the statistics run over the tokens, not over the last axis", {"axis": 0}),
    Mistake(
        "axis", "y", "the statistics run over the whole array, not the last axis", {"axis": None}
    ),
    Mistake("missing_term", "y", "eps is left out", {"eps_place": "none"}),
    Mistake("other", "y", "eps is outside the square root", {"eps_place": "outside"}),
    Mistake(
        "other", "y", "eps is fixed in the code; the argument is ignored", {"eps_place": "fixed"}
    ),
    Mistake("factor", "y", "the square root is left out", {"has_root": False}),
    Mistake("factor", "dx", "the gain is left out", {"dunit_is": "dy everywhere"}),
    Mistake("factor", "dx", "the gain is applied twice", {"dunit_is": "dy gain²"}),
    Mistake("missing_sum", "dx", "the mean in the gradient is left out", {"mean_axis": ()}),
    Mistake("factor", "dx", "the gain is left out inside the mean", {"dunit_is": "dy in the mean"}),
    Mistake("axis", "dx", "the mean in the gradient runs over the tokens", {"mean_axis": 0}),
    Mistake(
        "axis", "dx", "the mean in the gradient runs over the whole array", {"mean_axis": None}
    ),
)

EXERCISE = Exercise(
    name="rms_norm",
    title="RMSNorm",
    task="Divide each row by its root mean square and multiply it by a gain: "
    "y = gain u with u = r x and r = 1 / sqrt(mean(x²) + eps).",
    signature="rms_norm(x, gain, eps=1e-5)",
    shapes="""x     (N, D)   N tokens of width D
gain  (D,)
y     (N, D)
backward(dy) -> (dx, dgain) of shapes (N, D) and (D,)""",
    reference=reference,
    sizes=Sizes.of("N D", small="1 1, 1 2, 1 3, 2 2", distinct="5 7, 4 5", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "Go back through y = gain u first: du = dy gain, in the place of dy from there on.",
        "gain is used by every token, so dgain is a sum over the tokens.",
        "r depends on every entry of its row, so the gradient of u = r x has two terms: through x "
        "and through r.",
        "dr = sum(du x), and r changes by -r³ x / D for each x: this gives the second term of dx.",
    ),
    derivation="rms_norm",
    solution="engines/numpy/ops.py:rms_norm",
    needs=("linear",),
    gradients=("dx", "dgain"),
    mistakes=(
        *NORM_MISTAKES,
        Mistake(
            "factor",
            "y",
            "the sum of squares in place of their mean: 1/D is missing",
            {"size": "sum of squares"},
        ),
        Mistake(
            "factor",
            "y",
            "the length of x in place of its root mean square: sqrt(D) is missing",
            {"size": "sum of squares", "eps_place": "outside"},
        ),
        *(
            Mistake("other", "y", f"the {size} in place of the mean square", changes)
            for size in ("variance", "mean of |x|")
            for changes in (
                {"size": size, "eps_place": "inside"},
                {"size": size, "eps_place": "outside"},
            )
        ),
        Mistake("other", "y", "the mean is subtracted: that is LayerNorm", {"is_centered": True}),
        Mistake("factor", "dx", "u is left out inside the mean", {"along": "1"}),
    ),
    zero_inputs=("x",),
    token_inputs=("x",),
)
