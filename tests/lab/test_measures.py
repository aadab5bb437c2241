"""Runs compared by the answers of a task: wrong answers, paired over seeds, with a floor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from glasslm.config.schema import DataConfig, RunConfig
from glasslm.errors import InputError
from glasslm.inference.proportions import Proportion
from glasslm.lab.statistics import judge_family
from glasslm.lab.studies.measures import (
    compare_trials,
    counting_error,
    fitted_value,
    measured_value,
    require_measure,
)
from glasslm.lab.studies.trial_results import TrialResult
from glasslm.runs.run_folder import Run


def trials(*right: int | None, of: int = 2000) -> list[TrialResult]:
    """Runs that answer so many examples; None has diverged."""
    return [
        TrialResult(
            seed=seed,
            status="diverged" if count is None else "finished",
            final_loss=None if count is None else 1.0,
            best_loss=None, bpb=None, wall_s=1.0, step_ms=None, peak_bytes=None, sample="",
            run=Run(Path("nowhere")),
            accuracy=None if count is None else Proportion(count, of).facts,
        )
        for seed, count in enumerate(right)
    ]  # fmt: skip


def test_runs_that_are_all_right_and_all_wrong_differ():
    """Their differences have no spread; without the floor nothing could be said."""
    comparison = compare_trials(trials(0, 0, 0), trials(2000, 2000, 2000), "accuracy", None, 1)
    assert comparison.delta == 1
    (verdict,) = judge_family([comparison])
    assert verdict.kind == "worse"
    assert "1 of the answers" in verdict.words


def test_equal_runs_are_not_distinguishable_instead_of_identical():
    comparison = compare_trials(trials(2000, 2000), trials(2000, 2000), "accuracy", None, 1)
    assert judge_family([comparison])[0].kind == "not distinguishable"


def test_the_floor_is_the_binomial_error_of_the_difference():
    a, b = trials(500, 500, of=1000), trials(250, 250, of=1000)
    expected = math.sqrt(2 * (0.25 + 0.25 * 0.75) / 1000) / 2
    assert counting_error(a, b) == pytest.approx(expected, rel=0.01)


def test_a_spread_over_seeds_above_the_floor_is_kept():
    comparison = compare_trials(
        trials(900, 1000, 1100), trials(800, 700, 1200), "accuracy", None, 1
    )
    differences = [-0.05, -0.15, 0.05]
    mean = sum(differences) / 3
    std = math.sqrt(sum((x - mean) ** 2 for x in differences) / 2)
    assert comparison.se == pytest.approx(std / math.sqrt(3))
    assert comparison.delta == pytest.approx(mean)


def test_a_diverged_run_is_an_outcome():
    comparison = compare_trials(trials(None, 5), trials(3, 4), "accuracy", None, 1)
    assert judge_family([comparison])[0].kind == "diverged"


def test_the_values_of_both_measures():
    (trial,) = trials(1500)
    assert measured_value(trial, "loss") == 1.0
    assert measured_value(trial, "accuracy") == 0.25
    assert fitted_value(trial, "accuracy") == pytest.approx(500.5 / 2001)
    (perfect,) = trials(2000)
    assert fitted_value(perfect, "accuracy") == pytest.approx(0.5 / 2001)


def test_accuracy_needs_a_task():
    with pytest.raises(InputError, match="counts the answers of a task"):
        require_measure("accuracy", RunConfig())
    require_measure("accuracy", RunConfig(data=DataConfig(corpus="task:copy")))
    require_measure("loss", RunConfig())
