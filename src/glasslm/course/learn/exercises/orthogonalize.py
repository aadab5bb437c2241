"""Newton-Schulz orthogonalization, the core of Muon."""

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
    Sizes,
    VerdictName,
)

Iteration = Callable[[Array, int], Array]  # g, steps -> x

A, B, C = 3.4445, -4.7750, 2.0315


def iterate(
    g: Array,
    steps: int,
    *,
    divisor: Callable[[Array], Any] = lambda g: np.linalg.norm(g) + 1e-7,
    polynomial: Callable[[Array, Array], Array] = lambda x, gram: (
        A * x + (B * gram + C * gram @ gram) @ x
    ),
) -> Array:
    """g (O, I) -> `steps` of the polynomial of x and its gram matrix x xᵀ (O, O)."""
    x = g / divisor(g)
    for _ in range(steps):
        x = polynomial(x, x @ x.T)
    return x


def reference(g: Array, steps: int, *, wrong: Iteration | None = None) -> Array:
    """g (O, I) -> x (O, I) after so many steps; five bring it near U Vᵀ of g = U S Vᵀ."""
    if wrong is None:
        return iterate(g, steps)
    x = wrong(g, steps)
    return x if np.isfinite(x).all() else np.full_like(x, np.nan)


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    # Small entries, and few steps at first: a wrong iteration stays finite, and can be recognized.
    g = random.array(*sizes.values()) * (1e3 if is_large else 0.1)
    steps = 5 if is_large else (1, 2, 3, 2)[number % 4]
    return Case({**sizes, "a": A, "b": B, "c": C}, {"g": g, "steps": steps})


def repeat_first_gram(g: Array, steps: int) -> Array:
    """`iterate` with the gram matrix of the first step in all."""
    x = g / (np.linalg.norm(g) + 1e-7)
    gram = x @ x.T
    for _ in range(steps):
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


def _unit_rows(g: Array) -> Any:
    return np.linalg.norm(g, axis=1, keepdims=True) + 1e-7


def _unit_columns(g: Array) -> Any:
    return np.linalg.norm(g, axis=0, keepdims=True) + 1e-7


def _svd(g: Array, steps: int) -> Array:
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    return u @ vt


WRONG_ITERATIONS: tuple[tuple[VerdictName, str, Iteration], ...] = (
    (
        "missing_term",
        "g is not divided by its Frobenius norm first: the singular values must be in 0..1",
        lambda g, n: iterate(g, n, divisor=lambda g: 1.0),
    ),
    (
        "other",
        "g is divided by its largest singular value: it is divided by the Frobenius norm, "
        "the root of the sum of all squares",
        lambda g, n: iterate(g, n, divisor=lambda g: np.linalg.norm(g, 2) + 1e-7),
    ),
    (
        "other",
        "g is divided by its largest entry: it is divided by the Frobenius norm",
        lambda g, n: iterate(g, n, divisor=lambda g: abs(g).max() + 1e-7),
    ),
    (
        "other",
        "g is divided by the sum of its absolute values: it is divided by the Frobenius "
        "norm, the root of the sum of squares",
        lambda g, n: iterate(g, n, divisor=lambda g: abs(g).sum() + 1e-7),
    ),
    (
        "factor",
        "g is divided by the root of the mean square: the Frobenius norm is the root of "
        "the sum of squares",
        lambda g, n: iterate(g, n, divisor=lambda g: np.sqrt((g * g).mean()) + 1e-7),
    ),
    (
        "factor",
        "g is divided by the sum of squares: the Frobenius norm is its root",
        lambda g, n: iterate(g, n, divisor=lambda g: (g * g).sum() + 1e-7),
    ),
    (
        "axis",
        "each row is divided by its own norm: the Frobenius norm is one number for g",
        lambda g, n: iterate(g, n, divisor=_unit_rows),
    ),
    (
        "axis",
        "each column is divided by its own norm: the Frobenius norm is one number for g",
        lambda g, n: iterate(g, n, divisor=_unit_columns),
    ),
    (
        "missing_term",
        "1e-7 is not added to the norm: without it a matrix of zeros becomes NaN",
        lambda g, n: iterate(g, n, divisor=np.linalg.norm),
    ),
    *(
        (
            "other",
            f"{eps:g} is added to the norm: it is 1e-7",
            lambda g, n, eps=eps: iterate(g, n, divisor=lambda g: np.linalg.norm(g) + eps),
        )
        for eps in (1e-8, 1e-6, 1e-5, 1e-12)
    ),
    (
        "other",
        "1e-7 is added below the square root: it is added to the norm",
        lambda g, n: iterate(g, n, divisor=lambda g: np.sqrt((g * g).sum() + 1e-7)),
    ),
    *(
        (
            "factor",
            f"the coefficient {name} is left out",
            lambda g, n, a=a, b=b, c=c: iterate(
                g, n, polynomial=lambda x, gram: a * x + (b * gram + c * gram @ gram) @ x
            ),
        )
        for name, a, b, c in (("a", 1.0, B, C), ("b", A, 1.0, C), ("c", A, B, 1.0))
    ),
    (
        "other",
        "gram is computed once: it is that of the new x in each step",
        lambda g, n: repeat_first_gram(g, n),
    ),
    *(
        (
            "other",
            f"there is one step too {word}: {formula} in place of steps",
            lambda g, n, more=more: iterate(g, max(n + more, 0)),
        )
        for more, word, formula in ((1, "many", "steps + 1"), (-1, "few", "steps - 1"))
    ),
    *(
        (
            "other",
            f"there are always {fixed} steps: the argument steps is not used",
            lambda g, n, fixed=fixed: iterate(g, fixed),
        )
        for fixed in (5, 1, 0, 10)
    ),
    (
        "other",
        "b and c are exchanged: b belongs to (x xᵀ) x, and c to (x xᵀ)² x",
        lambda g, n: iterate(
            g, n, polynomial=lambda x, gram: A * x + (C * gram + B * gram @ gram) @ x
        ),
    ),
    (
        "sign",
        "the sign of b: it is -4.7750",
        lambda g, n: iterate(
            g, n, polynomial=lambda x, gram: A * x + (-B * gram + C * gram @ gram) @ x
        ),
    ),
    (
        "sign",
        "the sign of c: it is +2.0315",
        lambda g, n: iterate(
            g, n, polynomial=lambda x, gram: A * x + (B * gram - C * gram @ gram) @ x
        ),
    ),
    (
        "missing_term",
        "the term c (x xᵀ)² x is left out",
        lambda g, n: iterate(g, n, polynomial=lambda x, gram: A * x + B * gram @ x),
    ),
    (
        "missing_term",
        "the term b (x xᵀ) x is left out",
        lambda g, n: iterate(g, n, polynomial=lambda x, gram: A * x + C * gram @ gram @ x),
    ),
    (
        "missing_term",
        "the term a x is left out",
        lambda g, n: iterate(g, n, polynomial=lambda x, gram: (B * gram + C * gram @ gram) @ x),
    ),
    (
        "other",
        "gram is squared entry by entry: (x xᵀ)² is the product of matrices gram @ gram",
        lambda g, n: iterate(
            g, n, polynomial=lambda x, gram: A * x + (B * gram + C * gram * gram) @ x
        ),
    ),
    (
        "other",
        "the coefficients are 1.5 and -0.5, of the classical iteration: they are 3.4445, "
        "-4.7750 and 2.0315",
        lambda g, n: iterate(g, n, polynomial=lambda x, gram: 1.5 * x - 0.5 * gram @ x),
    ),
    (
        "other",
        "the coefficients are 15/8, -10/8 and 3/8: they are 3.4445, -4.7750 and 2.0315",
        lambda g, n: iterate(
            g,
            n,
            polynomial=lambda x, gram: (15 * x + (-10 * gram + 3 * gram @ gram) @ x) / 8,
        ),
    ),
    (
        "other",
        "this is the exact U Vᵀ: the exercise asks for steps of the polynomial, whose "
        "singular values are only about 1",
        _svd,
    ),
    (
        "transposed",
        "gram is xᵀ x on the left of x, which runs for square matrices only: it is x xᵀ",
        lambda g, n: iterate(
            g,
            n,
            polynomial=lambda x, gram: A * x + (B * x.T @ x + C * x.T @ x @ x.T @ x) @ x,
        ),
    ),
    (
        "transposed",
        "x xᵀ stands on the right of x, which runs for square matrices only: it stands on the left",
        lambda g, n: iterate(
            g, n, polynomial=lambda x, gram: A * x + x @ (B * gram + C * gram @ gram)
        ),
    ),
)

EXERCISE = Exercise(
    name="orthogonalize",
    title="Newton-Schulz",
    task="Set the singular values of a matrix to about 1. Divide g by its Frobenius norm (plus "
    "1e-7), then repeat `steps` times: x = a x + b (x xᵀ) x + c (x xᵀ)² x, with a, b, c = 3.4445, "
    "-4.7750, 2.0315.",
    signature="orthogonalize(g, steps)",
    shapes="""g      (O, I)  any matrix, wide or tall
steps  the number of repetitions; Muon takes 5
x      (O, I)  after 5 steps about U Vᵀ, where g = U S Vᵀ""",
    reference=reference,
    sizes=Sizes.of("O I", small="1 1, 1 2, 2 2", distinct="3 5, 6 4, 2 7, 5 3", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "The Frobenius norm is the root of the sum of all squares. After the division no singular "
        "value is above 1.",
        "gram = x @ x.T is (O, O), so that gram @ x is (O, I), the shape of x.",
        "The term of the fifth degree is gram @ gram @ x, a product of matrices, not gram ** 2.",
        "x = a * x + (b * gram + c * gram @ gram) @ x, again and again, with the gram matrix of "
        "the new x each time.",
    ),
    derivation="orthogonalize",
    solution="engines/numpy/optimizer.py:orthogonalize",
    needs=("linear",),
    outputs=("x",),
    mistakes=tuple(
        Mistake(verdict, "x", sentence, {"wrong": wrong})
        for verdict, sentence, wrong in WRONG_ITERATIONS
    ),
    zero_inputs=("g",),
)
