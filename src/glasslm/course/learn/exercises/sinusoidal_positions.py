"""Sinusoidal positions."""

from __future__ import annotations

import math
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
from glasslm.engines.positions import sinusoids


def reference(
    T: int,
    D: int,
    *,
    layout: str = "interleaved",
    exponent: str = "2j/D",
    base: float = 10_000.0,
    first: int = 0,
    turn: float = 1.0,
) -> Array:
    """(T, D): sines in the even columns, cosines in the odd ones. arXiv:1706.03762, 3.5."""
    if (layout, exponent, base, first, turn) == ("interleaved", "2j/D", 10_000.0, 0, 1.0):
        return sinusoids(T, D, math.sqrt(0.5), np.float64)
    j = np.arange(D // 2)
    powers = {
        "2j/D": 2 * j / D,
        "j/D": j / D,
        "4j/D": 4 * j / D,
        "2j": 2 * j,
        "-2j/D": -2 * j / D,
        "2j/(D-1)": 2 * j / (D - 1),
        "j/(D/2-1)": j / max(D // 2 - 1, 1),
        "(D-2-2j)/D": 2 * j[::-1] / D,
        "column/D": 2 * j / D,
    }[exponent]
    positions = turn * np.arange(first, T + first)[:, None]
    own = 1 / D if exponent == "column/D" else 0.0  # an odd column has a power of its own
    sines, cosines = np.sin(positions / base**powers), np.cos(positions / base ** (powers + own))
    nothing = np.zeros_like(sines)
    pairs = {
        "interleaved": (sines, cosines),
        "halves": (sines, cosines),
        "cosines first": (cosines, sines),
        "cosines first, halves": (cosines, sines),
        "only sines": (sines, sines),
        "only cosines": (cosines, cosines),
        "no cosines": (sines, nothing),
        "no sines": (nothing, cosines),
        "minus cosines": (sines, -cosines),
        "minus sines": (-sines, cosines),
    }[layout]
    if layout.endswith("halves"):
        return np.concatenate(pairs, -1)
    return np.stack(pairs, -1).reshape(T, D)


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    return Case(dict(sizes), dict(sizes))


def _table(verdict: VerdictName, sentence: str, **changes: Any) -> Mistake:
    return Mistake(verdict, "table", sentence, changes)


EXERCISE = Exercise(
    name="sinusoidal_positions",
    title="sinusoids",
    task="The table of positions of the first transformer: with the angle t / 10000^(2j / D) of "
    "position t and pair j, column 2j is the sine and column 2j + 1 the cosine.",
    signature="sinusoidal_positions(T, D)",
    shapes="""T      number of positions, from 0
D      width, an even number
table  (T, D), which is added to the embeddings""",
    reference=reference,
    sizes=Sizes.of("T D", small="1 2, 2 2, 2 4", distinct="5 6, 7 4, 3 8", equal="4 4, 6 6"),
    draw=draw,
    hints=(
        "One angle serves two columns: the sine and the cosine of a pair have the same angle.",
        "Compute the angles first, a table (T, D / 2): position by row, pair by column.",
        "The frequencies are 10000 ** (-np.arange(0, D, 2) / D): from 1 down to nearly 1/10000.",
        "table[:, 0::2] are the even columns, table[:, 1::2] the odd ones.",
    ),
    derivation="sinusoids",
    solution="engines/positions.py:sinusoids",
    needs=("embedding",),
    outputs=("table",),
    mistakes=(
        _table(
            "axis",
            "the sines fill the left half and the cosines the right: they alternate, column by "
            "column",
            layout="halves",
        ),
        _table(
            "other", "sine and cosine are exchanged: column 0 is a sine", layout="cosines first"
        ),
        _table(
            "axis",
            "the cosines fill the left half and the sines the right: they alternate, a sine first",
            layout="cosines first, halves",
        ),
        _table(
            "missing_term", "the odd columns are sines, too: they are cosines", layout="only sines"
        ),
        _table(
            "missing_term",
            "the even columns are cosines, too: they are sines",
            layout="only cosines",
        ),
        _table("missing_term", "the cosines are left out", layout="no cosines"),
        _table("missing_term", "the sines are left out", layout="no sines"),
        _table("sign", "the sign of the cosines", layout="minus cosines"),
        _table("sign", "the sign of the sines", layout="minus sines"),
        _table(
            "factor",
            "the exponent is j / D: it is 2j / D, where j counts the pairs",
            exponent="j/D",
        ),
        _table(
            "factor",
            "the exponent is 4j / D: it is 2j / D, where j counts the pairs and 2j the columns",
            exponent="4j/D",
        ),
        _table("factor", "the exponent 2j is not divided by D", exponent="2j"),
        _table(
            "other",
            "the position is multiplied by 10000^(2j / D): it is divided by it",
            exponent="-2j/D",
        ),
        _table("other", "the exponent is 2j / (D - 1): it is 2j / D", exponent="2j/(D-1)"),
        _table(
            "other",
            "the exponent is j / (D/2 - 1), as in some libraries: it is 2j / D",
            exponent="j/(D/2-1)",
        ),
        _table("other", "the frequencies are in the reverse order", exponent="(D-2-2j)/D"),
        _table(
            "other",
            "each column has an angle of its own: the sine and cosine of a pair share one, with "
            "the exponent 2j / D",
            exponent="column/D",
        ),
        *(
            _table("other", f"the base is {base:,.0f}: it is 10,000", base=base)
            for base in (100.0, 1000.0, 100_000.0)
        ),
        _table("other", "the positions start at 1: the first is 0", first=1),
        *(
            _table("factor", f"the angles have a factor of {text} too much", turn=turn)
            for turn, text in (
                (2 * math.pi, "2 pi"),
                (math.pi, "pi"),
                (math.pi / 180, "pi / 180"),
                (0.5, "1/2"),
                (2.0, "2"),
            )
        ),
    ),
    keeps_dtype=False,
)
