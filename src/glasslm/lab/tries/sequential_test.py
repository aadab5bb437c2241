"""A test of paired differences that may be looked at after every pair.

The e-value is the ratio of two likelihoods of the t statistic: with a standardized effect drawn
from N(0, SPREAD^2), and with none. While there is no effect it is a martingale with mean 1,
whatever the standard deviation (Lai 1976; Perez-Ortiz et al., arXiv:2208.07610), so the probability
that it ever reaches 1/p is at most p (Ville 1939). A fixed t test that is looked at after each pair
has no such bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

SPREAD = 2.0  # of the standardized effects under the alternative
MIN_PAIRS, MAX_PLANNED_PAIRS = 3, 200
POWER = 0.8
MIN_RELATIVE_STD = 1e-12  # of the largest difference: a smaller standard deviation is rounding


@dataclass(frozen=True)
class Look:
    """What n paired differences (change - base) tell."""

    n: int
    delta: float  # their mean; negative when the change is better
    sd: float
    e_value: float  # against no effect, for either side
    ci_low: float  # of an interval that holds at all looks together
    ci_high: float


def look(differences: Sequence[float], alpha: float) -> Look:
    """The test after these differences; `alpha` is the probability of a false "better".

    "worse" has the same, so the e-value is compared with 1 / (2 alpha), and the interval has the
    confidence 1 - 2 alpha.
    """
    n = len(differences)
    if n < 2:
        delta = differences[0] if n else math.nan
        return Look(n, delta, 0.0, 1.0, -math.inf, math.inf)
    delta = fmean(differences)
    sd = stdev(differences)
    if sd <= MIN_RELATIVE_STD * max(map(abs, differences), default=0.0):
        # Copies of one run, or the same run twice: they tell nothing of other seeds.
        return Look(n, delta, 0.0, 1.0, -math.inf, math.inf)
    error = sd / math.sqrt(n)
    half = error * critical_t(n, alpha)
    return Look(n, delta, sd, e_value(delta / error, n), delta - half, delta + half)


def e_value(t: float, n: int) -> float:
    """The likelihood ratio for a t statistic of n pairs."""
    freedom, growth = n - 1, 1 + n * SPREAD**2
    log_ratio = math.log1p(t**2 / freedom) - math.log1p(t**2 / (freedom * growth))
    return math.exp(min((freedom + 1) / 2 * log_ratio - math.log(growth) / 2, 700.0))


@cache
def critical_t(n: int, alpha: float) -> float:
    """The |t| at which the e-value of n pairs reaches 1 / (2 alpha); infinite for few pairs."""
    freedom, growth = n - 1, 1 + n * SPREAD**2
    ratio = (math.sqrt(growth) / (2 * alpha)) ** (2 / (freedom + 1))
    if ratio >= growth:
        return math.inf
    return math.sqrt(freedom * (ratio - 1) / (1 - ratio / growth))


def pairs_needed(difference: float, sd: float, alpha: float) -> int | None:
    """The pairs with which a true difference is found in 4 of 5 tries; None above 200.

    The test may end earlier, because it is looked at after each pair.
    """
    from scipy.stats import nct

    if sd <= 0:
        return MIN_PAIRS
    for n in range(MIN_PAIRS, MAX_PLANNED_PAIRS + 1):
        t = critical_t(n, alpha)
        if t < math.inf and nct.sf(t, n - 1, abs(difference) / sd * math.sqrt(n)) >= POWER:
            return n
    return None


def alpha_of_try(number: int, total: float) -> float:
    """The share of try `number`, from 1, in the total probability of a false accept.

    The shares 1/2, 1/6, 1/12, ... add up to 1, however many tries follow.
    """
    return total / (number * (number + 1))
