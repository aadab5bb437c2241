"""Sampling of one token: temperature, top-k, top-p, and the draw."""

from __future__ import annotations

from collections.abc import Callable
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
from glasslm.inference.sampling import Sampling, probabilities

# logits, temperature, top_k, top_p -> the probabilities; probabilities, uniform -> the token
Distribution = Callable[[Array, float, int, float], Array]
Draw = Callable[[Array, float], Any]

# temperature, top_k, top_p of the cases in turn; the fourth has equal logits at the limit of top-k,
# and in the last two token 0 is not kept and the uniform number is 0.
SETTINGS = (
    (0.7, 0, 1.0),
    (1.6, 3, 1.0),
    (0.8, 0, 0.85),
    (1.3, 4, 1.0),
    (1.4, 4, 0.8),
    (0.6, 5, 0.9),
    (1.4, 3, 0.85),
    (1.2, 0, 0.5),
)


def sample(
    logits: Array, uniform: float, temperature: float, top_k: int, top_p: float
) -> tuple[Array, int]:
    """The distribution p (V,) of the next token, and the token that `uniform` draws from it."""
    z = (logits - logits.max()) / temperature
    order = np.argsort(-z, kind="stable")  # the likeliest first; of equal ones the lower index
    if 0 < top_k < len(z):
        z[order[top_k:]] = -np.inf
    p = np.exp(z)
    p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p, int((np.cumsum(p) <= uniform).sum())


def reference(
    logits: Array,
    uniform: float,
    temperature: float,
    top_k: int,
    top_p: float,
    *,
    distribution: Distribution = lambda z, t, k, p: probabilities(z, Sampling(t, k, p)),
    draw: Draw = lambda p, u: (np.cumsum(p) <= u).sum(),
) -> dict[str, Any]:
    """The probabilities of `glasslm.inference`, or wrong ones, and the token."""
    p = distribution(logits, temperature, top_k, top_p)
    return {"p": p, "token": draw(p, uniform)}


def softmax(z: Array) -> Array:
    """z (V,) -> its softmax (V,)."""
    e = np.exp(z - z.max())
    return e / e.sum()


def select(p: Array, kept: Array) -> Array:
    """p (V,) without the tokens that are not kept, with the sum 1."""
    weights = np.where(kept, p, 0)
    return weights / weights.sum()


def in_top_k(p: Array, k: int) -> Array:
    """(V,): marks the k largest; of equal ones the first."""
    order = np.argsort(-p, kind="stable")
    return np.isin(np.arange(len(p)), order[: k or len(p)])


def share_before(p: Array, order: Array) -> Array:
    """(V,): for each token the sum of those that come before it in `order`."""
    before = np.empty_like(p)
    before[order] = np.cumsum(p[order]) - p[order]
    return before


def top_k(p: Array, k: int) -> Array:
    """p (V,) after top-k."""
    return select(p, in_top_k(p, k))


def top_p(p: Array, limit: float) -> Array:
    """p (V,) after top-p."""
    if limit == 1:
        return p
    return select(p, share_before(p, np.argsort(-p, kind="stable")) < limit)


def wrong_top_p(kept: Callable[[Array, float], Array]) -> Distribution:
    """The distribution with another choice of tokens by top-p: kept(p, limit) -> (V,) marks."""

    def distribution(z: Array, t: float, k: int, limit: float) -> Array:
        p = top_k(softmax(z / t), k)
        marks = kept(p, limit)
        return p if limit == 1 else select(p, marks) if marks.any() else p * np.nan

    return distribution


def wrong_top_k(kept: Callable[[Array, int], Array]) -> Distribution:
    """The distribution with another choice of tokens by top-k: kept(z, k) -> (V,) marks."""

    def distribution(z: Array, t: float, k: int, limit: float) -> Array:
        p = softmax(z / t)
        return top_p(select(p, kept(z, k)) if k else p, limit)

    return distribution


def masked_logits(z: Array, t: float, k: int, limit: float, relative: bool) -> Array:
    """The distribution where top-k sets the other logits to 0 in place of minus infinity."""
    scores = (z - z.max() if relative else z) / t
    return top_p(softmax(np.where(in_top_k(z, k), scores, 0)), limit)


def descending(p: Array) -> Array:
    """(V,): the tokens, the likeliest first."""
    return np.argsort(-p, kind="stable")


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    V = sizes["V"]
    temperature, k, limit = SETTINGS[number % len(SETTINGS)]
    # Steps of 0.4 or 0.6 in a random order: no two are nearly equal.
    steps = random.generator.choice([0.4, 0.6], V) * (2000 if is_large else 1)
    logits = random.generator.permutation(np.cumsum(steps) - steps.sum() / 2)
    uniform = random.number(0.05, 0.95)
    if number == 3 and len(logits) > k:
        order = np.argsort(-logits)
        logits[order[k]] = logits[order[k - 1]]
    if number >= 6:
        least = logits.argmin()
        logits[0], logits[least] = logits[least], logits[0]
        uniform = 0.0
    inputs = {
        "logits": np.round(logits, 2),
        "uniform": uniform,
        "temperature": temperature,
        "top_k": k,
        "top_p": limit,
    }
    return Case({**sizes, "temperature": temperature}, inputs)


DISTRIBUTIONS: tuple[tuple[VerdictName, str, Distribution], ...] = (
    (
        "factor",
        "the logits are multiplied by the temperature: they are divided by it",
        lambda z, t, k, p: top_p(top_k(softmax(z * t), k), p),
    ),
    (
        "factor",
        "the temperature is left out: the logits are divided by it",
        lambda z, t, k, p: top_p(top_k(softmax(z), k), p),
    ),
    (
        "factor",
        "the logits are divided by the square of the temperature",
        lambda z, t, k, p: top_p(top_k(softmax(z / t**2), k), p),
    ),
    (
        "factor",
        "the logits are divided by the root of the temperature",
        lambda z, t, k, p: top_p(top_k(softmax(z / t**0.5), k), p),
    ),
    (
        "other",
        "the temperature comes after the filters: top-p must see the probabilities with it",
        lambda z, t, k, p: softmax(np.log(np.maximum(top_p(top_k(softmax(z), k), p), 1e-300)) / t),
    ),
    (
        "other",
        "top-p comes before top-k: top-k is first, and top-p sees its result, with the sum 1",
        lambda z, t, k, p: top_k(top_p(softmax(z / t), p), k),
    ),
    (
        "other",
        "top-p looks at the probabilities before top-k: it sees the result of top-k, with the sum "
        "1",
        lambda z, t, k, p: select(softmax(z / t), in_top_k(z, k) & (top_p(softmax(z / t), p) > 0)),
    ),
    ("missing_term", "top-k is left out", lambda z, t, k, p: top_p(softmax(z / t), p)),
    ("missing_term", "top-p is left out", lambda z, t, k, p: top_k(softmax(z / t), k)),
    (
        "mask",
        "top-k keeps one token more than k",
        wrong_top_k(lambda z, k: in_top_k(z, k + 1)),
    ),
    (
        "mask",
        "top-k keeps one token less than k",
        wrong_top_k(lambda z, k: in_top_k(z, k - 1) & (k > 1)),
    ),
    (
        "mask",
        "top-k keeps the lowest logits: sort them in descending order",
        wrong_top_k(lambda z, k: in_top_k(-z, k)),
    ),
    (
        "mask",
        "top-k removes the k largest: it keeps them",
        wrong_top_k(lambda z, k: ~in_top_k(z, k)),
    ),
    (
        "mask",
        "top-k keeps more than k tokens where logits are equal: of equal ones, those with the "
        "lower index stay",
        wrong_top_k(lambda z, k: z >= np.sort(z)[-k]),
    ),
    (
        "mask",
        "of equal logits top-k keeps the one with the higher index: the lower one stays",
        wrong_top_k(lambda z, k: in_top_k(z[::-1], k)[::-1]),
    ),
    *(
        (
            "mask",
            "top-k sets the other logits to 0, which is the score of a likely token: they are "
            "minus infinity",
            lambda z, t, k, p, relative=relative: masked_logits(z, t, k, p, relative),
        )
        for relative in (True, False)
    ),
    (
        "factor",
        "the sum after top-k is not 1: divide by it before top-p",
        lambda z, t, k, p: np.where(top_p(top_k(softmax(z / t), k), p) > 0, softmax(z / t), 0),
    ),
    (
        "factor",
        "the sum after top-k is not 1: divide by it before top-p",
        lambda z, t, k, p: np.where(
            in_top_k(z, k) & (top_p(softmax(z / t), p) > 0), softmax(z / t), 0
        ),
    ),
    (
        "factor",
        "the sum after top-p is not 1: divide by it",
        lambda z, t, k, p: np.where(
            top_p(top_k(softmax(z / t), k), p) > 0, top_k(softmax(z / t), k), 0
        ),
    ),
    (
        "mask",
        "top-p leaves out the token that crosses top_p: it belongs to the set, which is the "
        "smallest with at least that share",
        wrong_top_p(lambda p, limit: share_before(p, descending(p)) + p <= limit),
    ),
    (
        "mask",
        "top-p leaves out the token that crosses top_p, unless it is the first: it belongs to the "
        "set",
        wrong_top_p(
            lambda p, limit: (
                (share_before(p, descending(p)) + p <= limit) | (np.arange(len(p)) == p.argmax())
            )
        ),
    ),
    (
        "mask",
        "top-p keeps one token too many: the set ends with the token that crosses top_p",
        wrong_top_p(
            lambda p, limit: np.isin(
                np.arange(len(p)),
                descending(p)[: 1 + int((share_before(p, descending(p)) < limit).sum())],
            )
        ),
    ),
    (
        "mask",
        "top-p adds up from the least likely token: sort in descending order",
        wrong_top_p(lambda p, limit: share_before(p, np.argsort(p, kind="stable")) < limit),
    ),
    (
        "mask",
        "top-p adds up in the order of the vocabulary: sort in descending order first",
        wrong_top_p(lambda p, limit: share_before(p, np.arange(len(p))) < limit),
    ),
    *(
        (
            "mask",
            f"top-p keeps the tokens with a probability of at least {name}: it is a limit of the "
            "sum, not of each token",
            wrong_top_p(kept),
        )
        for name, kept in (
            ("1 - top_p", lambda p, limit: p >= 1 - limit),
            ("top_p", lambda p, limit: p >= limit),
            ("top_p times the largest", lambda p, limit: p >= limit * p.max()),
        )
    ),
    (
        "other",
        "the probabilities are divided by the temperature: the logits are, before the softmax",
        lambda z, t, k, p: top_p(top_k(softmax(z), k), p) / t,
    ),
    (
        "other",
        "these are logarithms of the probabilities: return the probabilities",
        lambda z, t, k, p: np.log(top_p(top_k(softmax(z / t), k), p)),
    ),
)

DRAWS: tuple[tuple[str, Draw], ...] = (
    (
        "the likeliest token is taken, which is greedy decoding: the uniform number chooses",
        lambda p, u: p.argmax(),
    ),
    (
        "the draw runs over the sorted probabilities: it runs in the order of the vocabulary",
        lambda p, u: descending(p)[int((np.cumsum(p[descending(p)]) <= u).sum()) % len(p)],
    ),
    (
        "the token is a place in the sorted order: it is an index of the vocabulary",
        lambda p, u: (np.cumsum(p[descending(p)]) <= u).sum(),
    ),
    (
        "the draw is from the other end: the token is the first whose cumulative sum is above "
        "uniform",
        lambda p, u: (np.cumsum(p) <= 1 - u).sum(),
    ),
    (
        "a token of probability 0 is drawn where uniform is 0: the token is the first whose "
        "cumulative sum is above uniform, not equal to it",
        lambda p, u: (np.cumsum(p) < u).sum(),
    ),
    (
        "the token is off by one: it is the first whose cumulative sum is above uniform",
        lambda p, u: (np.cumsum(p) <= u).sum() - 1,
    ),
    (
        "the token is floor(uniform V), as if all were equally probable",
        lambda p, u: int(u * len(p)),
    ),
    (
        "the token is the one whose probability is nearest to uniform: use cumulative sums",
        lambda p, u: abs(p - u).argmin(),
    ),
)

EXERCISE = Exercise(
    name="sample",
    title="sampling",
    task="Choose the next token: divide the logits by the temperature, keep the top_k largest, "
    "take the softmax, keep the smallest set of likeliest tokens with a share of at least top_p, "
    "divide by the sum, and take the first token whose cumulative probability is above `uniform`.",
    signature="sample(logits, uniform, temperature, top_k, top_p)",
    shapes="""logits       (V,)
uniform      the random number, in [0, 1)
temperature  a float above 0
top_k        the number of tokens to keep; 0 keeps all; of equal logits the lower index stays
top_p        a share above 0; 1 keeps all
returns      p (V,), the probabilities with zeros for the tokens left out; and the token, an int""",
    reference=reference,
    sizes=Sizes.of(
        "V", small="2, 3, 4", distinct="6, 7, 8, 9, 8, 9, 7, 6", equal="8, 8, 8, 8, 8, 8, 8, 8"
    ),
    draw=draw,
    hints=(
        "The order matters: temperature, top-k, softmax, top-p. Each filter is followed by a "
        "division by the sum.",
        "np.argsort(-z, kind='stable') has the largest first, and of equal ones the lower index.",
        "A sorted token belongs to the top-p set if the sum of those before it is below top_p.",
        "The token is the number of cumulative sums that are at most uniform, in the order of the "
        "vocabulary: (np.cumsum(p) <= uniform).sum().",
    ),
    derivation="Sampling",
    solution="course/learn/exercises/sample.py:sample",
    needs=("softmax",),
    outputs=("p", "token"),
    mistakes=(
        *(
            Mistake(verdict, "p", sentence, {"distribution": distribution})
            for verdict, sentence, distribution in DISTRIBUTIONS
        ),
        *(Mistake("other", "token", sentence, {"draw": rule}) for sentence, rule in DRAWS),
    ),
    keeps_dtype=False,
)
