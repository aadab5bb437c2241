"""What a handful of independent runs can say: means with intervals, differences with tests, and words for both.

A value is the final loss of one run, and less of it is better. A run that diverged has None, NaN or infinity instead;
that is an outcome, so no mean is taken over the others as if it had not been started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np

from glasslm.errors import InputError, require

Losses = Sequence[float | None]
ALPHA = 0.05
POWER = 0.8
RESOLUTION = 1e-12  # of a loss: a smaller standard deviation is rounding
MOST_FLIPS = 20  # differences whose 2^n signs are still enumerated in a moment
ONE_RUN = "one run does not tell what another seed would have done"
COPIES = "the seeds made no difference, so these are copies of one run"


# -- means and differences --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, for which (value - truth) / se has a t distribution."""

    value: float
    se: float  # 0 is the limit of ever more equal runs
    df: float

    def p(self) -> float:
        """Two-sided, for a truth of zero."""
        return min(1.0, 2 * self._tail(abs(self.value)))

    def p_within(self, margin: float) -> float:
        """For a truth of `margin` or more on either side of zero: the larger p of two one-sided tests (TOST).

        At 5% it says the same as whether the 90% interval lies within the margin (Schuirmann 1987).
        """
        return self._tail(margin - abs(self.value))

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        from scipy import stats

        reach = self.se * float(stats.t.isf(alpha / 2, self.df))
        return self.value - reach, self.value + reach

    def detectable(self, power: float = POWER, alpha: float = ALPHA) -> float:
        """The smallest truth that such an experiment sees with this power.

        It holds if `se` is the true one: after three runs it is known to no better than a factor of two to six.
        """
        return self.se * noncentrality(self.df, power, alpha)

    def _tail(self, distance: float) -> float:
        """The probability of lying above the truth by at least `distance`."""
        from scipy import stats

        if self.se == 0:
            return 0.5 if distance == 0 else float(distance < 0)
        return float(stats.t.sf(distance / self.se, self.df))


def mean(values: Sequence[float]) -> Estimate:
    """Student 1908. At least two finite values."""
    return _mean(values, max(map(abs, values), default=0.0))


def paired(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """variant - baseline, for runs that share their seeds in this order: what a seed does to both drops out."""
    _require_pairs(variant, baseline)
    differences = [a - b for a, b in zip(variant, baseline, strict=True)]
    return _mean(differences, max(map(abs, (*variant, *baseline)), default=0.0))


def welch(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """variant - baseline, for independent runs whose spread may differ (Welch 1947, Satterthwaite 1946)."""
    a, b = mean(variant), mean(baseline)
    square = a.se**2 + b.se**2
    df = square**2 / (a.se**4 / a.df + b.se**4 / b.df) if square else a.df + b.df
    return Estimate(a.value - b.value, math.sqrt(square), df)


def _mean(values: Sequence[float], scale: float) -> Estimate:
    require(len(values) >= 2, "the number of runs", len(values), f"2 or more, as {ONE_RUN}")
    require(
        all(map(math.isfinite, values)),
        "a loss",
        "not finite",
        "a number; `compare` takes runs that diverged",
    )
    sd = _spread(values, scale)
    return Estimate(fmean(values), sd / math.sqrt(len(values)), len(values) - 1)


def _spread(values: Sequence[float], scale: float) -> float:
    """The standard deviation, and 0 where it is nothing but the rounding of numbers of this scale."""
    sd = stdev(values)
    return sd if sd > RESOLUTION * scale else 0.0


def _require_pairs(variant: Losses, baseline: Losses) -> None:
    if len(variant) != len(baseline):
        raise InputError(
            f"{len(variant)} runs of the variant, {len(baseline)} of the baseline: expected one of each for every "
            "seed; train the missing ones, or compare unpaired"
        )


@dataclass(frozen=True)
class Summary:
    """Runs of one kind. `why` says what None stands for."""

    n: int
    diverged: int
    mean: float | None
    sd: float | None
    ci_low: float | None
    ci_high: float | None
    why: str = ""


def summary(values: Losses, alpha: float = ALPHA) -> Summary:
    """The mean with its t interval, of confidence 1 - alpha; a mean only where no run diverged."""
    n, lost = len(values), diverged(values)
    finite = _finite(values)
    if lost or not n:
        return Summary(
            n, lost, None, None, None, None, f"{lost} of {n} diverged" if lost else "no runs"
        )
    if n == 1:
        return Summary(n, lost, finite[0], None, None, None, ONE_RUN)
    found, sd = mean(finite), _spread(finite, max(map(abs, finite)))
    if sd == 0:  # an interval of no width would claim certainty
        return Summary(n, lost, found.value, sd, None, None, COPIES)
    return Summary(n, lost, found.value, sd, *found.interval(alpha))


def diverged(values: Losses) -> int:
    """How many of the runs did."""
    return len(values) - len(_finite(values))


def _finite(values: Losses) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


# -- what can be seen at all ------------------------------------------------------------------------------------------


def noncentrality(df: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """How many standard errors from zero a truth must lie for a two-sided t test to see it, and its sign, so often."""
    from scipy import optimize, stats

    require(
        0 < alpha < power < 1, "the power", power, f"more than alpha, {alpha:g}, and less than 1"
    )
    critical = float(stats.t.isf(alpha / 2, df))

    def excess(shift: float) -> float:
        return float(stats.nct.sf(critical, df, shift)) - power

    # t = (Z + shift) / S, where Z is normal and S, independent of it, the root of chi^2 / df. This shift is surely
    # enough: both stay on the good side of these quantiles with probability sqrt(power) each.
    each = math.sqrt(power)
    enough = critical * math.sqrt(stats.chi2.ppf(each, df) / df) + float(stats.norm.ppf(each))
    return float(optimize.brentq(excess, 0.0, enough))


def detectable(n: int, pairs: bool = True, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest difference seen with this power, in standard deviations.

    Of the differences of n pairs; or of single runs, n of each kind, whose spread is the same.
    """
    require(n >= 2, "the number of runs", n, f"2 or more, as {ONE_RUN}")
    if pairs:
        return noncentrality(n - 1, power, alpha) / math.sqrt(n)
    return noncentrality(2 * n - 2, power, alpha) * math.sqrt(2 / n)


@dataclass(frozen=True)
class SignFlip:
    p: float
    floor: float  # 2 / 2^n: no outcome of n pairs has a smaller p


def sign_flip(differences: Sequence[float]) -> SignFlip:
    """The exact test that each difference was as likely to have the other sign (Fisher 1935, section 21), two-sided.

    It assumes no normal distribution, and pays: with five pairs nothing can be below p = 0.0625.
    """
    n = len(differences)
    require(
        1 <= n <= MOST_FLIPS,
        "the number of differences",
        n,
        f"1 to {MOST_FLIPS}; beyond that use `paired`",
    )
    require(all(map(math.isfinite, differences)), "a difference", "not finite", "a number")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate((sums + difference, sums - difference))
    rounding = RESOLUTION * sum(map(abs, differences))
    p = float(np.mean(np.abs(sums) >= abs(sums[0]) - rounding))
    return SignFlip(p, 2.0 ** (1 - n))


# -- many tests at once -----------------------------------------------------------------------------------------------


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjusted p of a declared family: those at most alpha hold together, with an error of alpha at most (Holm 1979).

    A test that could not be made is None and stays so, but counts: the family was declared with it.

    >>> holm([0.01, None, 0.02])
    [0.03, None, 0.04]
    """
    known = _in_order(p)
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, index) in enumerate(known):
        adjusted[index] = largest = max(largest, min(1.0, value * (len(p) - rank)))
    return adjusted


def benjamini_hochberg(p: Sequence[float | None]) -> list[float | None]:
    """Adjusted p of a screen: of those at most q, a share of q at most is expected to be false alarms (1995).

    For finding candidates, not for claims. None stays and counts, as in `holm`.
    """
    adjusted: list[float | None] = [None] * len(p)
    smallest = 1.0
    for below, (value, index) in reversed([*enumerate(_in_order(p), 1)]):
        adjusted[index] = smallest = min(smallest, value * len(p) / below)
    return adjusted


def _in_order(p: Sequence[float | None]) -> list[tuple[float, int]]:
    known = [(value, index) for index, value in enumerate(p) if value is not None]
    for value, _ in known:
        require(0 <= value <= 1, "a p value", value, "0 to 1, and None where there was no test")
    return sorted(known)


# -- a variant against a baseline, in numbers and in words ------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """variant - baseline in the unit of the losses: below zero, the variant is better. `why` says why there is no test.

    The interval and both p are of this comparison alone; `verdicts` sees to the family.
    """

    n: int
    n_baseline: int
    diverged: int
    baseline_diverged: int
    paired: bool
    alpha: float
    family: int
    margin: float | None
    delta: float | None = None
    se: float | None = None
    df: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    p_same: float | None = None  # TOST; None without a margin
    detectable: float | None = (
        None  # with power 0.8 at alpha / family, the first and hardest step of Holm
    )
    why: str = ""


def compare(
    variant: Losses,
    baseline: Losses,
    pairs: bool = True,
    margin: float | None = None,
    family: int = 1,
    alpha: float = ALPHA,
) -> Comparison:
    """Paired t by default, the runs of each in the order of their common seeds; otherwise Welch's.

    `margin`, chosen before the runs, is what would be too little to matter; `family` is how many comparisons the study
    declares. Raises InputError where there are no runs, or not one of each for every seed of a paired design.
    """
    require(min(len(variant), len(baseline)) > 0, "the number of runs", 0, "at least one of each")
    require(margin is None or 0 < margin < math.inf, "margin", margin, "more than 0 nats, or none")
    if pairs:
        _require_pairs(variant, baseline)
    a, b = _finite(variant), _finite(baseline)
    lost, lost_baseline = diverged(variant), diverged(baseline)
    known = (len(variant), len(baseline), lost, lost_baseline, pairs, alpha, family, margin)
    if lost or lost_baseline:
        who, lost, n = (
            ("it", lost, len(variant)) if lost else ("the baseline", lost_baseline, len(baseline))
        )
        return Comparison(*known, why=f"{who} diverged in {lost} of {n}")
    if min(len(a), len(b)) == 1:
        return Comparison(*known, delta=fmean(a) - fmean(b), why=ONE_RUN)
    found = paired(a, b) if pairs else welch(a, b)
    if found.se == 0 and not (
        pairs and found.value == 0
    ):  # pairs may be identical: what was changed changed nothing
        return Comparison(*known, delta=found.value, why=COPIES)
    low, high = found.interval(alpha)
    return Comparison(
        *known,
        delta=found.value, se=found.se, df=found.df, ci_low=low, ci_high=high, p=found.p(),
        p_same=None if margin is None else found.p_within(margin),
        detectable=found.detectable(POWER, alpha / family),
    )  # fmt: skip


Kind = Literal["better", "worse", "same", "not distinguishable", "diverged", "not tested"]


@dataclass(frozen=True)
class Verdict:
    kind: Kind
    words: str
    p_holm: float | None
    p_same_holm: float | None


def verdicts(family: Sequence[Comparison], unit: str = "nats") -> list[Verdict]:
    """Of all comparisons that a study declared: Holm over its tests, and likewise over its claims of sameness."""
    adjusted = zip(
        family, holm([one.p for one in family]), holm([one.p_same for one in family]), strict=True
    )
    return [verdict(one, p_holm, p_same_holm, unit) for one, p_holm, p_same_holm in adjusted]


def verdict(
    comparison: Comparison,
    p_holm: float | None,
    p_same_holm: float | None = None,
    unit: str = "nats",
) -> Verdict:
    """The words for a comparison, given its p and its p of sameness as adjusted over the family.

    Without a test of sameness nothing is called the same, unless every pair is identical.
    """
    kind, words = _judged(comparison, p_holm, p_same_holm, unit)
    return Verdict(kind, words, p_holm, p_same_holm)


def _judged(
    one: Comparison, p_holm: float | None, p_same_holm: float | None, unit: str
) -> tuple[Kind, str]:
    if one.diverged:
        also = (
            f" (the baseline in {one.baseline_diverged} of {one.n_baseline})"
            if one.baseline_diverged
            else ""
        )
        return "diverged", f"diverged in {one.diverged} of {one.n}{also}"
    if one.p is None or one.delta is None or one.detectable is None:
        return "not tested", f"not tested: {one.why}"
    assert p_holm is not None, "the comparison has a p, so it has one in its family"
    if one.se == 0:
        return "same", f"identical in all {one.n} pairs"
    kind: Kind = "better" if one.delta < 0 else "worse"
    different = p_holm <= one.alpha
    if p_same_holm is not None and p_same_holm <= one.alpha:
        return "same", f"the same within {one.margin:.3g} {unit}" + (
            f", if measurably {kind}" if different else ""
        )
    if different:
        return kind, f"{kind} by {abs(one.delta):.3g} {unit}"
    runs = f"n = {one.n}" if one.n == one.n_baseline else f"n = {one.n} against {one.n_baseline}"
    among = f" among {one.family} comparisons" if one.family > 1 else ""
    seen = f"{one.detectable:.3g} {unit} would be seen in 4 of 5 studies with {runs}{among}"
    return "not distinguishable", f"not distinguishable ({seen})"
