"""A scaling study: tune rates, train a ladder, fit a law, predict a run, train that run."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glasslm import files
from glasslm.config.conversion import from_dict, to_dict
from glasslm.config.schema import RunConfig
from glasslm.errors import InputError
from glasslm.lab.scaling import fit_report
from glasslm.lab.scaling.analysis import Analysis, analyse_runs
from glasslm.lab.scaling.law import Interval, Observation
from glasslm.lab.scaling.plan import repetition_warning
from glasslm.lab.scaling.uncertainty import Bootstrap, Forecast
from glasslm.lab.studies import sweep
from glasslm.lab.studies.ladder import (
    EXTRAPOLATION_FACTOR,
    FULL_LADDER,
    RATE_MULTIPLES,
    Ladder,
    LadderShape,
    extrapolation_run,
    matmul_parameters,
    tuning_trials,
)
from glasslm.lab.studies.ladder_budget import plan_ladder, restore_ladder
from glasslm.lab.studies.measures import MeasureName, fitted_value
from glasslm.lab.studies.study_plan import read_plan, with_rate_and_seed
from glasslm.lab.studies.sweep import Runner, Trial, TrialOutcome
from glasslm.lab.studies.trial_results import TrialResult, describe_sample, read_trial
from glasslm.text import Notify

PREDICTION = "prediction.json"
ERROR_RATE_NOTE = (
    "Each loss on this page is the share of held-out answers that are wrong, counted as "
    "(wrong + 1/2) / (answers + 1). A law is fitted to this error rate, never to accuracy, which "
    "ends at 1. The verdict says whether the error rate follows a law at all: answers that are "
    "learned suddenly do not."
)

TrainTrials = Callable[[list[Trial]], dict[str, TrialOutcome]]


@dataclass(frozen=True)
class RateTrials:
    """The learning rates that were tried at one size."""

    N: int
    pairs: tuple[tuple[float, float | None], ...]  # (rate, loss); None if the run diverged
    best: float
    at_edge: bool  # the best rate is the largest or the smallest that was tried


@dataclass(frozen=True)
class LearningRateRule:
    """The learning rate as a power of N, through the best rates of three sizes."""

    trials: tuple[RateTrials, ...]
    slope: float
    intercept: float

    def rate(self, N: float) -> float:
        """The learning rate of a size, between the smallest and the largest rate tried."""
        tried = [rate for trial in self.trials for rate, _ in trial.pairs]
        return float(
            np.clip(math.exp(self.intercept + self.slope * math.log(N)), min(tried), max(tried))
        )


@dataclass(frozen=True)
class LadderRun:
    """A run of the ladder with its result."""

    N: int
    D: int
    rate: float
    result: TrialResult
    measure: MeasureName = "loss"

    @property
    def observation(self) -> Observation | None:
        """The run as the fit needs it; None if it diverged or failed."""
        loss = fitted_value(self.result, self.measure)
        return None if loss is None else Observation(self.N, self.D, loss, seed=self.result.seed)


def tune_rates(ladder: Ladder, train: TrainTrials) -> LearningRateRule:
    """The rule through the best rates of three sizes."""
    trials = tuning_trials(ladder)
    outcomes = train(list(trials.values()))
    tried = []
    for N in sorted({N for N, _ in trials}):
        rates = {multiple: trials[N, multiple].config.optimizer.lr for multiple in RATE_MULTIPLES}
        pairs = tuple(
            (rates[multiple], read_trial(0, outcomes[trials[N, multiple].name]).final_loss)
            for multiple in RATE_MULTIPLES
        )
        tried.append(RateTrials(N, pairs, *best_rate(pairs)))
    slope, intercept = np.polyfit(
        np.log([trial.N for trial in tried]), np.log([trial.best for trial in tried]), 1
    )
    return LearningRateRule(tuple(tried), float(slope), float(intercept))


def best_rate(pairs: Sequence[tuple[float, float | None]]) -> tuple[float, bool]:
    """The rate at the minimum of a parabola through three losses, and whether it is at the edge.

    The parabola is in the logarithm of the rate. If there is no such minimum, because a rate
    diverged or the losses do not bend upwards, the best rate that was tried.
    """
    ends = min(rate for rate, _ in pairs), max(rate for rate, _ in pairs)
    finite = [(math.log(rate), loss) for rate, loss in pairs if loss is not None]
    if not finite:
        return ends[0], True
    best = min(finite, key=lambda pair: pair[1])[0]
    if len(finite) == 3:
        x, y = zip(*finite)
        c2, c1, _ = np.polyfit(x, y, 2)
        if c2 > 0:
            best = float(np.clip(-c1 / (2 * c2), min(x), max(x)))
    return math.exp(best), any(math.isclose(math.exp(best), end) for end in ends)


def train_ladder(ladder: Ladder, rule: LearningRateRule, train: TrainTrials) -> list[LadderRun]:
    """Train all cells of the ladder, the middle size of each compute with two seeds."""
    V, first = ladder.vocab_size, ladder.base.train.seed
    trials = []
    for k, rung in enumerate(ladder.rungs):
        for i, config in enumerate(rung):
            N = matmul_parameters(config, V)
            for seed in (first, first + 1) if i == len(rung) // 2 else (first,):
                seeded = with_rate_and_seed(config, rule.rate(N), seed)
                trials.append((N, Trial(f"c{k}-n{N}-s{seed}", seeded)))
    outcomes = train([trial for _, trial in trials])
    return [
        LadderRun(
            N,
            trial.config.total_tokens,
            trial.config.optimizer.lr,
            read_trial(trial.config.train.seed, outcomes[trial.name]),
            ladder.measure,
        )
        for N, trial in trials
    ]


# -- the prediction --------------------------------------------------------------------------------


def write_prediction(
    ladder: Ladder, bootstrap: Bootstrap, rule: LearningRateRule, study: Path
) -> dict[str, Any]:
    """Write the predicted loss of the larger run to prediction.json, and return the content.

    It is written before that run exists; an existing file stays.
    """
    path = study / PREDICTION
    if not path.exists():
        V = ladder.vocab_size
        fit = bootstrap.fit
        config = extrapolation_run(ladder, fit.N_opt(EXTRAPOLATION_FACTOR * ladder.largest_C))
        N, D = matmul_parameters(config, V), config.total_tokens
        interval = bootstrap.prediction(N, D)
        files.write_json(
            path,
            {
                "format": 1,
                "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "N": N,
                "D": D,
                "C": 6.0 * N * D,
                "times_largest_C": 6.0 * N * D / fit.largest_C,
                "loss": dataclasses.asdict(interval),
                "runs": fit.n,
                "law": {name: getattr(fit, name) for name in ("E", "A", "alpha", "B", "beta")},
                "config": to_dict(with_rate_and_seed(config, rule.rate(N), ladder.base.train.seed)),
            },
        )
    return dict(files.read_json(path))


def check_prediction(
    prediction: dict[str, Any], train: TrainTrials, measure: MeasureName = "loss"
) -> Forecast | None:
    """Train the predicted run; returns its loss with the prediction, None without a loss."""
    config = from_dict(RunConfig, prediction["config"])
    trial = Trial(f"beyond-n{prediction['N']}-s{config.train.seed}", config)
    loss = fitted_value(read_trial(config.train.seed, train([trial])[trial.name]), measure)
    if loss is None:
        return None
    observed = Observation(prediction["N"], prediction["D"], loss, seed=config.train.seed)
    return Forecast(observed, Interval(**prediction["loss"]))


# -- the whole study -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScalingStudy:
    """A completed study."""

    ladder: Ladder
    rule: LearningRateRule
    runs: list[LadderRun]
    analysis: Analysis
    prediction: dict[str, Any]  # the content of prediction.json


def run_study(
    base: RunConfig,
    budget: str,
    runner: Runner,
    folder: Path,
    notify: Notify,
    command: str = "",
    shapes: Sequence[LadderShape] = FULL_LADDER,
    measure: MeasureName = "loss",
) -> ScalingStudy:
    """Plan, tune, train, fit, predict and check; finished parts are not done again.

    Several runs of the ladder are trained at once, the predicted run by itself with all cores.
    Raises InputError if the budget is too small, if too few runs have a loss, or if any run failed:
    a fit without that run would be another.
    """
    notify("planning the runs (a new study measures the speed of several sizes)")
    ladder = plan_ladder(base, budget, runner, folder, notify, shapes, measure)
    runner = dataclasses.replace(runner, compute=ladder.compute, final_tokens=ladder.final_tokens)
    all_cores_runner = runner.with_all_cores(ladder.compute)

    def train(trials: list[Trial]) -> dict[str, TrialOutcome]:
        outcomes = sweep.run_all(folder, trials, runner, ladder.vocab_size, notify, command)
        sweep.require_results(outcomes)
        return outcomes

    notify("1 of 3: learning rates at three sizes")
    rule = tune_rates(ladder, train)
    notify(f"2 of 3: the ladder, with learning rates proportional to N^{rule.slope:.2f}")
    runs = train_ladder(ladder, rule, train)
    notify("fitting the law")
    analysis = analyse_ladder(ladder, rule, runs)
    prediction = write_prediction(ladder, analysis.bootstrap, rule, folder)
    expected = fit_report.format_interval(Interval(**prediction["loss"]), ".4f")
    notify(
        f"3 of 3: a run of N = {prediction['N']:,} on {prediction['D']:,} tokens, "
        f"{prediction['times_largest_C']:.3g} times the largest compute; the law predicts "
        f"{expected} (written to {folder / PREDICTION})"
    )
    forecast = check_prediction(
        prediction,
        lambda trials: sweep.run_all(
            folder, trials, all_cores_runner, ladder.vocab_size, notify, command
        ),
        ladder.measure,
    )
    analysis = dataclasses.replace(analysis, extrapolation=forecast)
    return ScalingStudy(ladder, rule, runs, analysis, prediction)


def read_study(folder: Path) -> ScalingStudy:
    """A study that has ended, from its folder; nothing is trained.

    Raises InputError where it has not ended.
    """
    saved = read_plan(folder)
    if saved is None or "rungs" not in saved or not (folder / PREDICTION).exists():
        raise InputError(
            f"{folder} holds no finished study of scaling: give the command that began it again"
        )
    ladder = restore_ladder(saved)

    def read(trials: list[Trial]) -> dict[str, TrialOutcome]:
        outcomes = sweep.read_outcomes(folder, trials)
        sweep.require_results(outcomes)
        return outcomes

    rule = tune_rates(ladder, read)
    runs = train_ladder(ladder, rule, read)
    prediction = dict(files.read_json(folder / PREDICTION))
    analysis = analyse_ladder(ladder, rule, runs)
    forecast = check_prediction(prediction, read, ladder.measure)
    analysis = dataclasses.replace(analysis, extrapolation=forecast)
    return ScalingStudy(ladder, rule, runs, analysis, prediction)


def analyse_ladder(ladder: Ladder, rule: LearningRateRule, runs: Sequence[LadderRun]) -> Analysis:
    """The law of the runs, with notes on what limits it.

    Raises InputError if too few runs have a loss.
    """
    analysis = analyse_runs([o for run in runs if (o := run.observation)])
    notes = [
        f"N = {run.N:,} on {run.D:,} tokens diverged; it is missing from the fit"
        for run in runs
        if run.observation is None
    ]
    notes += describe_sample(run.result for run in runs)
    if ladder.measure == "accuracy":
        analysis = dataclasses.replace(analysis, measured="wrong answers, share")
        notes.append(ERROR_RATE_NOTE)
    edges = [f"{trial.N:,}" for trial in rule.trials if trial.at_edge]
    if edges:
        notes.append(
            f"The best learning rate is at the edge of those tried for N = {', '.join(edges)}: a "
            "rate outside may be better."
        )
    if warning := repetition_warning(analysis.runs, ladder.unique_tokens):
        notes.append(warning)
    return dataclasses.replace(analysis, notes=analysis.notes + notes)
