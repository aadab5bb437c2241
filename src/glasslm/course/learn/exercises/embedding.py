"""Embedding: rows of a table, looked up by token."""

from __future__ import annotations

from typing import Literal

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
    dy: Array,
    tokens: Array,
    table: Array,
    *,
    write: Literal["add", "last", "first"] = "add",
    shift: int = 0,
    takes_columns: bool = False,
) -> Reference:
    """tokens (N,), table (V, D) -> y (N, D), dtable (V, D)."""
    dtable = np.zeros_like(table)
    if write == "add":
        np.add.at(dtable, tokens, dy)
    else:
        order = slice(None, None, 1 if write == "last" else -1)
        for token, row in zip(tokens[order], dy[order]):
            dtable[token] = row
    is_token = tokens[:, None] == np.arange(len(table))
    y = table[:, tokens] if takes_columns else table[tokens - shift]
    return Reference(
        {"y": {"table[tokens]": y}, "dtable": {"sum of dy": dtable}},
        {"dy": dy},
        {"dtable": (is_token[:, :, None] * dy[:, None], 1)},
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, V, D = sizes.values()
    tokens = random.integers(0, max(1, V - 1), N)  # the last row of the table is never used
    tokens[-1] = tokens[0]  # one token occurs twice
    return Case(
        dict(sizes), {"tokens": tokens, "table": random.array(V, D)}, {}, random.array(N, D)
    )


EXERCISE = Exercise(
    name="embedding",
    title="embedding",
    task="Look up a row of the table for each token. The gradient of the table adds up, for each "
    "row, the gradients of all tokens that used it.",
    signature="embedding(tokens, table)",
    shapes="""tokens  (N,)     integers from 0 to V - 1; the same one may occur again
table   (V, D)
y       (N, D)
backward(dy) -> dtable (V, D); rows that no token used are 0""",
    reference=reference,
    sizes=Sizes.of(
        "N V D", small="1 2 1, 2 2 1, 3 2 2", distinct="7 5 4, 6 11 3", equal="5 5 5, 4 4 4"
    ),
    draw=draw,
    hints=(
        "Forward is one line of indexing: table[tokens].",
        "A row that two tokens use gets the sum of both gradients.",
        "dtable[tokens] += dy keeps only one of several equal tokens: NumPy does not add them up.",
        "np.add.at(dtable, tokens, dy) adds them all.",
    ),
    derivation="embedding",
    solution="engines/numpy/ops.py:embedding",
    gradients=("dtable",),
    mistakes=(
        Mistake(
            "overwritten",
            "dtable",
            "a token that occurs twice keeps only its last dy: they must add",
            {"write": "last"},
        ),
        Mistake(
            "overwritten",
            "dtable",
            "a token that occurs twice keeps only its first dy",
            {"write": "first"},
        ),
        Mistake("other", "y", "the rows are off by one", {"shift": 1}),
        Mistake("axis", "y", "the tokens pick columns, not rows", {"takes_columns": True}),
    ),
)
