"""Clipping of gradients by their global norm."""

from __future__ import annotations

import math
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
from glasslm.ops import clip_by_norm, clip_by_value


def clip(dw: Array, db: Array, max_norm: float) -> tuple[Array, Array, float]:
    """Both gradients times min(1, max_norm / norm), and the norm before. arXiv:1211.5063."""
    norm = math.sqrt(float((dw * dw).sum()) + float((db * db).sum()))
    scale = min(1.0, max_norm / norm) if norm else 1.0
    return dw * scale, db * scale, norm


def reference(
    dw: Array,
    db: Array,
    max_norm: float,
    *,
    norm_of: Callable[[Array, Array], float] = lambda dw, db: clip_by_norm([dw, db], 1.0)[1],
    factor: Callable[[float, float], float] = lambda norm, limit: min(1.0, limit / norm),
    clips: str = "together",
    returned: str = "norm before",
) -> dict[str, Any]:
    """Two gradients -> both, clipped by `glasslm.ops`, and their norm before clipping."""
    norm = norm_of(dw, db)
    ways: dict[str, Callable[[], list[Array]]] = {
        "together": lambda: [g * (factor(norm, max_norm) if norm else 1.0) for g in (dw, db)],
        "each array": lambda: [clip_by_norm(g, max_norm)[0] for g in (dw, db)],
        "each entry": lambda: [clip_by_value(g, max_norm) for g in (dw, db)],
    }
    clipped = ways[clips]()
    if returned == "norm after":
        _, norm = clip_by_norm(clipped, 1.0)
    return {"clipped dw": clipped[0], "clipped db": clipped[1], "norm": norm}


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    dw, db = random.array(sizes["O"], sizes["I"]), random.array(sizes["O"])
    if is_large:
        dw, db = dw * 1e3, db * 1e3
    norm = float(np.hypot(np.linalg.norm(dw), np.linalg.norm(db)))
    # In turns below the largest entry of both arrays, and above the norm.
    least = min(float(abs(dw).max()), float(abs(db).max()))
    max_norm = round((0.8 * least, 1.6 * norm, 0.6 * least)[number % 3], 2)
    inputs = {"dw": dw, "db": db, "max_norm": max_norm}
    return Case({**sizes, "max_norm": max_norm, "norm": norm}, inputs)


def _mistakes(verdict: VerdictName, sentence: str, **changes: Any) -> tuple[Mistake, ...]:
    """One mistake, which may show in each of the three results."""
    return tuple(
        Mistake(verdict, output, sentence, changes)
        for output in ("clipped dw", "clipped db", "norm")
    )


EXERCISE = Exercise(
    name="clip_by_norm",
    title="clipping",
    task="Scale two gradients together so that their global norm, the root of the sum of all "
    "squares in both, is at most max_norm: multiply both by min(1, max_norm / norm).",
    signature="clip_by_norm(dw, db, max_norm)",
    shapes="""dw        (O, I)
db        (O,)
max_norm  the limit, a float above 0
returns   dw, db, norm: the gradients, clipped, as new arrays; and the norm before, a float""",
    reference=reference,
    sizes=Sizes.of("O I", small="1 1, 1 2, 2 2", distinct="3 5, 4 2, 5 7, 2 6", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "All gradients of a model are one long vector: one norm, and one factor for all.",
        "The norm is the root of the sum of the squares of every entry of both arrays.",
        "A norm below the limit stays as it is: the factor is never above 1.",
        "A norm of 0 has the factor 1, not max_norm / 0.",
    ),
    derivation="NumpyEngine.update",
    solution="course/learn/exercises/clip_by_norm.py:clip",
    needs=("linear",),
    outputs=("clipped dw", "clipped db", "norm"),
    mistakes=(
        *_mistakes(
            "axis",
            "each array is clipped by its own norm: the norm is that of all gradients together, so "
            "that the direction does not change",
            clips="each array",
        ),
        *_mistakes(
            "other",
            "the entries are clipped one by one: all are multiplied by one factor, so that the "
            "direction does not change",
            clips="each entry",
        ),
        *_mistakes(
            "other",
            "gradients below the limit are scaled up: the factor is min(1, max_norm / norm)",
            factor=lambda norm, limit: limit / norm,
        ),
        *_mistakes(
            "other",
            "the factor is max(1, max_norm / norm): it is min(1, max_norm / norm)",
            factor=lambda norm, limit: max(1.0, limit / norm),
        ),
        *_mistakes(
            "factor",
            "the factor is norm / max_norm: it is max_norm / norm",
            factor=lambda norm, limit: min(1.0, norm / limit),
        ),
        *_mistakes(
            "factor",
            "the clipped gradients have the norm 1: they are not multiplied by max_norm",
            factor=lambda norm, limit: min(1.0, 1 / norm),
        ),
        *_mistakes(
            "factor",
            "the clipped gradients have the norm 1: they are not multiplied by max_norm",
            factor=lambda norm, limit: 1 / norm if norm > limit else 1.0,
        ),
        *_mistakes(
            "factor",
            "the gradients above the limit are multiplied by max_norm: the norm is left out",
            factor=lambda norm, limit: limit if norm > limit else 1.0,
        ),
        *_mistakes(
            "missing_term",
            "the gradients are returned as they are: they are multiplied by min(1, max_norm / "
            "norm)",
            factor=lambda norm, limit: 1.0,
        ),
        *_mistakes(
            "other",
            "the norms of the arrays are added: add the squares of both, and take one root",
            norm_of=lambda dw, db: float(np.linalg.norm(dw) + np.linalg.norm(db)),
        ),
        *_mistakes(
            "other",
            "the norm is the larger one of the two arrays: add the squares of both",
            norm_of=lambda dw, db: float(max(np.linalg.norm(dw), np.linalg.norm(db))),
        ),
        *_mistakes(
            "factor",
            "the square root is left out: the norm is the root of the sum of squares",
            norm_of=lambda dw, db: float((dw * dw).sum() + (db * db).sum()),
        ),
        *_mistakes(
            "factor",
            "the norm is the root of the mean square: it is that of the sum",
            norm_of=lambda dw, db: float(
                np.sqrt(((dw * dw).sum() + (db * db).sum()) / (dw.size + db.size))
            ),
        ),
        *_mistakes(
            "other",
            "the norm is the largest entry: it is the root of the sum of squares",
            norm_of=lambda dw, db: float(max(abs(dw).max(), abs(db).max())),
        ),
        *_mistakes(
            "other",
            "the norm is the sum of the absolute values: it is the root of the sum of squares",
            norm_of=lambda dw, db: float(abs(dw).sum() + abs(db).sum()),
        ),
        *_mistakes(
            "overwritten",
            "the norm is that of db alone: the squares of all arrays add up, = in place of +=",
            norm_of=lambda dw, db: float(np.linalg.norm(db)),
        ),
        *_mistakes(
            "missing_sum",
            "the norm is that of dw alone: the squares of all arrays add up",
            norm_of=lambda dw, db: float(np.linalg.norm(dw)),
        ),
        *(
            mistake
            for eps in (1e-6, 1e-5, 1e-4)
            for mistake in _mistakes(
                "other",
                f"{eps:g} is added to the norm, as PyTorch does: this exercise does not, and a "
                "norm of 0 has the factor 1",
                factor=lambda norm, limit, eps=eps: min(1.0, limit / (norm + eps)),
            )
        ),
        *_mistakes(
            "factor",
            "the factor is the root of max_norm / norm: it is max_norm / norm",
            factor=lambda norm, limit: min(1.0, (limit / norm) ** 0.5),
        ),
        *_mistakes(
            "factor",
            "the factor is the square of max_norm / norm: it is max_norm / norm",
            factor=lambda norm, limit: min(1.0, (limit / norm) ** 2),
        ),
        *_mistakes(
            "other",
            "the norm after clipping is returned: it is the one before, which a log needs",
            returned="norm after",
        ),
    ),
    zero_inputs=("dw", "db"),
)
