"""The uncertainty of a fitted scaling law: intervals, sensitivity to its data, and a backtest.

The in-sample error says nothing about extrapolation, so the main check is `backtest`: the largest
runs, predicted from the others. Exponents have intervals from a bootstrap over cells.
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
    HUBER_DELTA,
    MIN_BUDGETS,
    MIN_SIZES,
    SAME_LEVEL_RATIO,
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

REFITS, REFITS_OF_MANY, MANY_RUNS = 400, 100, 500
HORIZONS = (2.0, 4.0, 10.0, 20.0)  # of backtests, in multiples of compute
MIN_BACKTEST_CELLS = 10  # that must be left for a fit
MAX_VARIATIONS = 12  # sizes, or budgets, that are left out in turn
DELTAS = (1e-4, 1e-3, 1e-2, math.inf)  # of the Huber loss, for the sensitivity


@dataclass(frozen=True)
class Bootstrap:
    """A fit, and the laws of its resampled runs.

    `refits`: cells are drawn with replacement, all seeds of a cell together. `residual_refits`: the
    runs stay, and their losses are those of the fit with residuals drawn from all of them.
    """

    fit: Fit
    refits: tuple[Law, ...]
    residual_refits: tuple[Law, ...]

    def interval(self, quantity: Callable[[Law], float], log: bool = False) -> Interval:
        """The 95% interval of a quantity above 0 that follows from the law.

        With `log` it is symmetric in the logarithm. It is the fit plus or minus Student's t (cells
        - 5 degrees of freedom) times half the range of the middle 68% of the refits, of cells or of
        residuals, whichever range is wider. Percentiles alone are too narrow for a small design,
        and a standard deviation follows the few draws that leave an exponent undetermined.
        """
        scale, unscale = (_bounded_log, _bounded_exp) if log else (float, float)
        value = scale(quantity(self.fit))
        ranges = [
            np.percentile([scale(quantity(law)) for law in laws], [15.87, 84.13])
            for laws in (self.refits, self.residual_refits)
        ]
        half = self.t_quantile * max(float(above - below) for below, above in ranges) / 2
        low = unscale(value - half) if log else max(value - half, 0.0)
        return Interval(unscale(value), low, unscale(value + half))

    @property
    def t_quantile(self) -> float:
        """The 97.5% quantile of Student's t for the fit's degrees of freedom."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.fit.degrees_of_freedom))

    def parameters(self) -> dict[str, Interval]:
        """alpha, beta, A, B, E and a, each with its interval."""
        # E may be 0, which has no logarithm.
        logs = {"alpha": True, "beta": True, "A": True, "B": True, "E": False, "a": False}
        return {name: self.interval(attrgetter(name), log) for name, log in logs.items()}

    def expected_loss(self, N: float, D: float) -> Interval:
        """The law's loss at (N, D): the interval is that of a mean over seeds."""
        return self.interval(lambda law: law.loss(N, D), log=True)

    def prediction(self, N: float, D: float) -> Interval:
        """The final loss of one run of N parameters on D tokens.

        The interval has the uncertainty of the law and the noise of runs. The interval assumes that
        the law holds so far from its runs; `backtest` and an extrapolation test that.
        """
        expected = self.expected_loss(N, D)
        log_half = math.log(expected.ci_high / expected.value)
        half = math.hypot(log_half, self.t_quantile * self.fit.residual_sd)
        return Interval(
            expected.value, expected.value * math.exp(-half), expected.value * math.exp(half)
        )


def _bounded_log(x: float) -> float:
    return math.log(min(max(x, 1e-300), 1e300))


def _bounded_exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def bootstrap(
    observations: Sequence[Observation], fitted: Fit | None = None, refits: int | None = None
) -> Bootstrap:
    """Refit the law to `refits` draws of cells and of residuals, from the parameters of the fit.

    The draws are always the same. By default there are REFITS of each, fewer for many runs.
    """
    fitted = fitted or fit(observations)
    refits = refits or (REFITS if len(observations) <= MANY_RUNS else REFITS_OF_MANY)
    ordered = sorted(
        observations, key=lambda o: (o.N, o.D, o.loss)
    )  # as Problem.from_observations sorts them
    problem = Problem.from_observations(ordered)
    cells = sorted({o.cell for o in ordered})
    cell_index = {cell: i for i, cell in enumerate(cells)}
    weights = _draw_cells(cells, refits)[:, [cell_index[o.cell] for o in ordered]]
    start = np.clip(problem.theta(fitted), *power_terms.bounds(problem.y, 2))
    starts = np.tile(start, (refits, 1))
    losses = _draw_losses(problem, start, refits)
    laws = [
        tuple(
            problem.law(theta)
            for theta in power_terms.minimize(
                starts,
                problem.x,
                y,
                counts,
                fitted.delta,
                fitted.equal_exponents,
                power_terms.REFIT_ITERATIONS,
            )[0]
        )
        for y, counts in ((problem.y, weights), (losses, np.ones_like(weights)))
    ]
    return Bootstrap(fitted, laws[0], laws[1])


def _draw_losses(problem: Problem, theta: Array, count: int) -> Array:
    """(count, n) log losses: those of the law theta (5,), with residuals drawn with replacement.

    The residuals are centred, and scaled because five parameters were fitted to them.
    """
    fitted = power_terms.predict_log_losses(theta[None], problem.x)[0][0]
    residuals = problem.y - fitted
    residuals = (residuals - residuals.mean()) * math.sqrt(problem.n / max(problem.n - 5, 1))
    drawn = np.random.default_rng(1).integers(problem.n, size=(count, problem.n))
    result: Array = fitted + residuals[drawn]
    return result


def _draw_cells(cells: Sequence[tuple[float, float]], count: int) -> Array:
    """(count, cells): how often each draw contains each cell.

    A draw with too few different cells for a fit is redrawn.
    """
    rng = np.random.default_rng(0)
    size, tokens = (np.array(levels([cell[i] for cell in cells])) for i in (0, 1))
    draws: list[Array] = []
    while len(draws) < count:
        draw = np.bincount(rng.integers(len(cells), size=len(cells)), minlength=len(cells)).astype(
            np.float64
        )
        drawn = draw > 0
        n_sizes, n_tokens = len(set(size[drawn])), len(set(tokens[drawn]))
        if n_sizes >= MIN_SIZES and n_tokens >= MIN_BUDGETS and drawn.sum() >= 5:
            draws.append(draw)
    return np.stack(draws)


# -- sensitivity -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variation:
    """The fit with one thing changed; None and the reason, if too little data is left to fit."""

    change: str
    law: Law | None
    reason: str = ""


def sensitivity(
    observations: Sequence[Observation], delta: float = HUBER_DELTA, equal_exponents: bool = False
) -> list[Variation]:
    """The fit for other deltas, and without each size and each budget in turn.

    Of many sizes or budgets, MAX_VARIATIONS that are evenly spaced are left out in turn.
    """
    whole = fit(observations, delta, equal_exponents)
    variations = [
        _vary("least squares" if d == math.inf else f"delta {d:g}", observations, d, whole)
        for d in DELTAS
    ]
    size_levels = levels([o.N for o in observations])
    kind, budget_levels = budgets(observations)
    for letter, groups, values in (
        ("N", size_levels, [o.N for o in observations]),
        (kind, budget_levels, [getattr(o, kind) for o in observations]),
    ):
        n_groups = max(groups) + 1
        n_varied = min(n_groups, MAX_VARIATIONS)
        for group in (i * (n_groups - 1) // max(n_varied - 1, 1) for i in range(n_varied)):
            smallest = min(value for value, g in zip(values, groups, strict=True) if g == group)
            others = [o for o, g in zip(observations, groups, strict=True) if g != group]
            variations.append(_vary(f"without {letter} = {smallest:.3g}", others, delta, whole))
    return variations


def _vary(change: str, observations: Sequence[Observation], delta: float, whole: Fit) -> Variation:
    try:
        return Variation(change, fit(observations, delta, whole.equal_exponents, start=whole))
    except InputError as error:
        return Variation(change, None, str(error))


# -- backtest --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """The predicted and the observed loss of a run."""

    run: Observation
    predicted: Interval

    @property
    def relative_error(self) -> float:
        return self.predicted.value / self.run.loss - 1

    @property
    def is_inside(self) -> bool:
        """Whether the observed loss is inside the predicted interval."""
        return self.run.loss in self.predicted


@dataclass(frozen=True)
class Backtest:
    """The runs with the largest compute, predicted from all smaller ones."""

    fit: Fit  # to the smaller ones
    forecasts: tuple[Forecast, ...]

    @property
    def width(self) -> float:
        """The mean width of the predicted intervals, relative to the predicted losses."""
        widths = [
            (f.predicted.ci_high - f.predicted.ci_low) / f.predicted.value for f in self.forecasts
        ]
        return math.fsum(widths) / len(widths)

    @property
    def error(self) -> float:
        """Mean absolute relative error of the loss."""
        errors = math.fsum(abs(forecast.relative_error) for forecast in self.forecasts)
        return errors / len(self.forecasts)

    @property
    def inside_count(self) -> int:
        """The number of forecasts whose interval contains the observed loss."""
        return sum(forecast.is_inside for forecast in self.forecasts)

    @property
    def factor(self) -> float:
        """The largest predicted compute, in multiples of the largest compute of the fit."""
        return max(forecast.run.C for forecast in self.forecasts) / self.fit.largest_C


def backtests(observations: Sequence[Observation], whole: Fit) -> list[Backtest]:
    """Predict the runs of the largest compute, then those of the last 2 to 20 times of it.

    Each test fits the runs below its horizon alone, as `whole` was fitted; the longest is last. A
    horizon that leaves fewer than MIN_BACKTEST_CELLS cells is left out. Raises InputError if not
    even the largest compute can be held out.
    """
    largest = max((o.C for o in observations), default=0.0)
    tests: list[Backtest] = []
    # Computes are rounded: a level 4 times below the largest is at most 4 times below it.
    for horizon in (SAME_LEVEL_RATIO, *(factor / SAME_LEVEL_RATIO for factor in HORIZONS)):
        smaller = [o for o in observations if largest / o.C >= horizon]
        held_out = [o for o in observations if largest / o.C < horizon]
        is_first = horizon == SAME_LEVEL_RATIO
        if not is_first and (
            len({o.cell for o in smaller}) < MIN_BACKTEST_CELLS
            or (tests and len(held_out) == len(tests[-1].forecasts))
        ):
            continue
        try:
            tests.append(_predict(smaller, held_out, whole))
        except InputError as error:
            if is_first:
                raise InputError(
                    f"without its largest compute, {largest:.3g} FLOPs: {error}"
                ) from None
    return tests


def _predict(
    smaller: Sequence[Observation], held_out: Sequence[Observation], whole: Fit
) -> Backtest:
    refitted = bootstrap(smaller, fit(smaller, whole.delta, whole.equal_exponents), REFITS_OF_MANY)
    forecasts = tuple(Forecast(o, refitted.prediction(*o.cell)) for o in held_out)
    return Backtest(refitted.fit, forecasts)
