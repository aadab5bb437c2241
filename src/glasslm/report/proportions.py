"""How many of some texts are of a kind, and how far that share may be off by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


@dataclass(frozen=True)
class Share:
    """`count` of `of` texts."""

    count: int
    of: int

    @property
    def value(self) -> float:
        """From 0 to 1; nan of no texts at all."""
        return self.count / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95%, by Wilson's score (Journal of the American Statistical Association 22, 1927, page 209).

        It says something of 0 and of all, too; of no texts it is (0, 1).

        >>> [round(end, 3) for end in Share(0, 20).interval]
        [0.0, 0.161]
        """
        if not self.of:
            return 0.0, 1.0
        n, p = self.of, self.value
        middle = p + Z * Z / (2 * n)
        reach = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        low, high = ((middle + sign * reach) / (1 + Z * Z / n) for sign in (-1, 1))
        # At the ends rounding would leave what is not quite 0 or 1.
        return (low if self.count else 0.0), (high if self.count < n else 1.0)

    def __str__(self) -> str:
        """
        >>> str(Share(7, 20))
        '35% (18% to 57%)'
        """
        if not self.of:
            return "-"
        return "{:.0%} ({:.0%} to {:.0%})".format(self.value, *self.interval)

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        low, high = self.interval
        return {
            "count": self.count,
            "of": self.of,
            "share": self.value,
            "ci_low": low,
            "ci_high": high,
        }
