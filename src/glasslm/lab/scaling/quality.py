"""How far a fitted scaling law can be trusted: a verdict, with each reason that lowers it.

good      predictions within the tested range are reliable
usable    the law describes the runs; some of its numbers are uncertain
doubtful  the runs do not support the law, or do not determine it
worthless the law explains the losses no better than their mean does
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glasslm.lab.scaling.law import Fit, Interval, Observation
from glasslm.lab.scaling.uncertainty import Backtest, Bootstrap
from glasslm.text import plural

FitVerdict = Literal["good", "usable", "doubtful", "worthless"]
VERDICTS: tuple[FitVerdict, ...] = ("good", "usable", "doubtful", "worthless")

# Limits of (usable, doubtful) verdicts.
MAX_UNEXPLAINED = (0.02, 0.1)  # 1 - adjusted R^2
MAX_RESIDUAL = (0.01, 0.05)  # spread of the residuals, of the loss
MAX_EXPONENT_RATIO = (3.0, 8.0)  # upper to lower end of the interval of alpha or beta
MAX_EXPONENT_WIDTH = (0.25, 0.5)  # of the interval of a
MAX_BACKTEST_ERROR = (0.03, 0.1)
MAX_INTERVAL_WIDTH = 0.3  # of a predicted loss; in wider intervals any loss is inside
WORTHLESS_R2, WORTHLESS_P = 0.5, 0.05
OUTLIER_DEVIATIONS = 5.0  # robust standard deviations
LACK_OF_FIT_P = 0.01
MIN_ONE_SIDED_RUNS = 3
NEAR_LARGEST = 5.0  # runs with at least a fifth of the largest compute
MIN_BIAS_ERRORS = 3.0  # standard errors of the mean residual at the largest compute


@dataclass(frozen=True)
class Outlier:
    """A run whose loss is far from the law; `residual` is relative to the law's loss."""

    run: Observation
    residual: float


@dataclass(frozen=True)
class Quality:
    """The verdict on a fit, the numbers that it rests on, and its reasons, the worst first."""

    verdict: FitVerdict
    reasons: tuple[str, ...]
    r2: float  # of the log losses, adjusted for five parameters
    residual_percent: float  # standard deviation of the residuals, in % of the loss
    lack_of_fit_p: float | None  # None where no cell has two runs
    outliers: tuple[Outlier, ...]

    @property
    def sentence(self) -> str:
        """The verdict and what it rests on."""
        numbers = (
            f"the law explains {max(self.r2, 0):.2%} of the variance of the log losses, and the "
            f"residuals are {self.residual_percent:.2g}% of the loss"
        )
        reasons = "".join(f"; {reason}" for reason in self.reasons)
        return f"The fit is {self.verdict}: {numbers}{reasons}."


def judge_fit(
    bootstrap: Bootstrap, runs: Sequence[Observation], tests: Sequence[Backtest]
) -> Quality:
    """The verdict on a fit to `runs`, with backtests at several horizons."""
    fit = bootstrap.fit
    residuals = np.array([math.log(run.loss / fit.loss(run.N, run.D)) for run in runs])
    r2, p = _explained(fit, runs, residuals)
    lack_of_fit_p = _lack_of_fit(fit, runs, residuals)
    outliers = _outliers(runs, residuals)
    found = [
        *_judge_explained(r2, p, fit),
        *_judge_parameters(bootstrap, min(run.loss for run in runs)),
        *_judge_largest_compute(fit, runs, residuals),
        *_judge_backtests(tests),
    ]
    if lack_of_fit_p is not None and lack_of_fit_p < LACK_OF_FIT_P:
        grade = 1 if fit.residual_sd < MAX_RESIDUAL[0] else 2
        found.append(
            (
                grade,
                "the law misses the means of repeated runs by more than their noise "
                f"(lack of fit, p = {lack_of_fit_p:.2g})",
            )
        )
    if outliers:
        listed = ", ".join(
            f"N = {o.run.N:.3g}, D = {o.run.D:.3g} ({o.residual:+.1%})" for o in outliers[:3]
        )
        found.append((1, f"{plural(len(outliers), 'run')} far from the law: {listed}"))
    found.sort(key=lambda reason: -reason[0])
    return Quality(
        VERDICTS[max((grade for grade, _ in found), default=0)],
        tuple(reason for _, reason in found),
        r2,
        100 * fit.residual_sd,
        lack_of_fit_p,
        tuple(outliers),
    )


Reason = tuple[int, str]  # index in VERDICTS, and a part of a sentence


def _grade(value: float, limits: tuple[float, float]) -> int:
    """The index of the verdict for a value that should be small."""
    return sum(not value <= limit for limit in limits)


def _explained(fit: Fit, runs: Sequence[Observation], residuals: np.ndarray) -> tuple[float, float]:
    """Adjusted R^2 of the log losses, and p of an F test against a constant loss."""
    from scipy.stats import f

    y = np.log([run.loss for run in runs])
    n, cells = len(runs), fit.cells
    total, unexplained = float(((y - y.mean()) ** 2).sum()), float((residuals**2).sum())
    if total == 0:
        return 0.0, 1.0
    if unexplained == 0:
        return 1.0, 0.0
    r2 = 1 - unexplained / total * (n - 1) / max(n - 5, 1)
    ratio = (total - unexplained) / 4 / (unexplained / max(cells - 5, 1))
    return r2, float(f.sf(ratio, 4, max(cells - 5, 1)))


def _judge_explained(r2: float, p: float, fit: Fit) -> Iterator[Reason]:
    if r2 < WORTHLESS_R2 or p > WORTHLESS_P:
        yield 3, f"that is no more than chance or too little to use (F test, p = {p:.2g})"
        return
    grade = _grade(1 - r2, MAX_UNEXPLAINED)
    if grade:
        yield grade, f"{1 - r2:.1%} of the variance is left over"
    grade = _grade(fit.residual_sd, MAX_RESIDUAL)
    if grade:
        yield grade, f"residuals above {MAX_RESIDUAL[grade - 1]:.0%} of the loss"


def _judge_parameters(bootstrap: Bootstrap, lowest_loss: float) -> Iterator[Reason]:
    fit, parameters = bootstrap.fit, bootstrap.parameters()
    for name in ("alpha", "beta"):
        interval = parameters[name]
        grade = _grade(interval.ci_high / max(interval.ci_low, 1e-9), MAX_EXPONENT_RATIO)
        if grade:
            yield grade, f"the runs hardly determine {name}: {_format(interval)}"
        if interval.value > 1:
            yield 2, f"{name} = {interval.value:.3g} is above 1, which no text has shown"
    width = parameters["a"].ci_high - parameters["a"].ci_low
    if grade := _grade(width, MAX_EXPONENT_WIDTH):
        yield grade, f"the optimal size is uncertain: a is {_format(parameters['a'])}"
    E = parameters["E"]
    if E.value > lowest_loss:
        yield 2, f"E = {E.value:.4g} is above the lowest loss of a run, {lowest_loss:.4g}"
    elif E.ci_high - E.ci_low > 0.8 * lowest_loss:
        yield 2, f"the runs do not determine E: {_format(E)}"
    elif E.ci_high - E.ci_low > 0.4 * lowest_loss:
        yield 1, f"E is uncertain: {_format(E)}"
    for warning in fit.warnings:
        yield 2, warning


def _judge_largest_compute(
    fit: Fit, runs: Sequence[Observation], residuals: np.ndarray
) -> Iterator[Reason]:
    """A reason where the runs of the largest compute all lie on one side of the law."""
    top = np.array([fit.largest_C / NEAR_LARGEST < run.C for run in runs])
    largest = residuals[top]
    if len(largest) < MIN_ONE_SIDED_RUNS or len(largest) == len(runs):
        return
    error = fit.residual_sd / math.sqrt(len(largest))
    mean = float(largest.mean())
    if abs(np.sign(largest).sum()) == len(largest) and abs(mean) > MIN_BIAS_ERRORS * error:
        side = "above" if mean > 0 else "below"
        yield (
            2 if abs(mean) > MAX_RESIDUAL[0] else 1,
            f"all {len(largest)} runs near the largest compute are {side} the law, by "
            f"{abs(mean):.2%} in the mean: an extrapolation will miss",
        )


def _judge_backtests(tests: Sequence[Backtest]) -> Iterator[Reason]:
    if not tests:
        yield 1, "no backtest was possible"
        return
    longest = tests[-1]
    if grade := _grade(longest.error, MAX_BACKTEST_ERROR):
        yield (
            grade,
            f"runs with up to {longest.factor:.3g} times the compute are predicted with a mean "
            f"error of {longest.error:.1%}",
        )
    if longest.width > MAX_INTERVAL_WIDTH:
        yield (
            2,
            f"the predicted intervals are {longest.width:.0%} of the loss wide, so that a loss "
            "inside them means nothing",
        )


def _lack_of_fit(fit: Fit, runs: Sequence[Observation], residuals: np.ndarray) -> float | None:
    """p of the F test of lack of fit against the scatter of repeated cells; None without them."""
    from scipy.stats import f

    cells: dict[tuple[float, float], list[float]] = {}
    for run, residual in zip(runs, residuals.tolist()):
        cells.setdefault(run.cell, []).append(residual)
    n, m = len(runs), len(cells)
    pure = sum(float(np.var(values)) * len(values) for values in cells.values())
    if n - m < 2 or m <= 5 or pure <= 0:
        return None
    lack = sum(float(np.mean(values)) ** 2 * len(values) for values in cells.values())
    return float(f.sf(lack / (m - 5) / (pure / (n - m)), m - 5, n - m))


def _outliers(runs: Sequence[Observation], residuals: np.ndarray) -> list[Outlier]:
    """The runs whose residual is far from the others', the farthest first."""
    centred = residuals - np.median(residuals)
    scale = 1.4826 * float(np.median(np.abs(centred)))
    if scale < 1e-9:  # an exact law: only rounding is left
        return []
    far = np.flatnonzero(np.abs(centred) > OUTLIER_DEVIATIONS * scale)
    ordered = sorted(far.tolist(), key=lambda i: -abs(centred[i]))
    return [Outlier(runs[i], math.expm1(residuals[i])) for i in ordered]


def _format(interval: Interval) -> str:
    return f"{interval.value:.3g} ({interval.ci_low:.3g} to {interval.ci_high:.3g})"
