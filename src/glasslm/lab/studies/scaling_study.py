"""A study of scaling: rates tuned by size, a ladder trained, a law fitted, a larger run predicted and then trained."""

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
from glasslm.lab.scaling import fit_report
from glasslm.lab.scaling.checks import Bootstrap, Forecast
from glasslm.lab.scaling.fit_report import Analysis
from glasslm.lab.scaling.law import Interval, Observation
from glasslm.lab.scaling.plan import repeated
from glasslm.lab.studies import ladder, sweep
from glasslm.lab.studies.ladder import (
    BEYOND,
    MULTIPLES,
    SIZES,
    Ladder,
    beyond,
    size_of,
    tokens_of,
    tuning,
)
from glasslm.lab.studies.study_setting import seeded
from glasslm.lab.studies.sweep import Ended, Runner, Trial
from glasslm.lab.studies.trial_results import Row, row
from glasslm.text import Say

PREDICTION = "prediction.json"

Train = Callable[[list[Trial]], dict[str, Ended]]


@dataclass(frozen=True)
class Tried:
    """Learning rates that were tried at one size."""

    N: int
    pairs: tuple[tuple[float, float | None], ...]  # (rate, loss), None of one that diverged
    best: float
    at_edge: bool  # it is the largest or the smallest that was tried


@dataclass(frozen=True)
class RateRule:
    """The learning rate of a size: a power of N through the best rates of three sizes."""

    tried: tuple[Tried, ...]
    slope: float
    intercept: float

    def rate(self, N: float) -> float:
        """Never outside of what was tried."""
        every = [rate for one in self.tried for rate, _ in one.pairs]
        return float(
            np.clip(math.exp(self.intercept + self.slope * math.log(N)), min(every), max(every))
        )


@dataclass(frozen=True)
class Cell:
    """A run of the ladder as it came out."""

    N: int
    D: int
    rate: float
    row: Row

    @property
    def observation(self) -> Observation | None:
        """None where the run diverged or failed."""
        loss = self.row.final_loss
        return None if loss is None else Observation(self.N, self.D, loss, seed=self.row.seed)


def tune(made: Ladder, train: Train) -> RateRule:
    """The best rate of each of three sizes, by a parabola in the logarithm of the rate, and a line through them."""
    trials = tuning(made)
    ended = train(list(trials.values()))
    tried = []
    for N in sorted({N for N, _ in trials}):
        rates = {times: trials[N, times].config.optimizer.lr for times in MULTIPLES}
        pairs = tuple((rates[t], row(0, ended[trials[N, t].name]).final_loss) for t in MULTIPLES)
        tried.append(Tried(N, pairs, *best_rate(pairs)))
    slope, intercept = np.polyfit(
        np.log([one.N for one in tried]), np.log([one.best for one in tried]), 1
    )
    return RateRule(tuple(tried), float(slope), float(intercept))


def best_rate(pairs: Sequence[tuple[float, float | None]]) -> tuple[float, bool]:
    """Where the parabola through three losses over log rate is lowest, and whether that is an end of what was tried.

    Where there is no such parabola, because a rate diverged or the losses do not bend upwards, the best rate tried.
    """
    ends = min(rate for rate, _ in pairs), max(rate for rate, _ in pairs)
    sound = [(math.log(rate), loss) for rate, loss in pairs if loss is not None]
    if not sound:
        return ends[0], True
    best = min(sound, key=lambda pair: pair[1])[0]
    if len(sound) == 3:
        x, y = zip(*sound)
        c2, c1, _ = np.polyfit(x, y, 2)
        if c2 > 0:
            best = float(np.clip(-c1 / (2 * c2), min(x), max(x)))
    return math.exp(best), any(math.isclose(math.exp(best), end) for end in ends)


def run(made: Ladder, rule: RateRule, train: Train) -> list[Cell]:
    """All cells, those in the middle of their compute with a second seed."""
    V, first = made.vocab_size, made.base.train.seed
    trials = []
    for k, rung in enumerate(made.rungs):
        for i, config in enumerate(rung):
            N = size_of(config, V)
            for seed in (first, first + 1) if i == SIZES // 2 else (first,):
                trials.append((N, Trial(f"c{k}-n{N}-s{seed}", seeded(config, rule.rate(N), seed))))
    ended = train([trial for _, trial in trials])
    return [
        Cell(
            N,
            tokens_of(trial.config),
            trial.config.optimizer.lr,
            row(trial.config.train.seed, ended[trial.name]),
        )
        for N, trial in trials
    ]


# -- the prediction ---------------------------------------------------------------------------------------------------


def predict(made: Ladder, boot: Bootstrap, rule: RateRule, study: Path) -> dict[str, Any]:
    """Write down, once and before that run exists, what the law says it will end with; what is written stands."""
    path = study / PREDICTION
    if not path.exists():
        V = made.vocab_size
        config = beyond(made, boot.fit.N_opt(BEYOND * made.largest_C))
        N, D = size_of(config, V), tokens_of(config)
        interval = boot.prediction(N, D)
        fit = boot.fit
        files.write_json(path, {
            "format": 1, "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "N": N, "D": D, "C": 6.0 * N * D, "times_largest_C": 6.0 * N * D / fit.largest_C,
            "loss": dataclasses.asdict(interval), "runs": fit.n,
            "law": {name: getattr(fit, name) for name in ("E", "A", "alpha", "B", "beta")},
            "config": to_dict(seeded(config, rule.rate(N), made.base.train.seed)),
        })  # fmt: skip
    return dict(files.read_json(path))


def check(prediction: dict[str, Any], train: Train) -> Forecast | None:
    """Train what was predicted, and set the loss beside it; None where that run diverged or failed."""
    config = from_dict(RunConfig, prediction["config"])
    trial = Trial(f"beyond-n{prediction['N']}-s{config.train.seed}", config)
    loss = row(config.train.seed, train([trial])[trial.name]).final_loss
    if loss is None:
        return None
    observed = Observation(prediction["N"], prediction["D"], loss, seed=config.train.seed)
    return Forecast(observed, Interval(**prediction["loss"]))


# -- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A study that is over."""

    ladder: Ladder
    rule: RateRule
    cells: list[Cell]
    found: Analysis
    prediction: dict[str, Any]  # prediction.json


def study(
    base: RunConfig, budget: str, runner: Runner, folder: Path, say: Say, command: str = ""
) -> Study:
    """Plan, tune, train, fit, predict, check; what is there already is taken as it is.

    Several runs of the ladder are trained at once, that beyond it alone, with all cores. Raises InputError for a budget
    that is too small, where too few runs ended with a loss, and where any failed: a fit without it would be another.
    """
    made = ladder.plan(base, budget, runner, folder, say)
    runner = dataclasses.replace(runner, compute=made.compute)
    alone = runner.alone(made.compute)

    def train(trials: list[Trial]) -> dict[str, Ended]:
        ended = sweep.run_all(folder, trials, runner, made.vocab_size, say, command)
        sweep.require_results(ended)
        return ended

    say("first, learning rates at three sizes")
    rule = tune(made, train)
    say(f"second, the ladder, with rates that go as N^{rule.slope:.2f}")
    cells = run(made, rule, train)
    found = analyse(made, rule, cells)
    prediction = predict(made, found.boot, rule, folder)
    expected = fit_report.ranged(Interval(**prediction["loss"]), ".4f")
    say(
        f"third, N = {prediction['N']:,} on {prediction['D']:,} tokens, {prediction['times_largest_C']:.3g} times the "
        f"largest compute: the law predicts {expected}, which is written in {folder / PREDICTION}; now it is trained"
    )
    beyond = check(
        prediction,
        lambda trials: sweep.run_all(folder, trials, alone, made.vocab_size, say, command),
    )
    return Study(made, rule, cells, dataclasses.replace(found, beyond=beyond), prediction)


def analyse(made: Ladder, rule: RateRule, cells: Sequence[Cell]) -> Analysis:
    """The law of the cells, and what there is to say against it. InputError where too few runs have a loss."""
    found = fit_report.analyse([o for cell in cells if (o := cell.observation)])
    notes = [
        f"N = {cell.N:,} on {cell.D:,} tokens diverged; it is missing from the fit"
        for cell in cells
        if cell.observation is None
    ]
    edges = [f"{tried.N:,}" for tried in rule.tried if tried.at_edge]
    if edges:
        notes.append(
            f"The best learning rate is the last one tried for N = {', '.join(edges)}: it may lie beyond."
        )
    if told := repeated(found.runs, made.unique_tokens):
        notes.append(told)
    return dataclasses.replace(found, why=found.why + notes)
