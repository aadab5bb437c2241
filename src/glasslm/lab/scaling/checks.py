"""How far a fitted scaling law can be trusted: intervals, what the fit leans on, and what it would have predicted.

In-sample error says nothing about extrapolation, so the headline is `backtest`: the largest runs, predicted from the
others. Exponents come with intervals, from a bootstrap over cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from glasslm.errors import InputError
from glasslm.lab.scaling import power_terms
from glasslm.lab.scaling.law import (
    ALIKE,
    BUDGETS,
    DELTA,
    SIZES,
    Fit,
    Interval,
    Law,
    Observation,
    Problem,
    budgets,
    fit,
    levels,
)
from glasslm.lab.scaling.power_terms import Array

REFITS = 400
DELTAS = (1e-4, 1e-3, 1e-2, math.inf)


@dataclass(frozen=True)
class Bootstrap:
    """A fit, and the laws that its cells give when they are drawn with replacement, all seeds of a cell together."""

    fit: Fit
    refits: tuple[Law, ...]

    def interval(self, of: Callable[[Law], float], log: bool = False) -> Interval:
        """The 95% interval of a number above 0 that follows from the law, symmetric, or symmetric in its logarithm.

        The fit plus or minus Student's t (cells - 5 degrees of freedom) times half of what the middle 68% of the
        refits span: percentiles alone are too narrow for a small design, and a standard deviation follows the few
        draws that leave an exponent open.
        """
        scale, back = (math.log, _exp) if log else (float, float)
        value = scale(of(self.fit))
        below, above = np.percentile([scale(of(law)) for law in self.refits], [15.87, 84.13])
        half = self.t * float(above - below) / 2
        return Interval(
            back(value), back(value - half) if log else max(value - half, 0.0), back(value + half)
        )

    @property
    def t(self) -> float:
        from scipy.stats import t

        return float(t.ppf(0.975, self.fit.freedom))

    def parameters(self) -> dict[str, Interval]:
        """alpha, beta, A, B, E and a, each with its interval."""
        logs = {
            "alpha": True,
            "beta": True,
            "A": True,
            "B": True,
            "E": False,
            "a": False,
        }  # E may well be 0
        return {name: self.interval(attrgetter(name), log) for name, log in logs.items()}

    def expected(self, N: float, D: float) -> Interval:
        """The law's loss at (N, D), as the mean over seeds would show it."""
        return self.interval(lambda law: law.loss(N, D), log=True)

    def prediction(self, N: float, D: float) -> Interval:
        """The loss that one run of N parameters on D tokens should end with: the law's doubt and the noise of runs.

        That the law itself is wrong so far from its runs is in neither; `backtest` and `extrapolation` look at that.
        """
        of_law = self.expected(N, D)
        doubt = math.log(of_law.ci_high / of_law.value)
        half = math.hypot(doubt, self.t * self.fit.residual_sd)
        return Interval(of_law.value, of_law.value * math.exp(-half), of_law.value * math.exp(half))


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def bootstrap(
    observations: Sequence[Observation], fitted: Fit | None = None, refits: int = REFITS
) -> Bootstrap:
    """Refit to `refits` draws of cells, each refit from where the fit to all of them ended. Always the same draws."""
    fitted = fitted or fit(observations)
    ordered = sorted(observations, key=lambda o: (o.N, o.D, o.loss))  # as Problem.of sorts them
    problem = Problem.of(ordered)
    cells = sorted({o.cell for o in ordered})
    row = {cell: i for i, cell in enumerate(cells)}
    drawn = _draws(cells, refits)[:, [row[o.cell] for o in ordered]]
    theta = np.clip(problem.theta(fitted), *power_terms.bounds(problem.y, 2))
    found, _ = power_terms.minimise(
        np.tile(theta, (refits, 1)), problem.x, problem.y, drawn, fitted.delta
    )
    return Bootstrap(fitted, tuple(problem.law(row) for row in found))


def _draws(cells: Sequence[tuple[float, float]], count: int) -> Array:
    """(count, cells): how often each cell is drawn. A draw that five parameters cannot be fitted to is drawn again."""
    rng = np.random.default_rng(0)
    size, tokens = (np.array(levels([cell[i] for cell in cells])) for i in (0, 1))
    kept: list[Array] = []
    while len(kept) < count:
        draw = np.bincount(rng.integers(len(cells), size=len(cells)), minlength=len(cells)).astype(
            np.float64
        )
        seen = draw > 0
        if len(set(size[seen])) >= SIZES and len(set(tokens[seen])) >= BUDGETS and seen.sum() >= 5:
            kept.append(draw)
    return np.stack(kept)


# -- what the answer leans on -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variation:
    """The fit with one thing changed: none, and the reason, where too little is left to fit."""

    changed: str
    law: Law | None
    reason: str = ""


def sensitivity(observations: Sequence[Observation], delta: float = DELTA) -> list[Variation]:
    """The fit for other deltas, and without each size and each budget in turn, from the smallest up."""
    found = [
        _variation("least squares" if d == math.inf else f"delta {d:g}", observations, d)
        for d in DELTAS
    ]
    sizes = levels([o.N for o in observations])
    kind, budget = budgets(observations)
    for letter, groups, values in (("N", sizes, [o.N for o in observations]),
                                   (kind, budget, [getattr(o, kind) for o in observations])):  # fmt: skip
        for group in range(max(groups) + 1):
            value = min(value for value, g in zip(values, groups, strict=True) if g == group)
            kept = [o for o, g in zip(observations, groups, strict=True) if g != group]
            found.append(_variation(f"without {letter} = {value:.3g}", kept, delta))
    return found


def _variation(changed: str, observations: Sequence[Observation], delta: float) -> Variation:
    try:
        return Variation(changed, fit(observations, delta))
    except InputError as error:
        return Variation(changed, None, str(error))


# -- what it would have predicted -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """A run's loss, as it was predicted and as it came out."""

    run: Observation
    predicted: Interval

    @property
    def relative_error(self) -> float:
        return self.predicted.value / self.run.loss - 1

    @property
    def inside(self) -> bool:
        return self.run.loss in self.predicted


@dataclass(frozen=True)
class Backtest:
    """The largest compute, predicted from all smaller ones."""

    fit: Fit  # to the smaller ones
    forecasts: tuple[Forecast, ...]

    @property
    def error(self) -> float:
        """Mean absolute relative error of the loss."""
        return math.fsum(abs(forecast.relative_error) for forecast in self.forecasts) / len(
            self.forecasts
        )

    @property
    def inside(self) -> int:
        """How many of the forecasts hold the run in their interval."""
        return sum(forecast.inside for forecast in self.forecasts)

    @property
    def factor(self) -> float:
        """How many times the compute of the largest run that it was fitted to the largest of the others has."""
        return max(forecast.run.C for forecast in self.forecasts) / self.fit.largest_C


def backtest(observations: Sequence[Observation], delta: float = DELTA) -> Backtest:
    """Fit all runs but those of the largest compute, and predict these. InputError where too few runs are left."""
    largest = max((o.C for o in observations), default=0.0)
    kept = [o for o in observations if largest / o.C >= ALIKE]
    held_out = [o for o in observations if largest / o.C < ALIKE]
    try:
        boot = bootstrap(kept, fit(kept, delta))
    except InputError as error:
        raise InputError(f"without its largest compute, {largest:.3g} FLOPs: {error}") from None
    return Backtest(boot.fit, tuple(Forecast(o, boot.prediction(*o.cell)) for o in held_out))
