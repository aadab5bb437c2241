"""A proportion with its confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

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
        if not self.total:
            return "-"
        return "{:.0%} ({:.0%} to {:.0%})".format(self.value, *self.interval)

    @property
    def facts(self) -> ProportionFacts:
        """The same for JSON."""
        low, high = self.interval
        return {
            "count": self.count,
            "of": self.total,
            "share": self.value,
            "ci_low": low,
            "ci_high": high,
        }
