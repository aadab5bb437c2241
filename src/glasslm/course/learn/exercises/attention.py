"""Causal attention with key heads that several query heads share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

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

SCALES: dict[str, Callable[[int, int, int], float]] = {
    "1/sqrt(Q)": lambda Q, H, T: Q**-0.5,
    "1": lambda Q, H, T: 1.0,
    "1/Q": lambda Q, H, T: 1 / Q,
    "sqrt(Q)": lambda Q, H, T: Q**0.5,
    "Q": lambda Q, H, T: float(Q),
    "1/sqrt(H Q)": lambda Q, H, T: (H * Q) ** -0.5,
    "1/sqrt(T)": lambda Q, H, T: T**-0.5,
    "1/sqrt(H)": lambda Q, H, T: H**-0.5,
}


class Weights(NamedTuple):
    """The weights of attention, (B, H, T, T), and what they were made of."""

    p: Array
    scores: Array
    exponentials: Array
    is_seen: Array


def reference(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: str = "causal",
    scale: str = "1/sqrt(Q)",
    axis: int = -1,
    max_axis: int = -1,
    groups: str = "repeat",
    has_scores_transposed: bool = False,
    sum_axis: int | tuple[()] = -1,
    is_reshaped: bool = False,
    has_dk_transposed: bool = False,
    has_dv_transposed: bool = False,
    outer: str = "p",
    inner: str = "p",
    keeps_last_key: bool = False,
    sums: str = "repeat",
) -> Reference:
    """q (B, T, H, Q), k and v (B, T, K, Q) -> y, dq, dk, dv. arXiv:1706.03762, equation 1."""
    (B, T, H, Q), K = q.shape, k.shape[2]
    factor = SCALES[scale](Q, H, T)
    heads = np.arange(H) // (H // K) if groups == "repeat" else np.arange(H) % K
    keys, values = k[:, :, heads], v[:, :, heads]
    if is_reshaped:  # (B, T, H, Q) read as (B, H, T, Q)
        q, keys, values = (a.reshape(B, H, T, Q).swapaxes(1, 2) for a in (q, keys, values))
    weights = attention_weights(q, keys, factor, mask, (axis, max_axis), has_scores_transposed)
    p, last = weights.p, np.eye(T) if keeps_last_key else 1
    y = np.einsum("bhts,bshq->bthq", p * last, values)
    if is_reshaped:
        y = y.swapaxes(1, 2).reshape(B, T, H, Q)
    p = np.nan_to_num(p)
    dscores = score_gradients(dy, values, weights, p, outer, inner, sum_axis)
    gradient_groups = "tile" if "tile" in (groups, sums) else "repeat"
    shape = (B, T, K, H // K, Q) if gradient_groups == "repeat" else (B, T, H // K, K, Q)

    def to_keys(left: Array, right: Array, is_transposed: bool) -> Array:
        """Before the sums over a group's heads and over the queries: (G, T, B, S, K, Q)."""
        letters = "bhst,bthq->tbshq" if is_transposed else "bhts,bthq->tbshq"
        parts = np.einsum(letters, left, right).reshape(T, *shape)
        return np.moveaxis(parts, 4 if gradient_groups == "repeat" else 3, 0)

    dk = {key: to_keys(ds, q, has_dk_transposed) * factor for key, ds in dscores.items()}
    dv = to_keys(p, dy, has_dv_transposed)
    dq = {
        key: np.einsum("bhts,bshq->bthq", ds * last, keys) * factor for key, ds in dscores.items()
    }
    inverse = 1 / weights.exponentials.sum(-1).transpose(0, 2, 1)[..., None] + 0 * dy
    return Reference(
        {
            "y": {"p v": y},
            "dq": dq,
            "dk": {key: parts.sum((0, 1)) for key, parts in dk.items()},
            "dv": {"pᵀ dy": dv.sum((0, 1))},
        },
        {"1 / sum of exponentials": inverse},
        {"dk": (sum(dk.values(), start=np.zeros(1)), 2), "dv": (dv, 2)},
    )


def attention_weights(
    q: Array,
    keys: Array,
    factor: float,
    mask: str,
    axes: tuple[int, int],
    is_transposed: bool,
) -> Weights:
    """The softmax of the scaled scores over the keys that each query sees."""
    axis, max_axis = axes
    T = q.shape[1]
    scores = np.einsum("bthq,bshq->bhts", q, keys) * factor
    scores = scores.swapaxes(-1, -2) if is_transposed else scores
    seen = {"ahead": np.tri(T, k=1), "behind": np.tri(T, k=-1), "flipped": np.tri(T).T}
    is_seen = seen.get(mask, np.tri(T)) > 0
    masked = {
        "none": scores,
        "after": scores,
        "zero": np.where(is_seen, scores, 0),
        "added": scores + is_seen,
    }.get(mask, np.where(is_seen, scores, -np.inf))
    exponentials = np.exp(masked - masked.max(max_axis, keepdims=True))
    p = exponentials / exponentials.sum(axis, keepdims=True)
    return Weights(p * is_seen if mask == "after" else p, scores, exponentials, is_seen)


def score_gradients(
    dy: Array,
    values: Array,
    weights: Weights,
    p: Array,
    outer: str,
    inner: str,
    sum_axis: int | tuple[()],
) -> dict[str, Array]:
    """The gradient of the scores as two terms (B, H, T, T), before the scale."""
    dp = np.einsum("bthq,bshq->bhts", dy, values) * (p if inner == "p twice" else 1)
    if outer.startswith("softmax skipped"):
        ds = dp * weights.is_seen if outer.endswith("masked") else dp
        return {"p dp": ds, "-p sum(p dp)": 0 * ds}
    unmasked = np.exp(weights.scores - weights.scores.max(-1, keepdims=True))
    around = {
        "p": p,
        "1": np.ones_like(p),
        "unmasked": unmasked / unmasked.sum(-1, keepdims=True),
    }[outer]
    inside = (p if inner.startswith("p") else weights.is_seen) * dp
    return {"p dp": around * dp, "-p sum(p dp)": -around * inside.sum(sum_axis, keepdims=True)}


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    B, T, K, G, Q = sizes.values()
    inputs = {
        "q": random.array(B, T, K * G, Q) * (40 if is_large else 1),
        "k": random.array(B, T, K, Q) * (20 if is_large else 1),
        "v": random.array(B, T, K, Q),
    }
    return Case({**sizes, "H": K * G}, inputs, {}, random.array(B, T, K * G, Q))


def list_mistakes() -> Iterator[Mistake]:
    """The mistakes of attention, forward and backward."""
    masks = {
        "none": "no mask: every query sees the future",
        "ahead": "the mask is off by one: a query sees the next key",
        "behind": "the mask is off by one: a query does not see its own key",
        "flipped": "the mask is upside down",
        "after": "the mask comes after the softmax: the rows no longer sum to 1",
        "zero": "masked scores are 0, not minus infinity",
        "added": "the mask of ones is added to the scores",
    }
    for output in ("y", "gradients"):
        for mask, sentence in masks.items():
            yield Mistake("mask", output, sentence, {"mask": mask})
        for scale in list(SCALES)[1:]:
            sentence = f"the scores are scaled by {scale}, not 1/sqrt(Q)"
            yield Mistake("factor", output, sentence, {"scale": scale})
    over_queries = {"axis": -2, "max_axis": -2}
    yield Mistake("axis", "y", "the softmax runs over the queries, not the keys", over_queries)
    yield Mistake("axis", "y", "the softmax's sum runs over the queries", {"axis": -2})
    yield Mistake("axis", "y", "query head h uses key head h % K, not h // G", {"groups": "tile"})
    yield Mistake("transposed", "y", "the scores are transposed", {"has_scores_transposed": True})
    yield Mistake(
        "transposed", "y", "heads are split by reshape without a transpose", {"is_reshaped": True}
    )
    yield Mistake(
        "axis", "gradients", "query head h uses key head h % K, not h // G", {"groups": "tile"}
    )
    yield Mistake(
        "axis", "gradients", "the sum in the softmax's gradient runs over the queries",
        {"sum_axis": -2},
    )  # fmt: skip
    yield Mistake(
        "missing_term", "gradients", "only the diagonal of the softmax's Jacobian",
        {"sum_axis": ()},
    )  # fmt: skip
    for output in ("y", "dq"):
        sentence = f"{output} keeps only the last key's part: = in place of +="
        yield Mistake("overwritten", output, sentence, {"keeps_last_key": True})
    sentence = "the softmax is left out: its gradient is p (dp - sum(p dp))"
    for outer in ("softmax skipped", "softmax skipped, masked"):
        yield Mistake("missing_term", "gradients", sentence, {"outer": outer})
    yield Mistake("factor", "gradients", "dp is multiplied by the weights", {"inner": "p twice"})
    sentence = "the groups' heads are summed in another order: h % K, not h // G"
    yield Mistake("axis", "gradients", sentence, {"sums": "tile"})
    yield Mistake("factor", "gradients", "the weights are left out inside the sum", {"inner": "1"})
    yield Mistake("factor", "gradients", "ds is not multiplied by the weights", {"outer": "1"})
    yield Mistake(
        "mask", "gradients", "ds is multiplied by unmasked weights", {"outer": "unmasked"}
    )
    yield Mistake("transposed", "dk", "ds is not transposed in dk", {"has_dk_transposed": True})
    yield Mistake("transposed", "dv", "p is not transposed in dv", {"has_dv_transposed": True})


EXERCISE = Exercise(
    name="attention",
    title="causal attention",
    task="Each query takes the mean of the values of the keys up to its position, with the weights "
    "p = softmax(q k / sqrt(Q)). H query heads share K key heads: head h uses key head "
    "h // (H / K).",
    signature="attention(q, k, v)",
    shapes="""q  (B, T, H, Q)   batch, positions, query heads, size of a head
k  (B, T, K, Q)   K key heads; H is a multiple of K
v  (B, T, K, Q)
y  (B, T, H, Q)
backward(dy) -> (dq, dk, dv), each with the shape of its input""",
    reference=reference,
    sizes=Sizes.of(
        "B T K G Q",
        small="1 1 1 1 1, 1 2 1 1 1, 1 2 1 1 2, 1 2 1 2 2, 2 2 2 2 2",
        distinct="2 5 2 3 4, 2 3 3 2 5",
        equal="2 4 2 2 4, 1 4 1 4 2",
    ),
    draw=draw,
    hints=(
        "Forward: s = q kᵀ / sqrt(Q), the mask, p = softmax(s) over the keys, y = p v. np.einsum "
        "names the axes.",
        "Backward in the opposite order: dv = pᵀ dy and dp = dy vᵀ; then through the softmax.",
        "ds = p (dp - sum(p dp)), the sum over the keys. Masked entries have p = 0, so ds = 0.",
        "dq = ds k / sqrt(Q) and dk = dsᵀ q / sqrt(Q).",
        "A key head is used by H / K query heads: dk and dv sum over them.",
    ),
    derivation="attention",
    solution="engines/numpy/attention.py:attention",
    needs=("softmax", "causal_mask", "linear"),
    gradients=("dq", "dk", "dv"),
    mistakes=tuple(list_mistakes()),
    token_inputs=("q", "k", "v"),
    mixes_tokens=True,
)
