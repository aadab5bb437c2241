"""Approach 2 of Hoffmann et al. 2022 (arXiv:2203.15556): the best size at each compute.

Each parabola is local: a loss is not exactly a parabola in ln N, and over two decades of sizes the
minimum of one would lie visibly beside the true one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from glasslm.lab.scaling.law import Observation, levels
from glasslm.lab.scaling.power_terms import Array

NEIGHBOURS = 2  # sizes on each side of the lowest one
MIN_REACH = 2.0  # factor of size that these span at least; over less, noise hides the curvature
MAX_OFF_CENTRE = 0.5  # of a parabola's minimum, in half widths of its sizes
MIN_SIZES = 3

Verdict = Literal["centred", "off-centre", "outside the grid", "no minimum"]


@dataclass(frozen=True)
class Parabola:
    """ln loss = ln lowest + curvature / 2 (ln N - ln N_opt)^2 at one compute C."""

    C: float
    N_opt: float
    lowest: float
    curvature: float
    sizes: tuple[float, ...]  # that it was fitted to
    verdict: Verdict
    error: float = math.nan  # standard error of ln N_opt; NaN where the sizes are too few
    widened: str = ""  # why more sizes than the lowest and its neighbours were taken

    @property
    def is_inside(self) -> bool:
        """Whether the minimum is among the sizes that were trained."""
        return self.verdict in ("centred", "off-centre")

    def loss(self, N: float) -> float:
        """The loss of the parabola at size N."""
        return self.lowest * math.exp(self.curvature / 2 * math.log(N / self.N_opt) ** 2)


def fit_parabolas(observations: Sequence[Observation]) -> list[Parabola]:
    """A parabola of ln loss in ln N, by least squares, for each compute with at least 3 sizes.

    It is fitted to the size with the lowest mean loss and two on each side; to more where these
    have no minimum among them, or are closer to each other than MIN_REACH. The verdict tells where
    the minimum is: one off the centre of its sizes is biased even without noise.
    """
    result, squares = [], []
    groups = levels([o.C for o in observations])
    for group in range(max(groups, default=-1) + 1):
        runs = [o for o, g in zip(observations, groups, strict=True) if g == group]
        if len({o.N for o in runs}) < MIN_SIZES:
            continue
        parabola, residuals = _fit_around_lowest(runs)
        result.append(parabola)
        if len(residuals) > 3:
            squares.append((float((residuals**2).sum()), len(residuals) - 3))
    freedom = sum(count for _, count in squares)
    if not freedom:
        return result
    noise = math.sqrt(sum(total for total, _ in squares) / freedom)  # of all computes together
    return [replace(parabola, error=parabola.error * noise) for parabola in result]


def _fit_around_lowest(runs: Sequence[Observation]) -> tuple[Parabola, Array]:
    """The parabola of one compute, its error for noise of 1, and its residuals (n,)."""
    sizes = sorted({o.N for o in runs})
    means = [float(np.mean([math.log(o.loss) for o in runs if size == o.N])) for size in sizes]
    lowest, reach = int(np.argmin(means)), NEIGHBOURS
    widened = ""
    while True:
        first, last = max(lowest - reach, 0), min(lowest + reach, len(sizes) - 1)
        chosen = [o for o in runs if sizes[first] <= o.N <= sizes[last]]
        parabola, residuals = _fit(chosen)
        is_wide = all(
            ratio >= MIN_REACH * (1 - 1e-6) or end in (sizes[0], sizes[-1])
            for end, ratio in (
                (sizes[first], sizes[lowest] / sizes[first]),
                (sizes[last], sizes[last] / sizes[lowest]),
            )
        )
        if (parabola.is_inside and is_wide) or (first, last) == (0, len(sizes) - 1):
            return replace(parabola, widened=widened if parabola.is_inside else ""), residuals
        count = f"{last - first + 1} sizes around the lowest loss"
        widened = (
            f"the {count} span less than a factor of {MIN_REACH:g} on a side"
            if parabola.is_inside
            else f"{parabola.verdict} among the {count}"
        )
        reach += 1


def _fit(runs: Sequence[Observation]) -> tuple[Parabola, Array]:
    x, y = np.log([o.N for o in runs]), np.log([o.loss for o in runs])
    middle, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
    z = (x - middle) / half  # -1 and 1 are the ends of the sizes
    X = np.stack([z**2, z, np.ones_like(z)], 1)
    coefficients = np.linalg.lstsq(X, y, rcond=None)[0]
    c2, c1, c0 = (float(c) for c in coefficients)
    minimum = -c1 / (2 * c2) if c2 > 0 else math.nan
    verdict: Verdict
    if c2 <= 0:
        verdict = "no minimum"
    elif abs(minimum) > 1:
        verdict = "outside the grid"
    else:
        verdict = "off-centre" if abs(minimum) > MAX_OFF_CENTRE else "centred"
    gradient = np.array([c1 / (2 * c2**2), -1 / (2 * c2), 0.0]) if c2 > 0 else np.zeros(3)
    variance = float(gradient @ np.linalg.pinv(X.T @ X) @ gradient)
    parabola = Parabola(
        C=math.exp(float(np.mean(np.log([o.C for o in runs])))),
        N_opt=math.exp(float(np.clip(middle + minimum * half, -700, 700))) if c2 > 0 else math.nan,
        lowest=math.exp(c0 - c1 * c1 / (4 * c2)) if c2 > 0 else math.nan,
        curvature=2 * c2 / float(half) ** 2,
        sizes=tuple(sorted({o.N for o in runs})),
        verdict=verdict,
        error=math.sqrt(variance) * float(half),
    )
    return parabola, y - X @ coefficients
