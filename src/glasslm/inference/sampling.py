"""Logits to a token: greedy, temperature, top-k, top-p, min-p and repetition penalty, in NumPy.

`probabilities` is the exact distribution that a `Sampling` describes; `choose` draws the next token of every text of a
batch from it, each with one uniform number, which depends on nothing but (seed, sample, position). So text does not
depend on what else is in the batch, on streaming or, up to the rounding of the logits, on the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import DivergedError, require


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults but temperature and seed change nothing."""

    temperature: float = 0.8
    """Divides the logits: below 1 is safer, above 1 wilder, 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens that has this share of the probability (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep the tokens at least this probable relative to the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the text so far, and multiplies negative ones (arXiv:1909.05858)."""
    seed: int = 42
    """Seed of the draws: the same seed gives the same text."""

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < math.inf,
            "temperature",
            self.temperature,
            "0 (greedy) or more, and finite",
        )
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        penalty = self.repetition_penalty
        require(
            0 < penalty < math.inf, "repetition_penalty", penalty, "above 0 (1: off), and finite"
        )
        require(0 <= self.seed < 2**64, "seed", self.seed, "between 0 and 2^64 - 1")


def probabilities(
    logits: NDArray[Any],
    sampling: Sampling,
    seen: NDArray[np.bool_] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """The distributions from which next tokens are drawn, in float64; zero where a token cannot come.

    All arrays are (..., V), one distribution a row. The order is repetition penalty, `allowed`, temperature, top-k,
    top-p, min-p; each filter sees what the one before left, renormalised. Among equals the lower token stays. `seen`
    marks the tokens of the text so far, and at least one token must be `allowed`. Raises DivergedError when the logits
    are not finite.

    >>> probabilities(np.log([0.5, 0.3, 0.2]), Sampling(temperature=1.0, top_k=2)).round(3).tolist()
    [0.625, 0.375, 0.0]
    """
    scores = logits.astype(np.float64)
    if sampling.repetition_penalty != 1 and seen is not None:
        penalty = sampling.repetition_penalty
        scores = np.where(seen, np.where(scores > 0, scores / penalty, scores * penalty), scores)
    if allowed is not None:
        scores[~allowed] = -np.inf
    highest = scores.max(-1, keepdims=True)
    if not np.isfinite(highest).all():
        raise DivergedError(
            "the model's logits are not finite: train again with a lower --lr, or use another checkpoint"
        )
    if sampling.temperature == 0:
        certain = np.zeros_like(scores)
        np.put_along_axis(
            certain, scores.argmax(-1, keepdims=True), 1.0, -1
        )  # the lowest among equals
        return certain
    scores -= highest
    with np.errstate(over="ignore"):  # a tiny temperature sends the rest to -inf: the greedy limit
        scores /= sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores[_beyond_top_k(scores, sampling.top_k)] = -np.inf
    weights: NDArray[np.float64] = np.exp(scores)
    weights /= weights.sum(-1, keepdims=True)
    if sampling.top_p < 1:
        weights[_beyond_top_p(weights, sampling.top_p)] = 0.0
    if sampling.min_p > 0:
        weights[weights < sampling.min_p * weights.max(-1, keepdims=True)] = 0.0
    weights /= weights.sum(-1, keepdims=True)
    return weights


def _beyond_top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """(..., V) all but the k highest scores of each row; equals stay in the order of their index."""
    threshold = np.partition(scores, -k, -1)[..., -k, None]
    above, equal = scores > threshold, scores == threshold
    spare = k - above.sum(-1, keepdims=True)
    return ~(above | (equal & (equal.cumsum(-1) <= spare)))


def _beyond_top_p(weights: NDArray[np.float64], p: float) -> NDArray[np.bool_]:
    """(..., V) the tokens of each row that follow once the likeliest ones reach the share p."""
    order = np.argsort(-weights, -1, kind="stable")
    shares = np.cumsum(np.take_along_axis(weights, order, -1), -1)
    beyond = np.zeros(weights.shape, bool)
    np.put_along_axis(beyond, order[..., 1:], shares[..., :-1] >= p, -1)
    return beyond


DRAWS = 64  # made at once


def uniform(seed: int, sample: int, position: int) -> float:
    """The draw in [0, 1) for the token at `position` of a text: Philox keyed by (seed, sample), counter = position."""
    block, place = divmod(position, DRAWS)
    return float(_draws(seed, sample, block)[place])


@lru_cache(maxsize=1024)
def _draws(seed: int, sample: int, block: int) -> NDArray[np.float64]:
    """(DRAWS,) those of as many positions: to make a generator takes longer than to draw from it."""
    # The key as one number: a list with one entry above 2^63 would pass through float64. Each count gives four numbers.
    generator = np.random.Philox(key=seed | sample << 64, counter=block * DRAWS)
    bits = generator.random_raw(4 * DRAWS)[::4] >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def choose(
    logits: NDArray[Any],
    sampling: Sampling,
    positions: Sequence[int],
    samples: Sequence[int],
    seen: NDArray[np.bool_] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """The next token of each of N texts, (N,), given logits (N, V).

    A text has positions[n] tokens so far, prompt included, and is the samples[n]-th from its prompt. Inverse CDF in
    float64 over the distribution in the order of the vocabulary; see `probabilities` for the rest.
    """
    distributions = probabilities(logits, sampling, seen, allowed)
    if sampling.temperature == 0:
        return distributions.argmax(-1)
    cdf = np.cumsum(distributions, -1)
    draws = [
        uniform(sampling.seed, sample, position) for sample, position in zip(samples, positions)
    ]
    # u < 1, so u * total < total: the found token has a step in the cdf, that is, a probability above zero
    return np.count_nonzero(cdf <= np.array(draws)[:, None] * cdf[:, -1:], -1)


def log_probabilities(logits: NDArray[Any], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Natural log of the probability that the model itself gives to tokens (N,), before any filter; logits (N, V)."""
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    found: NDArray[np.float64] = scores[np.arange(len(tokens)), tokens] - np.log(
        np.exp(scores).sum(-1)
    )
    return found
