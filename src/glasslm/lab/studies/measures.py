"""The measure by which the runs of a study are compared: the loss, or the answers of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from glasslm.config.schema import RunConfig
from glasslm.errors import InputError
from glasslm.lab.statistics import ALPHA, Comparison, compare_losses
from glasslm.lab.studies.trial_results import TrialResult
from glasslm.text import plural

MeasureName = Literal["loss", "accuracy"]


@dataclass(frozen=True)
class Measure:
    """How a measure is called. Lower is better, so accuracy is measured by the wrong answers."""

    title: str
    sentence: str
    column: str
    unit: str  # of a difference
    axis: str


MEASURES: dict[MeasureName, Measure] = {
    "loss": Measure(
        title="Final validation loss",
        sentence="Losses are those of the last weights on the validation text, in nats per token.",
        column="loss",
        unit="nats",
        axis="nats per token",
    ),
    "accuracy": Measure(
        title="Share of wrong answers",
        sentence="The measure is the share of held-out examples whose answer is not exactly right, "
        "by the last weights. Differences are paired over seeds; their standard error is at least "
        "that of counting so many answers.",
        column="wrong answers",
        unit="of the answers",
        axis="share of wrong answers",
    ),
}


def require_measure(name: MeasureName, config: RunConfig) -> None:
    """Raise InputError where the runs have no such measure."""
    if name == "accuracy" and config.data.task is None:
        raise InputError(
            "--measure accuracy counts the answers of a task: give --corpus task:NAME, or leave it "
            "out"
        )


def measured_value(trial: TrialResult, name: MeasureName) -> float | None:
    """The loss of a run or its share of wrong answers; None if it diverged or failed."""
    if name == "loss" or trial.final_loss is None:
        return trial.final_loss
    return None if trial.accuracy is None else 1 - trial.accuracy["share"]


def fitted_value(trial: TrialResult, name: MeasureName) -> float | None:
    """The loss of a run, or its error rate (wrong + 1/2) / (answers + 1).

    A scaling law takes the logarithm, so the error rate must be above 0. None if the run diverged
    or failed.
    """
    if name == "loss" or trial.final_loss is None:
        return trial.final_loss
    if trial.accuracy is None:
        return None
    n = trial.accuracy["of"]
    return (n - trial.accuracy["count"] + 0.5) / (n + 1)


def counting_error(variant: Sequence[TrialResult], baseline: Sequence[TrialResult]) -> float:
    """The standard error of a mean difference of accuracies, from the numbers of answers alone.

    Runs that are all right, or all wrong, would otherwise have no spread and no test. Each share
    counts as (right + 1) / (answers + 2).
    """
    total = 0.0
    for trial in (*variant, *baseline):
        if trial.accuracy is not None:
            n = trial.accuracy["of"]
            share = (trial.accuracy["count"] + 1) / (n + 2)
            total += share * (1 - share) / n
    return math.sqrt(total) / len(variant)


def compare_trials(
    variant: Sequence[TrialResult],
    baseline: Sequence[TrialResult],
    name: MeasureName,
    margin: float | None,
    family: int,
) -> Comparison:
    """The paired comparison, without a test if a run failed: it is missing, not diverged."""
    failed = sum(trial.status == "failed" for trial in (*variant, *baseline))
    if failed:
        n, reason = len(variant), f"{plural(failed, 'run')} failed: see logs/"
        return Comparison(n, 0, 0, ALPHA, family, margin, reason=reason)
    values, baseline_values = (
        [measured_value(trial, name) for trial in trials] for trials in (variant, baseline)
    )
    return compare_losses(
        values,
        baseline_values,
        margin=margin,
        family=family,
        unit=MEASURES[name].unit,
        min_se=counting_error(variant, baseline) if name == "accuracy" else 0.0,
    )
