"""One tile of flash attention: the softmax in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np

from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Reference,
    Sizes,
    VerdictName,
)


def flash_step(
    scores: Array, v: Array, row_max: Array, total: Array, mixed: Array
) -> tuple[Array, Array, Array]:
    """The maximum and the two sums of each row after one more tile. arXiv:2205.14135, alg. 1."""
    new_max = np.maximum(row_max, scores.max(1))
    rescale = np.exp(row_max - new_max)
    e = np.exp(scores - new_max[:, None])
    return new_max, total * rescale + e.sum(1), mixed * rescale[:, None] + e @ v


def reference(
    scores: Array,
    v: Array,
    row_max: Array,
    total: Array,
    mixed: Array,
    *,
    maximum: str = "both",
    rescaling: str = "exp(row_max - new_max)",
    relative_to: str = "new_max",
    is_divided: bool = False,
    keeps_sums: bool = True,
    returned: str = "row_max",
) -> Reference:
    """The three results in named terms: the old sums, rescaled, and those of the tile."""
    tile_max = scores.max(1)
    both = np.maximum(row_max, tile_max)
    new_max = {
        "both": both,
        "tile": tile_max,
        "old": np.where(np.isinf(row_max), tile_max, row_max),
        "whole tile": np.maximum(row_max, scores.max()),
        "zero": 0 * tile_max,
    }[maximum]
    difference = np.where(np.isinf(row_max), -np.inf, row_max - new_max)
    rescale = {
        "exp(row_max - new_max)": np.exp(difference),
        "exp(new_max - row_max)": np.exp(np.where(np.isinf(difference), -np.inf, -difference)),
        "row_max - new_max": np.where(np.isinf(difference), 0, difference),
        "twice": np.exp(2 * difference),
        "none": np.ones_like(difference),
        "of both": np.exp(difference),
    }[rescaling]
    start = {"new_max": new_max, "row_max": np.where(np.isinf(row_max), new_max, row_max)}
    e = np.exp(scores - start.get(relative_to, tile_max)[:, None])
    total_terms = {"total rescale": total * rescale, "sum of e": e.sum(1)}
    mixed_terms = {"mixed rescale": mixed * rescale[:, None], "e v": e @ v}
    if is_divided:
        whole = sum(total_terms.values())[:, None]
        mixed_terms = {name: term / whole for name, term in mixed_terms.items()}
    if rescaling == "of both":
        total_terms["sum of e"] = e.sum(1) * rescale
        mixed_terms["e v"] = e @ v * rescale[:, None]
    if not keeps_sums:
        total_terms["total rescale"] *= 0
        mixed_terms["mixed rescale"] *= 0
    maxima = {"row_max": new_max, "log": new_max + np.log(e.sum(1) + total * rescale)}
    return Reference(
        {
            "new row_max": {"row_max": maxima[returned]},
            "new total": total_terms,
            "new mixed": mixed_terms,
        }
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    R, C, Q = sizes.values()
    scores = random.array(R, C)
    row_max, total = random.array(R), abs(random.array(R)) + 1
    mixed = random.array(R, Q)
    if is_large:
        scores, row_max = scores * 400 + 2000, row_max * 400 + 2000
    if number == 1:  # the first tile of all
        row_max, total, mixed = np.full(R, -np.inf), np.zeros(R), np.zeros((R, Q))
    if number == 2:
        scores[0, 1:] = -np.inf  # hidden keys
        row_max += 1.5  # some maxima are those of earlier tiles
    inputs = {
        "scores": scores,
        "v": random.array(C, Q),
        "row_max": row_max,
        "total": total,
        "mixed": mixed,
    }
    return Case(dict(sizes), inputs)


MISTAKES: tuple[tuple[VerdictName, str, str, dict[str, Any]], ...] = (
    (
        "missing_term",
        "new row_max",
        "the maximum is that of the tile alone: it is the larger one of it and row_max",
        {"maximum": "tile"},
    ),
    (
        "axis",
        "new row_max",
        "the maximum is that of the whole tile: each row has its own",
        {"maximum": "whole tile"},
    ),
    (
        "missing_term",
        "new row_max",
        "row_max stays as it was: a larger score of the tile raises it",
        {"maximum": "old"},
    ),
    (
        "unstable",
        "new row_max",
        "no maximum is subtracted: exp overflows for large scores",
        {"maximum": "zero"},
    ),
    (
        "other",
        "new row_max",
        "this is the logarithm of the whole sum, which is computed after the last tile: "
        "return the maximum",
        {"returned": "log"},
    ),
    (
        "factor",
        "new mixed",
        "mixed is divided by total: that is done once, after the last tile",
        {"is_divided": True},
    ),
)

# Of both sums; "{output}" is the name of the one that is wrong.
SUM_MISTAKES: tuple[tuple[VerdictName, str, dict[str, Any]], ...] = (
    (
        "sign",
        "{output} is multiplied by exp(new_max - row_max): the exponent is "
        "row_max - new_max, never above 0",
        {"rescaling": "exp(new_max - row_max)"},
    ),
    (
        "other",
        "{output} is multiplied by row_max - new_max: it is multiplied by exp of it",
        {"rescaling": "row_max - new_max"},
    ),
    (
        "factor",
        "the old {output} is not rescaled: it is relative to the old maximum, so "
        "it is multiplied by exp(row_max - new_max)",
        {"rescaling": "none"},
    ),
    (
        "overwritten",
        "{output} is that of the tile alone: the old {output}, rescaled, belongs to it",
        {"keeps_sums": False},
    ),
    (
        "factor",
        "the part of the tile in {output} is rescaled, too: it is relative to the "
        "new maximum already",
        {"rescaling": "of both"},
    ),
    (
        "factor",
        "{output} is rescaled twice",
        {"rescaling": "twice"},
    ),
    (
        "other",
        "the exponentials of the tile in {output} are relative to the old "
        "maximum: scores - new_max",
        {"relative_to": "row_max"},
    ),
    (
        "other",
        "the exponentials of the tile in {output} are relative to the maximum of "
        "the tile: scores - new_max",
        {"relative_to": "tile"},
    ),
)

EXERCISE = Exercise(
    name="flash_step",
    title="flash attention, forward",
    task="Attention over the keys of one more tile. So far, a row has the largest score row_max, "
    "the sum total of exp(score - row_max), and mixed, the same sum with the values. Return the "
    "three for all keys including this tile; nothing is divided yet.",
    signature="flash_step(scores, v, row_max, total, mixed)",
    shapes="""scores   (R, C)  of R queries and the C keys of the tile; -inf hides a key
v        (C, Q)  the values of the tile
row_max  (R,)    the largest score of each row so far; -inf before the first tile
total    (R,)    sum of exp(score - row_max) over the keys so far; 0 at first
mixed    (R, Q)  sum of exp(score - row_max) times the value; 0 at first
returns  row_max, total, mixed, as new arrays""",
    reference=reference,
    sizes=Sizes.of(
        "R C Q",
        small="1 1 1, 1 2 1, 2 2 1",
        distinct="3 5 4, 4 3 2, 5 4 3",
        equal="3 3 3, 4 4 4, 5 5 5",
    ),
    draw=draw,
    hints=(
        "The new maximum of a row is the larger one of row_max and the largest score of the tile.",
        "The old sums are relative to the old maximum: exp(s - new) = exp(s - old) exp(old - new).",
        "So both old sums are multiplied by rescale = exp(row_max - new_max), which is at most 1.",
        "e = exp(scores - new_max[:, None]); total * rescale + e.sum(1); mixed * rescale[:, None] "
        "+ e @ v. With row_max = -inf the factor is 0, as it must be.",
    ),
    derivation="flash_attention",
    solution="course/learn/exercises/flash_step.py:flash_step",
    needs=("attention",),
    outputs=("new row_max", "new total", "new mixed"),
    mistakes=(
        *(
            Mistake(verdict, output, sentence, changes)
            for verdict, output, sentence, changes in MISTAKES
        ),
        *(
            Mistake(verdict, f"new {output}", sentence.format(output=output), changes)
            for output in ("total", "mixed")
            for verdict, sentence, changes in SUM_MISTAKES
        ),
    ),
)
