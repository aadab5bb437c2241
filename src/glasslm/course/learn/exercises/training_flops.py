"""The FLOPs of training, for one token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from glasslm.course.learn.exercise import Case, CaseRandom, Exercise, Mistake, Sizes, VerdictName
from glasslm.course.learn.exercises.count_parameters import (
    IN_LAYERS,
    NO_CHANGE,
    count_by_part,
)


def training_flops(V: int, L: int, D: int, H: int, K: int, F: int, T: int) -> float:
    """FLOPs of one token, forward and backward, in a context of T. arXiv:2204.02311, appendix B."""
    weights = L * (2 * D * D + 2 * D * (D // H * K) + 3 * D * F) + V * D  # the head, tied or not
    scores = 2 * L * D * T  # products of attention: scores, and their mix of values
    return 6 * (weights + scores)


def reference(
    V: int,
    L: int,
    D: int,
    H: int,
    K: int,
    F: int,
    T: int,
    *,
    times: Mapping[str, float] = NO_CHANGE,
    added: Callable[..., float] = lambda V, L, D, H, K, F, T: 0,
    formula: Callable[..., float] | None = None,
) -> float:
    """The FLOPs. `times` are wrong factors of parts of the model, `added` is a wrong part more."""
    sizes = (V, L, D, H, K, F, T)
    if formula:
        return formula(*sizes)
    counts = count_by_part(V, L, D, H, K, F, tied=False)
    counts["embedding"] = counts["last norm"] = counts["norms of the layers"] = 0  # no products
    flops = {part: 6 * n for part, n in counts.items()} | {"scores": 12 * L * D * T}
    everything = times.get("all", 1)
    return everything * sum(times.get(part, 1) * n for part, n in flops.items()) + added(*sizes)


def _times(sizes: tuple[Any, ...], times: Mapping[str, float]) -> float:
    return reference(*sizes, times=times)


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    return Case(dict(sizes), dict(sizes))


def _wrong(verdict: VerdictName, sentence: str, **changes: Any) -> Mistake:
    return Mistake(verdict, "flops", sentence, changes)


EXERCISE = Exercise(
    name="training_flops",
    title="FLOP count",
    task="Count the FLOPs of training per token: 6 for each weight that multiplies the token (2 in "
    "the forward pass, 4 in the backward pass), plus the scores of attention and their product "
    "with the values, 12 H Q T in each layer with Q = D / H, masked keys included. The model is "
    "that of count_parameters.",
    signature="training_flops(V, L, D, H, K, F, T)",
    shapes="""V, L, D, H, K, F  as in count_parameters
T                 length of the context
returns           FLOPs per token, a number""",
    reference=reference,
    sizes=Sizes.of(
        "V L D H K F T",
        small="3 1 2 1 1 1 2, 3 1 4 2 1 3 2",
        distinct="11 2 12 3 1 7 5, 13 3 16 4 2 9 10, 17 5 24 6 3 10 7, 29 4 20 5 1 18 15, "
        "7 6 8 2 1 21 32, 31 7 36 6 2 25 14",
        equal="8 2 8 2 2 8 8, 12 3 12 3 3 12 12, 11 2 12 3 1 7 5, 13 3 16 4 2 9 10",
    ),
    draw=draw,
    hints=(
        "A matrix with n weights costs 2 n FLOPs for a token: a product and an addition each.",
        "The backward pass costs twice as much: one product for dx and one for dw.",
        "The embedding looks up a row and multiplies nothing. The head does multiply, V D weights, "
        "tied or not. Norms are not counted.",
        "Scores and their product with the values: 2 Q T each for a head, forward, so 4 H Q T in a "
        "layer, and 3 times that with the backward pass.",
    ),
    derivation="Parameters and FLOPs",
    solution="course/learn/exercises/training_flops.py:training_flops",
    needs=("count_parameters",),
    outputs=("flops",),
    mistakes=(
        _wrong(
            "factor",
            "this is the forward pass alone: with the backward pass it is three times as much",
            times={"all": 1 / 3},
        ),
        _wrong(
            "factor",
            "this is the backward pass alone: the forward pass adds half of it",
            times={"all": 2 / 3},
        ),
        _wrong(
            "factor",
            "a product and an addition count as one: they are two FLOPs",
            times={"all": 1 / 2},
        ),
        _wrong(
            "factor",
            "these are 8 FLOPs a weight, as with recomputed activations: it is 6",
            times={"all": 8 / 6},
        ),
        _wrong(
            "missing_term",
            "the scores of attention are left out, 12 H Q T in each layer",
            times={"scores": 0},
        ),
        _wrong(
            "missing_term",
            "the head is left out: it multiplies, tied or not, V D weights",
            times={"head": 0},
        ),
        _wrong(
            "factor",
            "the embedding is counted, too: it looks up a row and multiplies nothing",
            times={"head": 2},
        ),
        _wrong(
            "factor",
            "the scores are counted for half of the keys: masked ones are included here",
            times={"scores": 1 / 2},
        ),
        _wrong(
            "factor",
            "one of the two products of attention is counted twice as often as it should: it is "
            "12 H Q T in each layer",
            times={"scores": 2},
        ),
        _wrong(
            "factor",
            "the scores are counted for the forward pass alone: their backward pass costs twice as "
            "much",
            times={"scores": 1 / 3},
        ),
        _wrong(
            "factor",
            "the scores have a factor of T too much: for one token they are linear in T",
            formula=lambda *s: _times(s, {"scores": s[6]}),
        ),
        _wrong(
            "factor",
            "the scores have no factor T: a token attends to T keys",
            formula=lambda *s: _times(s, {"scores": 1 / s[6]}),
        ),
        _wrong(
            "factor",
            "the scores are those of one layer: there are L",
            formula=lambda *s: _times(s, {"scores": 1 / s[1]}),
        ),
        _wrong(
            "factor",
            "the scores are those of one head: there are H query heads",
            formula=lambda *s: _times(s, {"scores": 1 / s[3]}),
        ),
        _wrong(
            "factor",
            "the scores are counted with K heads: every one of the H query heads has its own",
            formula=lambda *s: _times(s, {"scores": s[4] / s[3]}),
        ),
        _wrong(
            "other",
            "keys and values are counted with all H heads: they have K heads",
            added=lambda V, L, D, H, K, F, T: 12 * L * D * (D - D // H * K),
        ),
        _wrong(
            "factor",
            "the feed-forward has two matrices: SwiGLU has three",
            times={"feed-forwards": 2 / 3},
        ),
        _wrong(
            "missing_term",
            "the feed-forwards are left out",
            times={"feed-forwards": 0},
        ),
        _wrong(
            "other",
            "the norms are counted as products: their gains multiply entry by entry and are left "
            "out",
            added=lambda V, L, D, H, K, F, T: 6 * 2 * L * D,
        ),
        _wrong(
            "other",
            "the norms are counted as products: their gains multiply entry by entry and are left "
            "out",
            added=lambda V, L, D, H, K, F, T: 6 * (2 * L + 1) * D,
        ),
        _wrong(
            "factor",
            "the output projection of attention is left out",
            times={"output projections": 0},
        ),
        _wrong(
            "factor",
            "the queries or the output projection are counted once only: both are D x D",
            times={"queries": 0},
        ),
        _wrong(
            "factor",
            "keys and values are counted once: each has a matrix of its own",
            times={"values": 0},
        ),
        _wrong(
            "factor",
            "this is for a whole context of T tokens: divide by T",
            formula=lambda *s: s[6] * _times(s, {}),
        ),
        _wrong(
            "factor",
            "one layer is counted: there are L",
            formula=lambda *s: _times(
                s,
                dict.fromkeys((*IN_LAYERS, "scores"), 1 / s[1]),
            ),
        ),
        _wrong(
            "other",
            "the matrices are counted as 12 D² a layer, those of a model with F = 4 D and H = K: "
            "count this one",
            formula=lambda V, L, D, H, K, F, T: 6 * (12 * L * D * D + V * D) + 12 * L * D * T,
        ),
        _wrong(
            "other",
            "the matrices are counted as 12 D² a layer and the scores are left out: count this "
            "model",
            formula=lambda V, L, D, H, K, F, T: 6 * (12 * L * D * D + V * D),
        ),
    ),
    keeps_dtype=False,
)
