"""Weight tying: one table as embedding and as head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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


def tied_logits(tokens: Array, table: Array) -> tuple[Array, Callable[[Array], Array]]:
    """tokens (N,), table (V, D) -> logits (N, V), and backward(dlogits) -> dtable (V, D)."""
    x, embedding_back = ops.embedding(tokens, table)
    logits, head_back = ops.linear(x, table)

    def backward(dlogits: Array) -> Array:
        dx, from_head = head_back(dlogits)
        return embedding_back(dx) + from_head

    return logits, backward


def reference(
    dy: Array,
    tokens: Array,
    table: Array,
    *,
    write: str = "add",
    lookup_gradient: str = "dx",
    scale: float = 1.0,
    head: str = "transposed",
) -> Reference:
    """tokens (N,), table (V, D) -> logits (N, V), dtable (V, D)."""
    x, embedding_back = ops.embedding(tokens, table)
    if scale != 1.0:
        x = x * table.shape[1] ** scale
    logits, head_back = ops.linear(x, table if head == "transposed" else table.T)
    dx, from_head = head_back(dy)
    from_lookup = embedding_back({"dx": dx, "x": x}[lookup_gradient])
    if write != "add":
        order = slice(None, None, 1 if write.endswith("last") else -1)
        from_lookup = np.zeros_like(table)
        from_lookup[tokens[order]] = dx[order]
        if write.startswith("="):  # the rows of the head's gradient are lost, too
            used = np.isin(np.arange(len(table)), tokens)[:, None]
            from_head = np.where(used, 0, from_head)
    by_token = np.equal.outer(tokens, np.arange(len(table)))[:, :, None] * dx[:, None]
    return Reference(
        {"logits": {"x tableᵀ": logits}, "dtable": {"head": from_head, "lookup": from_lookup}},
        {},
        {"dtable": (by_token + dy[:, :, None] * x[:, None], 1)},
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, V, D = sizes.values()
    tokens = random.integers(0, max(1, V - 1), N)
    tokens[-1] = tokens[0]  # at least one token twice; the last row of the table is never read
    inputs = {"tokens": tokens, "table": random.array(V, D)}
    return Case(dict(sizes), inputs, {}, random.array(N, V))


EXERCISE = Exercise(
    name="tied_logits",
    title="weight tying",
    task="A table that is used twice: it gives the vectors of the tokens, x = table[tokens], and "
    "it is the matrix of the head, logits = x tableᵀ. The gradient of the table has both parts.",
    signature="tied_logits(tokens, table)",
    shapes="""tokens  (N,)    integers from 0 to V - 1; some occur more than once
table   (V, D)
logits  (N, V)
backward(dlogits) -> dtable (V, D)""",
    reference=reference,
    sizes=Sizes.of("N V D", small="1 2 1, 2 2 1, 2 3 2", distinct="7 5 4, 6 11 3", equal="4 4 4"),
    draw=draw,
    hints=(
        "The table is used twice, so its gradient is a sum of two: one from each use.",
        "The head is linear(x, table): its gradient is dlogitsᵀ x, and dx = dlogits table.",
        "The lookup is embedding(tokens, table): it adds each row of dx to the row of its token.",
        "dtable[tokens] += dx counts a token once that occurs twice. np.add.at adds all.",
    ),
    derivation="embedding",
    solution="course/learn/exercises/tied_logits.py:tied_logits",
    needs=("embedding", "linear"),
    outputs=("logits",),
    gradients=("dtable",),
    mistakes=(
        Mistake(
            "overwritten",
            "dtable",
            "a token that occurs twice keeps only its last dx in the lookup's part: its rows add",
            {"write": "+= last"},
        ),
        Mistake(
            "overwritten",
            "dtable",
            "a token that occurs twice keeps only its first dx in the lookup's part: its rows add",
            {"write": "+= first"},
        ),
        Mistake(
            "overwritten",
            "dtable",
            "the lookup's part replaces the head's: both uses of the table add",
            {"write": "= last"},
        ),
        Mistake(
            "other",
            "dtable",
            "the lookup's part adds x: it adds dx, the gradient dlogits table, by token",
            {"lookup_gradient": "x"},
        ),
        Mistake(
            "factor",
            "logits",
            "x is multiplied by sqrt(D), which this exercise does not do",
            {"scale": 0.5},
        ),
        Mistake(
            "transposed",
            "logits",
            "the table is not transposed in the head: logits = x tableᵀ",
            {"head": "not transposed"},
        ),
    ),
)
