"""The analysis of a table of runs: the fitted law, its uncertainty and other approaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glasslm.errors import InputError
from glasslm.lab.scaling import isoflop
from glasslm.lab.scaling.isoflop import Frontier, SizeLaw
from glasslm.lab.scaling.law import (
    HUBER_DELTA,
    Interval,
    Observation,
    fit,
    merge_sizes,
)
from glasslm.lab.scaling.parabolas import fit_parabolas
from glasslm.lab.scaling.quality import Quality, judge_fit
from glasslm.lab.scaling.uncertainty import (
    Backtest,
    Bootstrap,
    Forecast,
    Variation,
    backtests,
    bootstrap,
    sensitivity,
)
from glasslm.runs.metrics import to_json_types
from glasslm.text import Notify, ignore_message, plural

MIN_SIZES_WITH_FLOOR = 5  # for a law of size alone with a floor


@dataclass(frozen=True)
class Analysis:
    """The results for a table of runs; `notes` has the reason for each part that is missing."""

    runs: list[Observation]
    bootstrap: Bootstrap
    quality: Quality
    backtests: list[Backtest]  # by ascending horizon
    variations: list[Variation]
    frontiers: list[Frontier]  # of approaches 1, 2 and 3, without those that could not be used
    equal_tokens: list[Observation]  # the sizes at one number of tokens
    size_laws: list[SizeLaw]  # a power law alone, and with enough sizes one with a floor
    notes: list[str]
    columns: Mapping[str, str] = field(default_factory=dict)  # of the table, by role
    extrapolation: Forecast | None = None  # of a larger run, predicted before it was trained
    measured: str = "validation loss, nats per token"  # what the figures show as loss

    @property
    def backtest(self) -> Backtest | None:
        """The backtest with the longest horizon."""
        return self.backtests[-1] if self.backtests else None


def analyse_runs(
    runs: Sequence[Observation],
    delta: float = HUBER_DELTA,
    equal_exponents: bool = False,
    notify: Notify = ignore_message,
) -> Analysis:
    """All results for a table of runs. Raises InputError if there are too few runs for a law.

    `delta` is that of the Huber loss. `notify` receives what is being done.
    """
    runs, merged = merge_sizes(runs)
    notes: list[str] = [merged] if merged else []
    notify(f"fitting the law to {plural(len(runs), 'run')}")
    refitted = bootstrap(runs, fit(runs, delta, equal_exponents))
    notes += refitted.fit.warnings
    frontiers: list[Frontier] = []
    for approach in (_envelope_frontier, _isoflop_frontier):
        try:
            frontiers.append(approach(runs))
        except InputError as error:
            notes.append(str(error))
    tests: list[Backtest] = []
    equal_tokens = isoflop.interpolate_equal_tokens(runs)
    size_laws: list[SizeLaw] = []
    try:
        notify("predicting the largest runs from the smaller ones")
        tests = backtests(runs, refitted.fit)
    except InputError as error:
        notes.append(f"No backtest: {error}")
    try:
        size_laws.append(isoflop.size_law(equal_tokens))
        if len(equal_tokens) >= MIN_SIZES_WITH_FLOOR:
            size_laws.append(isoflop.size_law(equal_tokens, floor=True))
    except InputError as error:
        notes.append(f"No law of size alone: {error}")
    notes += [
        f"{frontier.approach}: {warning}" for frontier in frontiers for warning in frontier.warnings
    ]
    notes += [f"size alone: {warning}" for warning in (size_laws[0].warnings if size_laws else ())]
    frontiers.append(isoflop.parametric_frontier(refitted))
    notify("fitting without each size and each budget")
    return Analysis(
        runs=list(runs),
        bootstrap=refitted,
        quality=judge_fit(refitted, runs, tests),
        backtests=tests,
        variations=sensitivity(runs, delta, equal_exponents),
        frontiers=frontiers,
        equal_tokens=equal_tokens,
        size_laws=size_laws,
        notes=notes,
    )


def _envelope_frontier(runs: Sequence[Observation]) -> Frontier:
    return isoflop.envelope_frontier(isoflop.training_curves(runs))


def _isoflop_frontier(runs: Sequence[Observation]) -> Frontier:
    """The frontier of an IsoFLOP design; for a grid, from slices of its curves."""
    fitted = fit_parabolas(runs)
    if len(fitted) >= 3:
        return isoflop.isoflop_frontier(fitted)
    return isoflop.isoflop_frontier(fit_parabolas(isoflop.slices(isoflop.training_curves(runs))))


def to_json(analysis: Analysis) -> dict[str, Any]:
    """The content of fit.json."""
    fit, tested, forecast = analysis.bootstrap.fit, analysis.backtest, analysis.extrapolation
    intervals = analysis.bootstrap.parameters()
    inside = f"{tested.inside_count} of {len(tested.forecasts)}" if tested else None
    quality = analysis.quality
    return to_json_types(
        {
            "verdict": quality.verdict,
            "reasons": quality.reasons,
            "r2": quality.r2,
            "residual_percent": quality.residual_percent,
            "lack_of_fit_p": quality.lack_of_fit_p,
            "outliers": [
                {"N": o.run.N, "D": o.run.D, "loss": o.run.loss, "residual": o.residual}
                for o in quality.outliers
            ],
            "columns": analysis.columns,
            "measured": analysis.measured,
            **{name: _interval_json(interval) for name, interval in intervals.items()},
            "eta": _interval_json(analysis.bootstrap.interval(lambda law: law.alpha / 2, log=True))
            if fit.equal_exponents
            else None,
            "objective": fit.objective,
            "method": fit.method,
            "delta": fit.delta,
            "n": fit.n,
            "cells": fit.cells,
            "residual_sd": fit.residual_sd,
            "largest_C": fit.largest_C,
            "backtest_error": tested.error if tested else None,
            "backtest_inside": inside,
            "backtests": [
                {
                    "factor": test.factor,
                    "runs": len(test.forecasts),
                    "error": test.error,
                    "inside": test.inside_count,
                }
                for test in analysis.backtests
            ],
            "tokens_per_parameter": _interval_json(
                analysis.bootstrap.interval(
                    lambda law: law.tokens_per_parameter(fit.largest_C), log=True
                )
            ),
            "beyond": _forecast_json(forecast) if forecast else None,
            "size_alone": [
                {"alpha": _interval_json(law.alpha), "k": law.k, "E": law.E, "r2": law.r2}
                for law in analysis.size_laws
            ],
            "approaches": {
                frontier.approach: {"a": _interval_json(frontier.a), "k": frontier.k}
                for frontier in analysis.frontiers
            },
            "notes": analysis.notes,
        }
    )


def _forecast_json(forecast: Forecast) -> dict[str, Any]:
    return {
        "N": forecast.run.N,
        "D": forecast.run.D,
        "C": forecast.run.C,
        "predicted": _interval_json(forecast.predicted),
        "loss": forecast.run.loss,
        "error": forecast.relative_error,
        "inside": forecast.is_inside,
    }


def _interval_json(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "ci_low": interval.ci_low, "ci_high": interval.ci_high}
