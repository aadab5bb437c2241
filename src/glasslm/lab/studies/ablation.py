"""An ablation: a baseline and variants of it, one thing changed at a time, over paired seeds, with honest verdicts.

The seeds of all variants are the same: initial values, order of the text and dropout agree wherever they can, and what
is compared is the difference of each pair. The rules are those of lab/statistics.py, the axes those of axes.py.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from glasslm.config.conversion import from_dict, to_dict, with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import seconds
from glasslm.errors import InputError
from glasslm.lab.statistics import ALPHA, Comparison, Verdict, compare_losses, judge_family
from glasslm.lab.studies import study_setting, sweep
from glasslm.lab.studies.axes import AXES, Match, Variant, left_out, matched, variants
from glasslm.lab.studies.study_setting import (
    TUNING_SEED,
    held_plan,
    hold_plan,
    measured,
    seeded,
    sparing,
    with_engine,
    with_text,
)
from glasslm.lab.studies.sweep import Ended, Runner, Trial
from glasslm.lab.studies.trial_results import Row, row
from glasslm.model.parameters import parameter_table
from glasslm.runs.metrics import plain
from glasslm.text import Say, duration

BASELINE = "baseline"
FEWEST_STEPS = 30
SPARE = 0.8  # of a budget is planned for: larger models are slower per FLOP, and evaluations take time, too


@dataclass(frozen=True)
class Asked:
    """What is to be found out, but for the baseline."""

    axes: tuple[str, ...]
    seeds: int = 3
    match: Match = "tokens"
    margin: float | None = None  # nats that would be too little to matter
    rates: tuple[
        float, ...
    ] = ()  # times a variant's rate, of which each takes its best; () for the rate itself
    budget: str | None = None  # time for the whole study


@dataclass(frozen=True)
class Plan:
    """What a study is about, all that determines its runs."""

    base: RunConfig
    variants: list[Variant]
    asked: Asked
    vocab_size: int
    compute: ComputeConfig  # of each run

    @property
    def seeds(self) -> range:
        first = self.base.train.seed
        return range(first, first + self.asked.seeds)

    @property
    def family(self) -> int:
        return len(self.variants)


@dataclass(frozen=True)
class Result:
    """A variant, or the baseline, over all its seeds."""

    axis: str
    value: str
    config: RunConfig
    parameters: int
    flops: float  # of a whole run
    rate: float
    at_edge: bool  # the best rate is the largest or the smallest that was tried
    rows: list[Row]
    comparison: Comparison | None  # none of the baseline itself
    verdict: Verdict | None

    @property
    def name(self) -> str:
        return BASELINE if self.axis == BASELINE else f"{self.axis} {self.value}"

    @property
    def losses(self) -> list[float | None]:
        return [row.final_loss for row in self.rows]


def plan(base: RunConfig, asked: Asked, runner: Runner, study: Path, say: Say) -> Plan:
    """Fix everything before the first run: the text, the variants, the number of steps. It is written to plan.json.

    What depends on the clock is measured once: a study that goes on reads its plan there. Raises InputError where that
    is of other flags.
    """
    flags = plain([to_dict(base), dataclasses.astuple(asked)])
    if held := held_plan(study, flags):
        return _read_plan(held, asked)
    base, dataset = with_text(base, say)
    V = dataset.tokenizer.vocab_size
    found = variants(asked.axes, base)
    if not found:
        raise InputError("nothing varies: give --axes, of " + ", ".join(AXES))
    for line in left_out(asked.axes, base):
        say(f"note: {line}")
    largest = max((base, *(one.config for one in found)), key=lambda config: sweep.cost(config, V))
    compute = with_engine(runner.compute, largest, V)

    @cache
    def step_seconds(config: RunConfig) -> float:
        return measured(config, compute, dataset).step

    if asked.budget is not None:
        base = _fitting(base, found, asked, runner.slots, V, step_seconds, say)
    base = sparing(base)
    found = [
        variant._replace(
            config=sparing(matched(variant.config, base, asked.match, V, step_seconds))
        )
        for variant in variants(asked.axes, base)
    ]
    listed = [[one.axis, one.value, to_dict(one.config)] for one in found]
    hold_plan(study, flags, {
        "base": to_dict(base), "variants": listed, "vocab_size": V, "compute": to_dict(compute),
    })  # fmt: skip
    return Plan(base, found, asked, V, compute)


def _read_plan(held: dict[str, Any], asked: Asked) -> Plan:
    """A plan as it was made."""
    found = [
        Variant(axis, value, from_dict(RunConfig, config))
        for axis, value, config in held["variants"]
    ]
    compute = from_dict(ComputeConfig, held["compute"])
    return Plan(from_dict(RunConfig, held["base"]), found, asked, held["vocab_size"], compute)


def _fitting(
    base: RunConfig,
    found: Sequence[Variant],
    asked: Asked,
    workers: int,
    vocab_size: int,
    step_seconds: Callable[[RunConfig], float],
    say: Say,
) -> RunConfig:
    """The baseline with as many steps as the whole study has time for."""
    assert asked.budget is not None
    budget_s, each = seconds(asked.budget), asked.seeds + len(asked.rates)
    equal = [matched(one.config, base, asked.match, vocab_size, step_seconds) for one in found]
    costs = costs_of(base, equal, asked.match, vocab_size)
    steps = steps_within(budget_s, costs, each, workers, step_seconds(base))
    several = f"{len(costs) * each} runs"
    if steps < FEWEST_STEPS:
        raise InputError(
            f"{several} within {duration(budget_s)} would have {steps} steps each: give a longer budget, fewer axes or "
            "seeds, or a smaller model"
        )
    say(f"{several}, {steps:,} steps of the baseline each, {workers} at once")
    return with_flags(base, {"max_steps": steps})


def costs_of(
    base: RunConfig, others: Sequence[RunConfig], match: Match, vocab_size: int
) -> list[float]:
    """What each run costs, the baseline's first, in steps of the baseline: by FLOPs, unless the time is equal."""
    each = [sweep.cost(config, vocab_size) for config in (base, *others)]
    return [1.0 if match == "time" else cost / each[0] for cost in each]


def steps_within(
    budget_s: float, costs: Sequence[float], runs_each: int, workers: int, step_s: float
) -> int:
    """How many steps each run may have, so that all are done in time, so many at once."""
    per_step = step_s * sum(costs) * runs_each
    return max(
        0,
        int(
            (SPARE * budget_s * workers - study_setting.START_S * len(costs) * runs_each) / per_step
        ),
    )


def run(made: Plan, study: Path, runner: Runner, command: str, say: Say) -> list[Result]:
    """Train what is not there yet, and judge. The baseline comes first."""
    runner = dataclasses.replace(runner, compute=made.compute)

    def train(trials: list[Trial]) -> dict[str, Ended]:
        return sweep.run_all(study, trials, runner, made.vocab_size, say, command)

    all_of = [Variant(BASELINE, "", made.base), *made.variants]
    rates: dict[str, tuple[float, bool]] = {
        _stem(one): (one.config.optimizer.lr, False) for one in all_of
    }
    if made.asked.rates:
        rates = _tuned(made, all_of, train)
    trials = {
        (_stem(one), seed): Trial(
            f"{_stem(one)}-s{seed}", seeded(one.config, rates[_stem(one)][0], seed)
        )
        for one in all_of
        for seed in made.seeds
    }
    ended = train(list(trials.values()))
    rows = {
        _stem(one): [row(seed, ended[trials[_stem(one), seed].name]) for seed in made.seeds]
        for one in all_of
    }
    return judge(made, rows, rates)


def judge(
    made: Plan, rows: dict[str, list[Row]], rates: dict[str, tuple[float, bool]]
) -> list[Result]:
    """The verdicts over the whole family; `rows` by the stem of their names."""
    comparisons = [_compared(made, rows[_stem(one)], rows[BASELINE]) for one in made.variants]
    judged: list[tuple[Comparison | None, Verdict | None]] = [(None, None)]
    judged += list(zip(comparisons, judge_family(comparisons)))
    found = []
    for one, (comparison, verdict) in zip(
        [Variant(BASELINE, "", made.base), *made.variants], judged
    ):
        size = parameter_table(one.config.model, made.vocab_size).total
        rate, at_edge = rates[_stem(one)]
        flops = sweep.cost(one.config, made.vocab_size)
        found.append(
            Result(
                one.axis,
                one.value,
                one.config,
                size,
                flops,
                rate,
                at_edge,
                rows[_stem(one)],
                comparison,
                verdict,
            )
        )
    return found


def _compared(made: Plan, variant: list[Row], baseline: list[Row]) -> Comparison:
    """A run that failed is missing, which is another thing than one that diverged: then there is no test."""
    failed = sum(row.status == "failed" for row in (*variant, *baseline))
    if failed:
        n, why = len(variant), f"{failed} runs failed: see logs/"
        return Comparison(n, 0, 0, ALPHA, made.family, made.asked.margin, why=why)
    losses, of_baseline = ([row.final_loss for row in of] for of in (variant, baseline))
    return compare_losses(losses, of_baseline, margin=made.asked.margin, family=made.family)


def _tuned(
    made: Plan, all_of: Sequence[Variant], train: Callable[[list[Trial]], dict[str, Ended]]
) -> dict[str, tuple[float, bool]]:
    """Each variant's best rate, on a seed that is not compared, and whether it is the last one that was tried."""
    seed = made.seeds[0] + TUNING_SEED
    trials = {
        (_stem(one), times): Trial(
            f"tune-{_stem(one)}-x{times:g}",
            seeded(one.config, one.config.optimizer.lr * times, seed),
        )
        for one in all_of
        for times in made.asked.rates
    }
    ended = train(list(trials.values()))
    sweep.require_results(ended)
    found = {}
    for one in all_of:
        losses = {
            times: row(seed, ended[trials[_stem(one), times].name]).final_loss
            for times in made.asked.rates
        }
        finite = {times: loss for times, loss in losses.items() if loss is not None}
        best = min(finite, key=finite.__getitem__, default=min(made.asked.rates))
        found[_stem(one)] = (
            one.config.optimizer.lr * best,
            best in (min(made.asked.rates), max(made.asked.rates)),
        )
    return found


def _stem(one: Variant) -> str:
    return BASELINE if one.axis == BASELINE else one.name


COLUMNS = (
    "variant", "axis", "value", "seed", "parameters", "final_val_loss", "best_val_loss", "bpb", "delta", "ci_low",
    "ci_high", "p", "p_holm", "verdict", "wall_s", "step_ms", "peak_bytes",
)  # fmt: skip


def as_csv(results: Sequence[Result]) -> str:
    """ablation_table.csv: a row for each run; from delta to verdict, what holds for the variant as a whole."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        of, verdict = result.comparison, result.verdict
        shared: list[object] = [of.delta, of.ci_low, of.ci_high, of.p] if of else [None] * 4
        shared += [verdict.p_holm, verdict.words] if verdict else [None, "the baseline"]
        for one in result.rows:
            writer.writerow(
                _cell(value)
                for value in (
                    result.name, result.axis, result.value, one.seed, result.parameters, one.final_loss, one.best_loss,
                    one.bpb, *shared, one.wall_s, one.step_ms, one.peak_bytes,
                )
            )  # fmt: skip
    return out.getvalue()


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
