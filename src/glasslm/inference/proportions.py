"""Proportions with their confidence intervals: of texts, and of the tokens of texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, stdev

from glasslm.runs.metrics import ProportionFacts

NORMAL_QUANTILE_975 = NormalDist().inv_cdf(0.975)  # of a 95% interval


@dataclass(frozen=True)
class Proportion:
    """`count` of `total` texts."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """From 0 to 1; nan for a total of 0."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval by Wilson's score.

        Source: Journal of the American Statistical Association 22, 1927, page 209. Unlike the
        normal approximation it has a width at 0 and at 1. For a total of 0 it is (0, 1).

        >>> [round(end, 3) for end in Proportion(0, 20).interval]
        [0.0, 0.161]
        """
        if not self.total:
            return 0.0, 1.0
        n, p, z = self.total, self.value, NORMAL_QUANTILE_975
        middle = p + z * z / (2 * n)
        half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((middle + sign * half_width) / (1 + z * z / n) for sign in (-1, 1))
        # Rounding would give ends that are not exactly 0 or 1.
        return (low if self.count else 0.0), (high if self.count < n else 1.0)

    def __str__(self) -> str:
        """
        >>> str(Proportion(7, 20))
        '35% (18% to 57%)'
        """
        return _format(self)

    @property
    def facts(self) -> ProportionFacts:
        """The same for JSON."""
        return _facts(self)


@dataclass(frozen=True)
class TokenProportion:
    """The proportion of tokens in texts of equal length, `counts` (n,) of `length` tokens each.

    The tokens of one text are not independent: often all of them are right, or none. So the texts
    are the sample, and the interval is Student's over their shares.
    """

    counts: tuple[int, ...]
    length: int

    @property
    def count(self) -> int:
        """The tokens of all texts together that count."""
        return sum(self.counts)

    @property
    def total(self) -> int:
        """The tokens of all texts together."""
        return len(self.counts) * self.length

    @property
    def value(self) -> float:
        """From 0 to 1."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval, from 0 to 1; that of the texts by Wilson's score at 0 and at 1.

        >>> [round(end, 2) for end in TokenProportion((4, 0, 4, 4, 0, 4, 0, 0), 4).interval]
        [0.05, 0.95]
        """
        n, value = len(self.counts), self.value
        if value in (0, 1):  # without any spread
            return Proportion(round(value * n), n).interval
        from scipy.special import stdtrit

        error = stdev(count / self.length for count in self.counts) / math.sqrt(n)
        half_width = float(stdtrit(n - 1, 0.975)) * error
        return max(0.0, value - half_width), min(1.0, value + half_width)

    def __str__(self) -> str:
        """
        >>> str(TokenProportion((4, 4, 3, 0, 4, 2), 4))
        '71% (29% to 100%)'
        """
        return _format(self)

    @property
    def facts(self) -> ProportionFacts:
        """The same for JSON."""
        return _facts(self)


def _format(share: Proportion | TokenProportion) -> str:
    if not share.total:
        return "-"
    return "{:.0%} ({:.0%} to {:.0%})".format(share.value, *share.interval)


def _facts(share: Proportion | TokenProportion) -> ProportionFacts:
    low, high = share.interval
    return {
        "count": share.count, "of": share.total, "share": share.value, "ci_low": low,
        "ci_high": high,
    }  # fmt: skip
