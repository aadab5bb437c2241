"""The causal mask of attention."""

from __future__ import annotations

import numpy as np

from glasslm.course.learn.exercise import Array, Case, CaseRandom, Exercise, Mistake, Sizes


def reference(
    scores: Array,
    *,
    diagonal: int = 0,
    fill: float = -np.inf,
    is_flipped: bool = False,
    is_inverted: bool = False,
    is_added: bool = False,
    window: int = 0,
    is_transposed: bool = False,
) -> Array:
    """Scores (H, T, T) of queries (rows) and keys (columns), -inf where the key comes later."""
    T = scores.shape[-1]
    is_seen = np.tri(T, k=diagonal, dtype=bool)
    if window:
        is_seen &= ~np.tri(T, k=-window, dtype=bool)
    is_seen = is_seen.T if is_flipped else is_seen
    is_seen = ~is_seen if is_inverted else is_seen
    scores = scores.swapaxes(-1, -2) if is_transposed else scores
    return scores + is_seen if is_added else np.where(is_seen, scores, fill)


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    H, T = sizes.values()
    return Case(dict(sizes), {"scores": random.array(H, T, T) * (1e4 if is_large else 1)})


EXERCISE = Exercise(
    name="causal_mask",
    title="causal mask",
    task="Hide the future: query t keeps its scores with the keys 0 to t. The others become minus "
    "infinity, so that their softmax is 0.",
    signature="causal_mask(scores)",
    shapes="""scores  (H, T, T)   heads, queries, keys
returns (H, T, T)   a new array; scores stays as it is""",
    reference=reference,
    sizes=Sizes.of("H T", small="1 1, 1 2, 1 3", distinct="2 5, 3 4", equal="3 3, 4 4"),
    draw=draw,
    hints=(
        "A query sees its own key, too: the diagonal stays.",
        "np.tri(T, dtype=bool) is True on and below the diagonal.",
        "np.where(np.tri(T, dtype=bool), scores, -np.inf)",
    ),
    derivation="attention",
    mistakes=(
        Mistake("mask", "y", "off by one: a query sees the next key", {"diagonal": 1}),
        Mistake("mask", "y", "off by one: a query does not see its own key", {"diagonal": -1}),
        Mistake("mask", "y", "upside down: queries see the future only", {"is_flipped": True}),
        Mistake("mask", "y", "inverted: the seen scores are hidden", {"is_inverted": True}),
        *(
            Mistake("mask", "y", f"a query sees {n} keys only: a window", {"window": n})
            for n in (1, 2, 3)
        ),
        Mistake("transposed", "y", "the scores are transposed", {"is_transposed": True}),
        Mistake("mask", "y", "hidden scores are 0, not minus infinity", {"fill": 0.0}),
        Mistake("sign", "y", "hidden scores are plus infinity", {"fill": np.inf}),
        Mistake("mask", "y", "hidden scores are NaN", {"fill": np.nan}),
        Mistake("mask", "y", "the mask of ones is added to the scores", {"is_added": True}),
        *(
            Mistake("mask", "y", "hidden scores are a large number, not -inf", {"fill": fill})
            for fill in (-1e9, -1e4, -1e30, -1e10)
        ),
    ),
)
