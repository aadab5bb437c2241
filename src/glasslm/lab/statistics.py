"""Statistics of paired runs: intervals, tests, Holm's correction, verdicts in words.

A value is the final loss of one run; lower is better. A run that diverged has None, NaN or
infinity. Divergence is an outcome: no mean is taken over the remaining runs, because that would
hide it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev, variance
from typing import Literal

from glasslm.errors import InputError, require

Losses = Sequence[float | None]
ALPHA = 0.05
POWER = 0.8
MIN_RELATIVE_STD = 1e-12  # of the largest loss: a smaller standard deviation is rounding
ONE_RUN = "one run does not show how much another seed would change the loss"
IDENTICAL_RUNS = "all pairs differ by the same, as copies of one run do"


# -- differences -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean difference with its standard error.

    (value - truth) / se has a t distribution with df degrees of freedom.
    """

    value: float
    se: float  # standard error; 0 when all differences are equal
    df: float

    def p_value(self) -> float:
        """The two-sided p of the hypothesis that the true difference is 0."""
        return min(1.0, 2 * self._tail_probability(abs(self.value)))

    def equivalence_p_value(self, margin: float) -> float:
        """The larger p of two one-sided tests (TOST) for a true difference outside +-margin.

        It is at most 5% exactly when the 90% interval lies within the margin (Schuirmann 1987).
        """
        return self._tail_probability(margin - abs(self.value))

    def confidence_interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The lower and upper bound of the t interval with confidence 1 - alpha."""
        from scipy import stats

        half_width = self.se * float(stats.t.isf(alpha / 2, self.df))
        return self.value - half_width, self.value + half_width

    def detectable_difference(self, power: float = POWER, alpha: float = ALPHA) -> float:
        """The smallest true difference that such a study detects with this power.

        It assumes that `se` is the true standard error. Three runs determine that to a factor of
        two to six.
        """
        return self.se * noncentrality(self.df, power, alpha)

    def _tail_probability(self, distance: float) -> float:
        """The probability that the estimate lies above the truth by at least `distance`."""
        from scipy import stats

        if self.se == 0:
            return 0.5 if distance == 0 else float(distance < 0)
        return float(stats.t.sf(distance / self.se, self.df))


def paired_difference(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The mean of variant - baseline, for runs with the same seeds (Student 1908).

    Both are in the order of the seeds. Pairing removes the part of the variance that a seed adds to
    both runs. Raises InputError for fewer than two pairs, for lists of different lengths and for
    values that are not finite.
    """
    _require_pairs(variant, baseline)
    n = len(variant)
    require(n >= 2, "the number of runs", n, f"2 or more, as {ONE_RUN}")
    require(
        all(map(math.isfinite, (*variant, *baseline))),
        "a loss",
        "not finite",
        "a number; `compare_losses` takes runs that diverged",
    )
    differences = [a - b for a, b in zip(variant, baseline, strict=True)]
    std = stdev(differences)
    if not std > MIN_RELATIVE_STD * max(map(abs, (*variant, *baseline))):
        std = 0.0  # rounding of the losses
    return Estimate(fmean(differences), std / math.sqrt(n), n - 1)


def independent_difference(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The difference of the means of runs with other seeds, without equal variances (Welch 1947).

    Raises InputError for fewer than two runs of either.
    """
    n = min(len(variant), len(baseline))
    require(n >= 2, "the number of runs", n, f"2 or more, as {ONE_RUN}")
    value = fmean(variant) - fmean(baseline)
    parts = [(variance(losses) / len(losses), len(losses)) for losses in (variant, baseline)]
    total = sum(part for part, _ in parts)
    if not math.sqrt(total) > MIN_RELATIVE_STD * max(map(abs, (*variant, *baseline))):
        return Estimate(value, 0.0, len(variant) + len(baseline) - 2)  # rounding of the losses
    return Estimate(
        value, math.sqrt(total), total**2 / sum(part**2 / (size - 1) for part, size in parts)
    )


def interval_of_mean(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float] | None:
    """The t interval of the mean with confidence 1 - alpha; None for one value."""
    if len(values) < 2:
        return None
    n = len(values)
    return Estimate(fmean(values), stdev(values) / math.sqrt(n), n - 1).confidence_interval(alpha)


def _require_pairs(variant: Losses, baseline: Losses) -> None:
    if len(variant) != len(baseline):
        raise InputError(
            f"{len(variant)} runs of the variant, {len(baseline)} of the baseline: expected one of "
            "each for every seed; train the missing ones"
        )


def _count_diverged(values: Losses) -> int:
    return sum(value is None or not math.isfinite(value) for value in values)


def noncentrality(df: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """The true difference, in standard errors, that a two-sided t test detects.

    The test detects it with this power and the right sign.
    """
    from scipy import optimize, stats

    require(
        0 < alpha < power < 1, "the power", power, f"more than alpha, {alpha:g}, and less than 1"
    )
    critical = float(stats.t.isf(alpha / 2, df))

    def excess_power(shift: float) -> float:
        return float(stats.nct.sf(critical, df, shift)) - power

    # t = (Z + shift) / S, where Z is normal and S, independent of Z, is the root of chi^2 / df. The
    # upper bound of the search is a shift with enough power: Z and S each pass these quantiles with
    # probability sqrt(power).
    each = math.sqrt(power)
    upper = critical * math.sqrt(stats.chi2.ppf(each, df) / df) + float(stats.norm.ppf(each))
    return float(optimize.brentq(excess_power, 0.0, upper))


# -- many tests at once ----------------------------------------------------------------------------


def adjust_by_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p values of a declared family, adjusted by Holm's method (Holm 1979).

    The probability of any false positive is at most alpha. None stands for a test that could not be
    made. It stays None and counts as a member of the family.

    >>> adjust_by_holm([0.01, None, 0.02])
    [0.03, None, 0.04]
    """
    known = [(value, index) for index, value in enumerate(p_values) if value is not None]
    for value, _ in known:
        require(0 <= value <= 1, "a p value", value, "0 to 1, or None where there was no test")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (value, index) in enumerate(sorted(known)):
        adjusted[index] = largest = max(largest, min(1.0, value * (len(p_values) - rank)))
    return adjusted


# -- a variant against a baseline, in numbers and in words -----------------------------------------


@dataclass(frozen=True)
class Comparison:
    """variant - baseline in the unit of the losses; negative when the variant is better.

    The interval and both p values belong to this comparison alone: `judge_family` corrects them for
    the family.
    """

    n: int  # pairs of runs
    diverged: int  # runs of the variant
    baseline_diverged: int
    alpha: float
    family: int  # comparisons that the study declares
    margin: float | None  # a smaller difference would not matter
    delta: float | None = None
    se: float | None = None
    df: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    p_same: float | None = None  # of the equivalence test (TOST); None without a margin
    # With power 0.8 at alpha / family, the first and strictest step of Holm's correction
    detectable: float | None = None
    unit: str = "nats"
    reason: str = ""  # the reason when there is no test


def compare_losses(
    variant: Losses,
    baseline: Losses,
    margin: float | None = None,
    family: int = 1,
    alpha: float = ALPHA,
    paired: bool = True,
    unit: str = "nats",
    min_se: float = 0.0,
) -> Comparison:
    """The paired t test of a variant's losses against the baseline's.

    Both are in the order of their common seeds. `margin`, chosen before the runs, is the largest
    difference that does not matter. `family` is the number of comparisons that the study declares.
    Without `paired` the seeds differ, and the test is Welch's. The standard error is at least
    `min_se`, that of the measurement itself. Raises InputError where there are no
    runs, or, for pairs, not one of each for every seed.
    """
    require(min(len(variant), len(baseline)) > 0, "the number of runs", 0, "at least one of each")
    require_margin(margin)
    if paired:
        _require_pairs(variant, baseline)
    n, diverged, baseline_diverged = (
        min(len(variant), len(baseline)),
        _count_diverged(variant),
        _count_diverged(baseline),
    )
    declared = (n, diverged, baseline_diverged, alpha, family, margin)
    if diverged or baseline_diverged:
        of_baseline = f"in {baseline_diverged} of {len(baseline)}"
        reason = f"the baseline diverged {of_baseline}"
        if diverged:
            also = f" (the baseline {of_baseline})" if baseline_diverged else ""
            reason = f"diverged in {diverged} of {len(variant)}{also}"
        return Comparison(*declared, reason=reason)
    a, b = ([value for value in losses if value is not None] for losses in (variant, baseline))
    if n == 1:
        return Comparison(*declared, delta=fmean(a) - fmean(b), reason=ONE_RUN)
    estimate = paired_difference(a, b) if paired else independent_difference(a, b)
    estimate = replace(estimate, se=max(estimate.se, min_se))
    if estimate.se == 0 and estimate.value != 0:  # a difference of 0 means that the pairs are equal
        return Comparison(*declared, delta=estimate.value, reason=IDENTICAL_RUNS)
    low, high = estimate.confidence_interval(alpha)
    return Comparison(
        *declared,
        delta=estimate.value, se=estimate.se, df=estimate.df, ci_low=low, ci_high=high,
        p=estimate.p_value(),
        p_same=None if margin is None else estimate.equivalence_p_value(margin),
        detectable=estimate.detectable_difference(POWER, alpha / family),
        unit=unit,
    )  # fmt: skip


def require_margin(margin: float | None) -> None:
    """Raise InputError for a margin that no difference could lie within."""
    require(margin is None or 0 < margin < math.inf, "margin", margin, "more than 0 nats, or none")


Kind = Literal["better", "worse", "same", "not distinguishable", "diverged", "not tested"]


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a comparison after the correction for its family."""

    kind: Kind
    words: str
    p_holm: float | None
    p_same_holm: float | None


def judge_family(family: Sequence[Comparison]) -> list[Verdict]:
    """The verdicts on all comparisons that a study declared.

    Holm's correction is applied to the tests of a difference, and separately to the tests of
    equivalence.
    """
    adjusted = zip(
        family,
        adjust_by_holm([comparison.p for comparison in family]),
        adjust_by_holm([comparison.p_same for comparison in family]),
        strict=True,
    )
    return [judge_comparison(*item) for item in adjusted]


def judge_comparison(
    comparison: Comparison, p_holm: float | None, p_same_holm: float | None = None
) -> Verdict:
    """The verdict on one comparison, from its two p values as adjusted over the family.

    Without an equivalence test the verdict is "same" only when every pair is identical.
    """
    kind, words = _kind_and_words(comparison, p_holm, p_same_holm)
    return Verdict(kind, words, p_holm, p_same_holm)


def _kind_and_words(
    c: Comparison, p_holm: float | None, p_same_holm: float | None
) -> tuple[Kind, str]:
    if c.diverged:
        return "diverged", c.reason
    if c.p is None or c.delta is None or c.detectable is None:
        return "not tested", f"not tested: {c.reason}"
    assert p_holm is not None, "a comparison with a p has an adjusted p"
    if c.se == 0:
        return "same", f"identical in all {c.n} pairs"
    kind: Kind = "better" if c.delta < 0 else "worse"
    is_different = p_holm <= c.alpha
    if p_same_holm is not None and p_same_holm <= c.alpha:
        also = f", if measurably {kind}" if is_different else ""
        return "same", f"the same within {c.margin:.3g} {c.unit}{also}"
    if is_different:
        return kind, f"{kind} by {abs(c.delta):.3g} {c.unit}"
    among = f" among {c.family} comparisons" if c.family > 1 else ""
    power = f"{c.detectable:.3g} {c.unit} would be seen in 4 of 5 studies with n = {c.n}{among}"
    return "not distinguishable", f"not distinguishable ({power})"
