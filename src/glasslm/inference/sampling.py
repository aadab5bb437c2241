"""Sampling of tokens from logits: temperature, top-k, top-p, min-p, repetition penalty, greedy.

`probabilities` returns the distribution that a `Sampling` describes. `sample_tokens` draws from it
the next token of each text of a batch, with one uniform number per text: `uniform_draw` of (seed,
sample, position). So a text does not depend on the rest of the batch, on streaming or, up to
the rounding of the logits, on the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import DivergedError, InputError, require

# Far outside of this range the logits of used tokens overflow.
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-3, 1e3


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling. All defaults but those of temperature and seed are off."""

    temperature: float = 0.8
    """Divides the logits: below 1 is safer, above 1 more varied; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this share of the probability (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep the tokens at least this probable relative to the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of used tokens, multiplies negative ones (arXiv:1909.05858)."""
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
        require(0 <= self.top_p <= 1, "top_p", self.top_p, "0 (the likeliest token) to 1 (off)")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        require(
            MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
            "repetition_penalty",
            self.repetition_penalty,
            f"{MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g} (1: off)",
        )
        require(0 <= self.seed < 2**64, "seed", self.seed, "between 0 and 2^64 - 1")


def probabilities(
    logits: NDArray[Any],
    sampling: Sampling,
    used_tokens: NDArray[np.bool_] | None = None,
    allowed: NDArray[np.bool_] | None = None,
    bias: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """logits (..., V) -> (..., V): the distributions that next tokens are drawn from, in float64.

    The order is repetition penalty, `bias`, `allowed`, temperature, top-k, top-p, min-p; each
    filter works on the renormalized result of the one before. Of equal tokens the lower one stays.
    `used_tokens` (..., V) marks the tokens of the text so far, `allowed` (..., V) those that may
    come next; `bias` (..., V) is added to the logits. Raises DivergedError when the logits are not
    finite, InputError when no token is allowed.

    >>> probabilities(np.log([0.5, 0.3, 0.2]), Sampling(temperature=1.0, top_k=2)).round(3).tolist()
    [0.625, 0.375, 0.0]
    """
    scores = logits.astype(np.float64)
    if sampling.repetition_penalty != 1 and used_tokens is not None:
        penalty = sampling.repetition_penalty
        penalized = np.where(scores > 0, scores / penalty, scores * penalty)
        scores = np.where(used_tokens, penalized, scores)
    if bias is not None:
        scores += bias
    if allowed is not None:
        scores[~allowed] = -np.inf
        if not allowed.any(-1).all():
            raise InputError("no token of the vocabulary continues the text in its grammar")
    highest = _finite_maximum(scores)
    if sampling.temperature == 0:
        greedy = np.zeros_like(scores)
        # argmax takes the lowest of equal tokens
        np.put_along_axis(greedy, scores.argmax(-1, keepdims=True), 1.0, -1)
        return greedy
    scores -= highest
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf, as greedy does
        scores /= sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores[mask_outside_top_k(scores, sampling.top_k)] = -np.inf
    weights: NDArray[np.float64] = np.exp(scores)
    weights /= weights.sum(-1, keepdims=True)
    if sampling.top_p < 1:
        weights[mask_outside_top_p(weights, sampling.top_p)] = 0.0
    if sampling.min_p > 0:
        weights[weights < sampling.min_p * weights.max(-1, keepdims=True)] = 0.0
    weights /= weights.sum(-1, keepdims=True)
    return weights


def _finite_maximum(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """scores (..., V) -> (..., 1): the highest ones; DivergedError where they are not finite."""
    highest: NDArray[np.float64] = scores.max(-1, keepdims=True)
    if not np.isfinite(highest).all():
        raise DivergedError(
            "the model's logits are not finite: train again with a lower --lr, or use another "
            "checkpoint"
        )
    return highest


def mask_outside_top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """(..., V): marks all but the k highest scores of each row; of equal ones the first stay."""
    threshold = np.partition(scores, -k, -1)[..., -k, None]
    above, equal = scores > threshold, scores == threshold
    n_equal_kept = k - above.sum(-1, keepdims=True)
    return ~(above | (equal & (equal.cumsum(-1) <= n_equal_kept)))


def mask_outside_top_p(weights: NDArray[np.float64], p: float) -> NDArray[np.bool_]:
    """(..., V): marks the tokens of each row after the likeliest that reach the share p."""
    order = np.argsort(-weights, -1, kind="stable")
    shares = np.cumsum(np.take_along_axis(weights, order, -1), -1)
    outside = np.zeros(weights.shape, bool)
    np.put_along_axis(outside, order[..., 1:], shares[..., :-1] >= p, -1)
    return outside


DRAWS_PER_BLOCK = 64  # random numbers made by one generator: creating it costs more than drawing


def uniform_draw(seed: int, sample: int, position: int) -> float:
    """The uniform number in [0, 1) for the token at `position` of a text.

    It comes from Philox with key (seed, sample) and counter `position`.
    """
    block, index = divmod(position, DRAWS_PER_BLOCK)
    return float(_uniform_draws(seed, sample, block)[index])


@lru_cache(maxsize=1024)
def _uniform_draws(seed: int, sample: int, block: int) -> NDArray[np.float64]:
    """(DRAWS_PER_BLOCK,): the uniform numbers of the positions of a block."""
    # The key is one integer: a list with an entry above 2^63 would pass through float64. Each value
    # of the counter gives four numbers; the first is used.
    generator = np.random.Philox(key=seed | sample << 64, counter=block * DRAWS_PER_BLOCK)
    bits = generator.random_raw(4 * DRAWS_PER_BLOCK)[::4] >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def sample_tokens(
    logits: NDArray[Any],
    sampling: Sampling,
    draws: Sequence[float],
    used_tokens: NDArray[np.bool_] | None = None,
    allowed: NDArray[np.bool_] | None = None,
    bias: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """logits (N, V) -> (N,): the next token of each of N texts, given their `uniform_draw`s.

    The draw is by inverse CDF, in float64 and in the order of the vocabulary, from the distribution
    of `probabilities`, which documents the other arguments. The seed of `sampling` is not used.
    """
    distributions = probabilities(logits, sampling, used_tokens, allowed, bias)
    if sampling.temperature == 0:
        return distributions.argmax(-1)
    cdf = np.cumsum(distributions, -1)
    # u < 1, so u * total < total: the CDF rises at the sampled token, whose probability is positive
    return np.count_nonzero(cdf <= np.array(draws)[:, None] * cdf[:, -1:], -1)


def log_probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    """logits (..., V) -> (..., V): natural logs of the model's probabilities, unfiltered.

    Raises DivergedError when the logits are not finite.
    """
    scores = logits.astype(np.float64)
    scores -= _finite_maximum(scores)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return scores
