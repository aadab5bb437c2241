"""Dropout, with the random numbers given."""

from __future__ import annotations

from collections.abc import Callable

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


def dropout(x: Array, uniform: Array, p: float) -> tuple[Array, Callable[[Array], Array]]:
    """x with zeros where uniform < p, the rest divided by 1 - p. arXiv:1207.0580."""
    mask = ((uniform >= p) / (1 - p)).astype(x.dtype)
    return mask * x, lambda dy: mask * dy


def reference(
    dy: Array,
    x: Array,
    uniform: Array,
    p: float,
    *,
    drops: str = "below p",
    scale: str = "1/(1-p)",
    backward: str = "mask dy",
) -> Reference:
    """x of any shape -> y, dx."""
    keep = {
        "below p": uniform >= p,
        "above p": uniform < p,
        "above 1 - p": uniform < 1 - p,
        "below 1 - p": uniform > 1 - p,
        "nothing": np.ones(x.shape, bool),
        "whole rows": np.broadcast_to(uniform[:, :1] >= p, x.shape),
        "whole columns": np.broadcast_to(uniform[:1] >= p, x.shape),
    }[drops]
    factor = {
        "1/(1-p)": 1 / (1 - p),
        "1": 1.0,
        "1/p": 1 / p,
        "1-p": 1 - p,
        "p": p,
        "1/mean": 1 / np.maximum(keep.mean(), 1e-9),
    }[scale]
    mask = keep * factor
    dx = {
        "mask dy": mask * dy,
        "dy": dy,
        "dy/(1-p)": factor * dy,
        "mask of y": np.where(x * mask > 0, factor * dy, 0),
        "kept dy": keep * dy,
        "mask² dy": mask * mask * dy,
        "y dy": x * mask * dy,
    }[backward]
    return Reference({"y": {"mask x": mask * x}, "dx": {"mask dy": dx}}, {"x": x, "dy": dy})


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, D = sizes.values()
    # Odd hundredths beside even ones, so that no number equals p or 1 - p: < and <= are both right.
    p = (0.35, 0.65, 0.25)[number % 3]
    uniform = np.round(random.generator.uniform(0, 1, (N, D)) * 50) / 50
    # Of each case some entries are kept and some dropped, and some on each side of p and 1 - p.
    ends = np.array([p - 0.05, p + 0.05, 0.96, 0.04])[: uniform.size]
    uniform.flat[random.generator.permutation(uniform.size)[: len(ends)]] = ends
    inputs = {"x": random.array(N, D) * (1e3 if is_large else 1), "uniform": uniform, "p": p}
    return Case({**sizes, "p": p, "1 - p": 1 - p}, inputs, {}, random.array(N, D))


EXERCISE = Exercise(
    name="dropout",
    title="dropout",
    task="Drop the entries whose uniform number is below p, and divide the others by 1 - p, so "
    "that the mean of y is x: y = mask x, with mask = 0 or 1 / (1 - p).",
    signature="dropout(x, uniform, p)",
    shapes="""x        (N, D), or any other shape
uniform  the shape of x, random numbers from 0 to 1; an entry is dropped where uniform < p
p        the share to be dropped, a float
y        the shape of x
backward(dy) -> dx, the shape of x""",
    reference=reference,
    sizes=Sizes.of("N D", small="1 2, 1 3, 2 2", distinct="5 7, 6 4, 3 8", equal="4 4, 5 5"),
    draw=draw,
    hints=(
        "Compute the mask once, in the forward pass. The backward pass needs the same one.",
        "An entry is kept with the probability 1 - p. What factor makes the mean of y equal x?",
        "mask = (uniform >= p) / (1 - p), and y = mask x. It is a product with a constant.",
        "dx = mask dy. (uniform >= p) / (1 - p) is float64: convert it to the type of x.",
    ),
    derivation="dropout",
    solution="course/learn/exercises/dropout.py:dropout",
    gradients=("dx",),
    mistakes=(
        Mistake(
            "mask",
            "y",
            "the mask is inverted: entries with uniform < p are dropped, the others are kept",
            {"drops": "above p"},
        ),
        Mistake(
            "mask",
            "y",
            "an entry is kept where uniform < 1 - p: this exercise drops where uniform < p",
            {"drops": "above 1 - p"},
        ),
        Mistake(
            "mask",
            "y",
            "an entry is kept where uniform > 1 - p, a share of p: it is dropped where uniform < p",
            {"drops": "below 1 - p"},
        ),
        Mistake(
            "missing_term",
            "y",
            "nothing is dropped: y is x",
            {"drops": "nothing", "scale": "1"},
        ),
        Mistake(
            "mask",
            "y",
            "nothing is dropped: all entries are divided by 1 - p",
            {"drops": "nothing"},
        ),
        *(
            Mistake(
                "axis",
                "y",
                f"{part} are dropped or kept together: each entry has its own uniform number",
                {"drops": part},
            )
            for part in ("whole rows", "whole columns")
        ),
        Mistake(
            "mask",
            "y",
            "the mask is inverted, and the kept entries are not divided by 1 - p",
            {"drops": "above p", "scale": "1"},
        ),
        *(
            Mistake("factor", "y", sentence, {"scale": scale})
            for scale, sentence in (
                ("1", "the kept entries are not divided by 1 - p, so the mean of y is (1 - p) x"),
                ("1/p", "the kept entries are divided by p: they are kept with probability 1 - p"),
                ("1-p", "the kept entries are multiplied by 1 - p: they are divided by it"),
                ("p", "the kept entries are multiplied by p: they are divided by 1 - p"),
                (
                    "1/mean",
                    "the kept entries are divided by the share that was kept in this call: it is "
                    "1 - p, the share that is expected",
                ),
            )
        ),
        Mistake(
            "mask",
            "dx",
            "dx is not masked: a dropped entry has no influence on y, so its gradient is 0",
            {"backward": "dy"},
        ),
        Mistake(
            "mask",
            "dx",
            "dx is divided by 1 - p but not masked: the gradient of a dropped entry is 0",
            {"backward": "dy/(1-p)"},
        ),
        Mistake(
            "mask",
            "dx",
            "the mask of dx is y > 0: it is the mask of the forward pass",
            {"backward": "mask of y"},
        ),
        Mistake(
            "factor",
            "dx",
            "dx is masked but not divided by 1 - p: it is multiplied by the mask of y",
            {"backward": "kept dy"},
        ),
        Mistake(
            "factor",
            "dx",
            "dx is divided by 1 - p twice",
            {"backward": "mask² dy"},
        ),
        Mistake(
            "other",
            "dx",
            "dx is y dy: it is mask dy, because y is linear in x",
            {"backward": "y dy"},
        ),
    ),
    token_inputs=("x",),
)
