"""Grouped-query attention: key heads repeated for the query heads that share them."""

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
    dy: Array, x: Array, groups: int, *, order: str = "repeat", axis: int = 2
) -> Reference:
    """x (B, T, K, Q) -> y (B, T, K G, Q), dx. arXiv:2305.13245."""
    B, T, K, Q = x.shape
    if order == "tile":
        y = np.concatenate([x] * groups, axis)
        parts = np.moveaxis(dy.reshape(B, T, groups, K, Q), 2, 0)
    else:
        y = np.repeat(x, groups, axis)
        parts = np.moveaxis(dy.reshape(B, T, K, groups, Q), 3, 0)
    return Reference({"y": {"x": y}, "dx": {"sum of dy": parts.sum(0)}}, {}, {"dx": (parts, 1)})


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    B, T, K, G, Q = sizes.values()
    inputs = {"x": random.array(B, T, K, Q), "groups": G}
    return Case(dict(sizes), inputs, {}, random.array(B, T, K * G, Q))


EXERCISE = Exercise(
    name="gqa",
    title="grouped-query attention (GQA)",
    task="Let several query heads share a key head: repeat each of the K heads `groups` times, so "
    "that query head h finds key head h // groups at place h.",
    signature="gqa(x, groups)",
    shapes="""x       (B, T, K, Q)   batch, positions, key heads, size of a head
groups  G, the number of query heads for each key head
y       (B, T, K G, Q)
backward(dy) -> dx (B, T, K, Q)""",
    reference=reference,
    sizes=Sizes.of(
        "B T K G Q",
        small="1 1 1 2 1, 1 1 2 2 1, 1 2 2 2 1",
        distinct="2 5 4 3 7, 3 2 5 4 6",
        equal="2 2 2 2 2, 3 3 3 3 3",
    ),
    draw=draw,
    hints=(
        "np.repeat repeats each head where it is; np.tile repeats the whole row of heads.",
        "Copied forward, summed backward: dx adds the gradients of all copies.",
        "dy.reshape(B, T, K, groups, Q).sum(3)",
    ),
    derivation="attention",
    needs=("attention",),
    gradients=("dx",),
    mistakes=(
        Mistake(
            "axis",
            "y",
            "the heads are in another order: h % K in place of h // groups",
            {"order": "tile"},
        ),
        Mistake(
            "axis",
            "dx",
            "the heads of a group are taken in another order: h % K, not h // groups",
            {"order": "tile"},
        ),
        *(
            Mistake("axis", "y", f"the {what} are repeated, not the heads", {"axis": axis})
            for axis, what in ((0, "rows of the batch"), (1, "positions"), (3, "entries"))
        ),
    ),
)
