"""LayerNorm."""

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
from glasslm.course.learn.exercises.rms_norm import NORM_MISTAKES, gradient_of_unit, reciprocal_root


def reference(
    dy: Array,
    x: Array,
    gain: Array,
    bias: Array,
    eps: float = 1e-5,
    *,
    axis: int | None = -1,
    center_axis: int | None = -1,
    ddof: int = 0,
    eps_place: str = "inside",
    has_root: bool = True,
    mean_axis: int | tuple[()] | None = -1,
    dunit_is: str = "dy gain",
) -> Reference:
    """x (N, D), gain and bias (D,) -> y, dx, dgain, dbias. arXiv:1607.06450."""
    mean = x.mean(center_axis, keepdims=True)
    variance = x.var(axis, keepdims=True, ddof=min(ddof, x.shape[-1] - 1))
    rstd = reciprocal_root(variance, eps, eps_place, has_root)
    unit, dunit = (x - mean) * rstd, gradient_of_unit(dy, gain, dunit_is)
    inside = dy if dunit_is == "dy in the mean" else dunit
    along = (inside * unit).mean(mean_axis, keepdims=True)
    return Reference(
        {
            "y": {
                "gain x r": gain * x * rstd,
                "-gain mean r": -gain * mean * rstd,
                "bias": bias + 0 * x,
            },
            "dx": {
                "r du": rstd * dunit,
                "-r mean(du)": -rstd * inside.mean(mean_axis, keepdims=True) + 0 * x,
                "-r u mean(du u)": -rstd * unit * along,
            },
            "dgain": {"sum(dy u)": (dy * unit).sum(0)},
            "dbias": {"sum(dy)": dy.sum(0)},
        },
        {"gain": gain + 0 * x, "r": rstd + 0 * x, "u": unit, "dy": dy},
        {"dgain": (dy * unit, 1), "dbias": (dy, 1)},
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, D = sizes.values()
    x = random.array(N, D)
    if is_large:  # a large mean: E[x²] - E[x]² cancels to nothing in float32
        x = 1e4 + x
    inputs = {"x": x, "gain": random.array(D), "bias": random.array(D)}
    return Case(dict(sizes), inputs, {"eps": 0.3} if number == 1 else {}, random.array(N, D))


EXERCISE = Exercise(
    name="layer_norm",
    title="LayerNorm",
    task="Subtract the mean of each row, divide by its standard deviation, multiply by a gain and "
    "add a bias: y = gain u + bias with u = r (x - mean) and r = 1 / sqrt(var + eps).",
    signature="layer_norm(x, gain, bias, eps=1e-5)",
    shapes="""x     (N, D)   N tokens of width D
gain  (D,)
bias  (D,)
y     (N, D)
backward(dy) -> (dx, dgain, dbias) of shapes (N, D), (D,) and (D,)""",
    reference=reference,
    sizes=Sizes.of("N D", small="1 2, 1 3, 2 2, 2 3", distinct="5 7, 4 5", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "Name one more piece, c = x - mean: then u = r c and r = 1 / sqrt(mean(c²) + eps).",
        "gain and bias are used by every token: dgain and dbias are sums over the tokens.",
        "With du = dy gain, dx has three terms: through c itself, through the mean, through r.",
        "dx = r (du - mean(du) - u mean(du u))",
    ),
    derivation="layer_norm",
    solution="engines/numpy/ops.py:layer_norm",
    needs=("rms_norm",),
    gradients=("dx", "dgain", "dbias"),
    mistakes=(
        *NORM_MISTAKES,
        Mistake("factor", "y", "the variance is divided by D - 1, not D", {"ddof": 1}),
        Mistake("axis", "y", "the mean runs over the tokens", {"center_axis": 0}),
        Mistake(
            "axis", "y", "mean and variance run over the tokens", {"center_axis": 0, "axis": 0}
        ),
        Mistake(
            "axis",
            "y",
            "mean and variance run over the whole array",
            {"center_axis": None, "axis": None},
        ),
    ),
    zero_inputs=("x",),
    token_inputs=("x",),
)
