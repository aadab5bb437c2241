"""One tile of the backward pass of flash attention."""

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
    Reference,
    Sizes,
    VerdictName,
)


def flash_backward(
    q: Array, k: Array, v: Array, dout: Array, log: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """What one tile adds to dq, dk and dv. arXiv:2205.14135, algorithm 4."""
    scale = 1 / math.sqrt(q.shape[1])
    p = np.exp(q @ k.T * scale - log[:, None])
    ds = p * (dout @ v.T - delta[:, None])
    return ds @ k * scale, ds.T @ q * scale, p.T @ dout


def reference(
    q: Array,
    k: Array,
    v: Array,
    dout: Array,
    log: Array,
    delta: Array,
    *,
    score_scale: str = "1/sqrt(Q)",
    is_normalized: bool = True,
    softmax_of: str = "row",
    delta_is: str = "delta",
    outer: str = "p",
    dv_of: str = "p",
) -> Reference:
    """The three results in named terms: q, dout (R, Q), k, v (C, Q), log and delta (R,)."""
    Q = q.shape[1]
    scale = 1 / math.sqrt(Q)
    factor = {"1/sqrt(Q)": scale, "1": 1.0, "1/Q": 1 / Q, "sqrt(Q)": math.sqrt(Q)}[score_scale]
    scores = q @ k.T * factor
    p = np.exp(scores - log[:, None]) if is_normalized else np.exp(scores)
    if softmax_of == "tile":
        p = p / p.sum(1, keepdims=True)
    dp = dout @ v.T
    around = {"p": p, "1": np.ones_like(p), "p²": p * p}[outer]
    minus = {
        "delta": -delta[:, None] * around,
        "sum over the tile": -(p * dp).sum(1, keepdims=True) * around,
        "outside": -np.broadcast_to(delta[:, None], p.shape),
        "delta times sum of p": -(delta * p.sum(1))[:, None] * around,
    }[delta_is]
    parts = {"p dp": around * dp, "-p delta": minus}
    of_values = {"p": p, "ds": sum(parts.values()), "dp": dp}[dv_of]
    return Reference(
        {
            "dq": {name: part @ k * scale for name, part in parts.items()},
            "dk": {name: part.T @ q * scale for name, part in parts.items()},
            "dv": {"pᵀ dout": of_values.T @ dout},
        }
    )


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    R, C, Q = sizes.values()
    size = 12 if is_large else 1
    q, k, v = random.array(R, Q) * size, random.array(C, Q) * size, random.array(C, Q)
    scores = q @ k.T / math.sqrt(Q)
    # The row has other keys, too, so that the tile's probabilities have a sum below 1.
    top = scores.max(1)
    log = top + np.log(np.exp(scores - top[:, None]).sum(1)) + abs(random.array(R)) / 2
    inputs = {"q": q, "k": k, "v": v, "dout": random.array(R, Q), "log": log}
    return Case(dict(sizes), inputs | {"delta": random.array(R)})


MISTAKES: tuple[tuple[VerdictName, str, dict[str, Any]], ...] = (
    *(
        (
            "factor",
            f"the scores are scaled by {scale}: it is 1/sqrt(Q)",
            {"score_scale": scale},
        )
        for scale in ("1", "1/Q", "sqrt(Q)")
    ),
    (
        "factor",
        "log is not subtracted: exp(score - log) is the probability, exp(score) alone is "
        "not divided by the sum of the row",
        {"is_normalized": False},
    ),
    (
        "other",
        "the probabilities are divided by their sum in the tile: the row has other tiles, "
        "and exp(score - log) is divided by the whole sum already",
        {"softmax_of": "tile"},
    ),
    (
        "other",
        "the sum in ds runs over the tile: it is delta, the sum over the whole row",
        {"delta_is": "sum over the tile"},
    ),
    (
        "other",
        "delta is not multiplied by p: ds = p (dp - delta)",
        {"delta_is": "outside"},
    ),
    (
        "other",
        "delta is multiplied by the tile's sum of p: ds = p (dp - delta)",
        {"delta_is": "delta times sum of p"},
    ),
    ("factor", "ds is not multiplied by p: ds = p (dp - delta)", {"outer": "1"}),
    ("factor", "ds is multiplied by p twice: ds = p (dp - delta)", {"outer": "p²"}),
    ("other", "dv is computed from ds: it is pᵀ dout", {"dv_of": "ds"}),
    ("other", "dv is computed from dp: it is pᵀ dout", {"dv_of": "dp"}),
)

EXERCISE = Exercise(
    name="flash_backward",
    title="flash attention, backward",
    task="What one tile of queries and keys adds to the gradients. The probabilities p were "
    "not kept: compute them again from the scores and log, the logarithm of the whole row's sum of "
    "exponentials. delta = dout · out is one number per row, too.",
    signature="flash_backward(q, k, v, dout, log, delta)",
    shapes="""q      (R, Q)  R queries, not scaled
k, v   (C, Q)  the keys and values of the tile
dout   (R, Q)  the gradient of the output of these queries
log    (R,)    log of the sum of exp(score) over all keys of the row, with score = q · k / sqrt(Q)
delta  (R,)    dout · out, with the output of the whole row
returns  dq (R, Q), dk (C, Q), dv (C, Q): what this tile adds to each""",
    reference=reference,
    sizes=Sizes.of(
        "R C Q",
        small="1 1 1, 1 2 1, 2 1 2, 2 2 1",
        distinct="3 5 4, 5 4 3",
        equal="4 4 4, 5 5 5",
    ),
    draw=draw,
    hints=(
        "exp(score - log) is a probability of the whole row, already divided by its sum.",
        "dv = pᵀ dout, and dp = dout vᵀ: the transposes of the product p v.",
        "The softmax of a row has ds = p (dp - sum(p dp)), and that sum over the whole row is "
        "delta.",
        "score = q · k / sqrt(Q), so the factor 1 / sqrt(Q) is in dq = ds k and in dk = dsᵀ q.",
    ),
    derivation="flash_attention",
    solution="course/learn/exercises/flash_backward.py:flash_backward",
    needs=("attention", "flash_step"),
    outputs=("dq", "dk", "dv"),
    mistakes=tuple(
        Mistake(verdict, output, sentence, changes)
        for output in ("dq", "dk", "dv")
        for verdict, sentence, changes in MISTAKES
        if output == "dv" or "dv" not in sentence
    ),
)
