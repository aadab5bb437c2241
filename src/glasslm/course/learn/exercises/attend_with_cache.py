"""One step of attention over a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glasslm import ops
from glasslm.course.learn.exercise import (
    Array,
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Sizes,
    VerdictName,
)


def attend_with_cache(
    q: Array, k: Array, v: Array, keys: Array, values: Array
) -> tuple[Array, Array, Array]:
    """One query (H, Q) over the cached keys and values (S, K, Q) and its own k and v (K, Q)."""
    keys = np.concatenate([keys, k[None]])
    values = np.concatenate([values, v[None]])
    every_key = np.ones((1, len(keys)), bool)  # all are in the past: no causal mask is needed
    y, _ = ops.attention(q[None], keys, values, mask=every_key)
    return y[0], keys, values


def reference(
    q: Array,
    k: Array,
    v: Array,
    keys: Array,
    values: Array,
    *,
    visible: str = "all",
    scale: str = "1/sqrt(Q)",
    heads: str = "repeated",
    values_of: str = "the key's head",
    softmax_over: str = "keys",
    output: str = "heads",
    read: str = "values",
    place: str = "end",
    value_place: str = "end",
    returned: str = "new",
) -> dict[str, Any]:
    """The output (H, Q), and the keys and values (S + 1, K, Q)."""
    (H, Q), (S, K, _) = q.shape, keys.shape
    old = {"new keys": keys, "new values": values}
    keys, values = insert(keys, k, place), insert(values, v, value_place)
    heads_of_q = {
        "repeated": np.arange(H) // (H // K),
        "tiled": np.arange(H) % K,
        "the first": np.zeros(H, int),
    }[heads]
    read_values = {"values": values, "keys": keys}[read]
    own = np.arange(H) // (H // K)
    mixed_keys = keys[:, heads_of_q]  # (S + 1, H, Q)
    mixed_values = read_values[:, own if values_of == "own head" else heads_of_q]
    factor = {
        "1/sqrt(Q)": Q**-0.5,
        "1": 1.0,
        "1/Q": 1 / Q,
        "sqrt(Q)": Q**0.5,
        "1/sqrt(H)": H**-0.5,
        "1/sqrt(HQ)": (H * Q) ** -0.5,
        "1/sqrt(S+1)": (S + 1) ** -0.5,
        "1/sqrt(S)": max(S, 1) ** -0.5,
    }[scale]
    scores = np.einsum("hq,shq->hs", q, mixed_keys) * factor
    n = len(keys)
    hidden = {
        "all": np.zeros(n, bool),
        "not its own": np.arange(n) >= max(S, 1),
        "the first": np.arange(n) > 0,
        "its own alone": np.arange(n) < S,
        "not the first": np.arange(n) < min(1, S),
    }[visible]
    scores[:, hidden] = -np.inf
    groups = scores.reshape(K, H // K, n)
    e, own_max = np.exp(scores - scores.max()), np.exp(scores - scores.max(-1, keepdims=True))
    ways: dict[str, Callable[[], Array]] = {
        "keys": lambda: own_max / own_max.sum(-1, keepdims=True),
        "heads": lambda: e / e.sum(0, keepdims=True),
        "heads of a group": lambda: softmax_of(groups, 1).reshape(H, n),
        "everything": lambda: e / e.sum(),
        "rows together": lambda: own_max / own_max.sum(),
        "nothing": lambda: scores,
        "exponentials": lambda: np.exp(scores),
    }
    y = np.einsum("hs,shq->hq", ways[softmax_over](), mixed_values)
    if output == "heads mixed":
        y = y.reshape(K, H // K, Q).swapaxes(0, 1).reshape(H, Q)
    results = {"y": y, "new keys": keys, "new values": values}
    return results | old if returned == "old cache" else results


def softmax_of(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def insert(cache: Array, new: Array, place: str) -> Array:
    """The cache (S, K, Q) with one more row, at the end unless it is put elsewhere."""
    ways: dict[str, Callable[[], Array]] = {
        "end": lambda: np.concatenate([cache, new[None]]),
        "front": lambda: np.concatenate([new[None], cache]),
        "over the last": lambda: np.concatenate([cache[:-1], new[None]]),
    }
    return ways[place]()


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    S, K, G, Q = sizes.values()
    size = 40 if is_large else 1
    inputs = {
        "q": random.array(K * G, Q) * size,
        "k": random.array(K, Q) * size,
        "v": random.array(K, Q),
        "keys": random.array(S, K, Q) * size,
        "values": random.array(S, K, Q),
    }
    return Case({**sizes, "H": K * G, "S + 1": S + 1}, inputs)


MISTAKES: tuple[tuple[VerdictName, str, str, dict[str, Any]], ...] = (
    (
        "mask",
        "y",
        "the query does not attend to its own key: append k and v first",
        {"visible": "not its own"},
    ),
    (
        "mask",
        "y",
        "the query attends to the first key only: a causal mask of one row would hide the "
        "others, and none is needed here",
        {"visible": "the first"},
    ),
    (
        "mask",
        "y",
        "the query attends to its own key only: it attends to the whole cache",
        {"visible": "its own alone"},
    ),
    (
        "mask",
        "y",
        "the first key of the cache is not attended to",
        {"visible": "not the first"},
    ),
    *(
        (
            "factor",
            "y",
            f"the scores are scaled by {scale}: it is 1/sqrt(Q), with the size of a head",
            {"scale": scale},
        )
        for scale in (
            "1",
            "1/Q",
            "sqrt(Q)",
            "1/sqrt(H)",
            "1/sqrt(HQ)",
            "1/sqrt(S+1)",
            "1/sqrt(S)",
        )
    ),
    (
        "axis",
        "y",
        "the query heads are in the wrong order: head h reads key head h // (H / K), so "
        "neighbours share one; it is not h % K",
        {"heads": "tiled"},
    ),
    (
        "axis",
        "y",
        "all query heads read the first key-value head: head h reads h // (H / K)",
        {"heads": "the first"},
    ),
    (
        "axis",
        "y",
        "the softmax runs over the heads: it runs over the keys",
        {"softmax_over": "heads"},
    ),
    (
        "axis",
        "y",
        "the softmax runs over the heads of a group: it runs over the keys",
        {"softmax_over": "heads of a group"},
    ),
    (
        "axis",
        "y",
        "the softmax runs over all heads and keys together: it runs over the keys",
        {"softmax_over": "everything"},
    ),
    (
        "axis",
        "y",
        "the softmax's sum runs over all heads and keys together: it runs over the keys",
        {"softmax_over": "rows together"},
    ),
    (
        "axis",
        "y",
        "all query heads read the first key head: head h reads h // (H / K)",
        {"heads": "the first", "values_of": "own head"},
    ),
    (
        "missing_term",
        "y",
        "the softmax is left out: the scores themselves weigh the values",
        {"softmax_over": "nothing"},
    ),
    (
        "missing_term",
        "y",
        "the exponentials are not divided by their sum",
        {"softmax_over": "exponentials"},
    ),
    (
        "transposed",
        "y",
        "the heads of y are in another order than those of q: (K, H / K, Q) was transposed "
        "before it was reshaped",
        {"output": "heads mixed"},
    ),
    (
        "other",
        "y",
        "the keys are mixed in place of the values",
        {"read": "keys"},
    ),
    (
        "other",
        "y",
        "the new value stands before the old ones, and the new key after: both come last",
        {"value_place": "front"},
    ),
    (
        "other",
        "new keys",
        "the new key stands before the old ones: append it at the end",
        {"place": "front", "value_place": "front"},
    ),
    (
        "other",
        "new values",
        "the new value stands before the old ones: append it at the end",
        {"place": "front", "value_place": "front"},
    ),
    *(
        (
            "missing_term",
            f"new {name}",
            "the cache is returned as it came: the new key and value belong to it, for the "
            "next step",
            {"returned": "old cache"},
        )
        for name in ("keys", "values")
    ),
    *(
        (
            "overwritten",
            f"new {name}",
            f"the last of the {name} is overwritten by the new one: append it",
            {"place": "over the last", "value_place": "over the last"},
        )
        for name in ("keys", "values")
    ),
    (
        "overwritten",
        "y",
        "the newest key and value of the cache are overwritten by the new ones: append them",
        {"place": "over the last", "value_place": "over the last", "visible": "all"},
    ),
)

EXERCISE = Exercise(
    name="attend_with_cache",
    title="KV cache",
    task="One step of generation: append the new key and value to the cache, and let the new query "
    "attend to all keys: y = softmax(q keysᵀ / sqrt(Q)) values. Query heads h = 0..H - 1 share "
    "K key-value heads: head h reads number h // (H / K).",
    signature="attend_with_cache(q, k, v, keys, values)",
    shapes="""q             (H, Q)  the query of the new token
k, v          (K, Q)  its key and value
keys, values  (S, K, Q)  those of the S tokens before
returns       y (H, Q), keys (S + 1, K, Q), values (S + 1, K, Q): the output and the new cache""",
    reference=reference,
    sizes=Sizes.of(
        "S K G Q",
        small="1 1 1 1, 1 1 1 2, 2 1 2 2",
        distinct="5 2 3 4, 4 3 2 5, 6 2 4 3, 0 3 2 4",
        equal="3 2 2 4, 2 3 1 3",
    ),
    draw=draw,
    hints=(
        "Append first: the new token attends to itself, too.",
        "All S + 1 keys are in the past of the query or its own. So there is no causal mask.",
        "np.repeat(keys, H // K, axis=1) gives each query head its key head: (S + 1, H, Q).",
        "Scores are (H, S + 1), scaled by 1 / sqrt(Q). The softmax runs over the S + 1 keys.",
    ),
    derivation="Cache of keys and values",
    solution="course/learn/exercises/attend_with_cache.py:attend_with_cache",
    needs=("attention",),
    outputs=("y", "new keys", "new values"),
    mistakes=tuple(
        Mistake(verdict, output, sentence, changes)
        for verdict, output, sentence, changes in MISTAKES
    ),
)
