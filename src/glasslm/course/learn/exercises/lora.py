"""LoRA: a frozen matrix and a change of low rank."""

from __future__ import annotations

from collections.abc import Callable

from glasslm import ops
from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Reference,
    Sizes,
)


def lora(
    x: Array, w: Array, a: Array, b: Array, alpha: float
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """x wᵀ + s (x aᵀ) bᵀ with s = alpha / r; w is not trained. arXiv:2106.09685, equation 3."""
    s = alpha / len(a)
    frozen, w_back = ops.linear(x, w)
    inner, a_back = ops.linear(x, a)
    change, b_back = ops.linear(s * inner, b)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        dx, _ = w_back(dy)  # the gradient of w is not used
        dinner, db = b_back(dy)
        dx_of_adapter, da = a_back(s * dinner)
        return dx + dx_of_adapter, da, db

    return frozen + change, backward


def reference(
    dy: Array,
    x: Array,
    w: Array,
    a: Array,
    b: Array,
    alpha: float,
    *,
    scale: Callable[[float, int, int, int], float] = lambda alpha, rank, ins, outs: alpha / rank,
) -> Reference:
    """x (N, I), w (O, I), a (r, I), b (O, r) -> y (N, O), dx, da, db in named terms."""
    s = scale(alpha, len(a), w.shape[1], w.shape[0])
    da_parts = s * (dy @ b)[:, :, None] * x[:, None]
    db_parts = s * dy[:, :, None] * (x @ a.T)[:, None]
    return Reference(
        {
            "y": {"x wᵀ": x @ w.T, "s (x aᵀ) bᵀ": s * x @ a.T @ b.T},
            "dx": {"dy w": dy @ w, "s dy b a": s * dy @ b @ a},
            "da": {"s bᵀ dyᵀ x": da_parts.sum(0)},
            "db": {"s dyᵀ x aᵀ": db_parts.sum(0)},
        },
        {"dy": dy},
        {"da": (da_parts, 1), "db": (db_parts, 1)},
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, outs, ins, rank = sizes.values()
    alpha = (3.0, 5.0, 0.7)[number % 3]
    inputs = {
        "x": random.array(N, ins),
        "w": random.array(outs, ins),
        "a": random.array(rank, ins),
        "b": random.array(outs, rank),
        "alpha": alpha,
    }
    scalars = {"alpha": alpha, "s": alpha / rank}
    return Case({**sizes, **scalars}, inputs, {}, random.array(N, outs))


EXERCISE = Exercise(
    name="lora",
    title="LoRA",
    task="A frozen matrix with a trained change of rank r: y = x wᵀ + s (x aᵀ) bᵀ with s = alpha "
    "/ r. backward gives the gradients of x, a and b; w is not trained and has none.",
    signature="lora(x, w, a, b, alpha)",
    shapes="""x      (N, I)
w      (O, I)  frozen
a      (r, I)
b      (O, r)
alpha  a float; s = alpha / r
y      (N, O)
backward(dy) -> (dx, da, db) of shapes (N, I), (r, I) and (O, r)""",
    reference=reference,
    sizes=Sizes.of(
        "N O I r",
        small="1 1 1 1, 1 1 2 1, 2 1 2 1, 2 2 2 1",
        distinct="6 4 5 2, 7 5 6 3, 5 6 4 2",
        equal="4 4 4 4, 5 5 5 5",
    ),
    draw=draw,
    hints=(
        "The adapter is two linear operations one after the other, with a factor between them.",
        "x goes into both products, so dx is a sum of two: through w, and through a.",
        "inner = s x aᵀ and y = inner bᵀ: db = dyᵀ inner, and dinner = s dy b.",
        "da = dinnerᵀ x, and dx = dy w + dinner a. The factor s is in all three gradients, once.",
    ),
    derivation="adapter",
    solution="course/learn/exercises/lora.py:lora",
    needs=("linear",),
    gradients=("dx", "da", "db"),
    mistakes=tuple(
        Mistake("factor", output, sentence, {"scale": scale})
        for output in ("y", "gradients")
        for sentence, scale in (
            ("s is alpha: it is alpha / r, with the rank r", lambda alpha, rank, ins, outs: alpha),
            (
                "s is alpha / I: it is divided by the rank r, the number of rows of a",
                lambda alpha, rank, ins, outs: alpha / ins,
            ),
            (
                "s is alpha / O: it is divided by the rank r, the number of rows of a",
                lambda alpha, rank, ins, outs: alpha / outs,
            ),
            (
                "s is alpha / sqrt(r), as in rsLoRA: this exercise has alpha / r",
                lambda alpha, rank, ins, outs: alpha / rank**0.5,
            ),
            ("s is r / alpha: it is alpha / r", lambda alpha, rank, ins, outs: rank / alpha),
            ("s is 1 / r: alpha is left out", lambda alpha, rank, ins, outs: 1 / rank),
            ("s is left out: it is alpha / r", lambda alpha, rank, ins, outs: 1.0),
        )
    ),
    token_inputs=("x",),
)
