"""An ablation: a baseline and variants that each change one thing, over paired seeds.

All variants are trained with the same seeds: initial values, batches and dropout agree wherever
they can. What is compared is the difference of each pair. The statistics are those of
lab/statistics.py, the axes those of ablation_axes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from glasslm.config.conversion import from_dict, to_dict, with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration, round_up_duration
from glasslm.errors import InputError
from glasslm.lab.statistics import Comparison, Verdict, judge_family, require_margin
from glasslm.lab.studies import measures, sweep
from glasslm.lab.studies.ablation_axes import (
    AXES,
    Match,
    Variant,
    list_variants,
    match_budget,
    variants,
)
from glasslm.lab.studies.ablation_budget import (
    affordable_steps,
    describe_length,
    relative_costs,
    required_seconds,
)
from glasslm.lab.studies.checkout import AXIS as VERSION_AXIS
from glasslm.lab.studies.checkout import require_checkout, version_name
from glasslm.lab.studies.study_extension import load_or_extend
from glasslm.lab.studies.study_plan import (
    TUNING_SEED_OFFSET,
    final_tokens,
    measure_speed,
    prepare_recipe,
    read_plan,
    resolve_compute,
    save_plan,
    with_rate_and_seed,
    with_sparse_logging,
)
from glasslm.lab.studies.sweep import Runner, Trial, TrialOutcome
from glasslm.lab.studies.trial_results import TrialResult, read_trial
from glasslm.model.parameters import parameter_table
from glasslm.runs.blas import warn_of_slow_kernel
from glasslm.runs.metrics import to_json_types
from glasslm.text import Notify, format_duration, ignore_message, plural

BASELINE = "baseline"
MIN_STEPS = 30  # of the baseline, for a budget of time


@dataclass(frozen=True)
class AblationSpec:
    """What an ablation compares, without the baseline."""

    axes: tuple[str, ...]
    seeds: int = 3
    match: Match = "tokens"
    margin: float | None = None  # nats; a smaller difference does not matter
    rates: tuple[float, ...] = ()  # multiples of a variant's learning rate to try; (): no tuning
    budget: str | None = None  # time for the whole study
    against: str | None = None  # a checkout of another version of glasslm, as one more variant
    measure: measures.MeasureName = "loss"

    @property
    def settings(self) -> list[Any]:
        """The fields for plan.json; the last ones are left out where 0.1.0 did not have them."""
        settings = list(dataclasses.astuple(self))
        return settings if self.measure != "loss" else settings[: -1 if self.against else -2]


@dataclass(frozen=True)
class Plan:
    """Everything that determines the runs of an ablation."""

    base: RunConfig
    variants: list[Variant]
    spec: AblationSpec
    vocab_size: int
    compute: ComputeConfig  # of each run
    final_tokens: int | None = None  # of the final measurement; None: the whole split
    seen_seeds: int | None = None  # of the results that were known when seeds were added

    @property
    def seeds(self) -> range:
        first = self.base.train.seed
        return range(first, first + self.spec.seeds)

    @property
    def axes(self) -> list[str]:
        """The names of the axes that have variants."""
        return list(dict.fromkeys(variant.axis for variant in self.variants))

    @property
    def family_size(self) -> int:
        """The number of comparisons that are judged together."""
        return len(self.variants)

    @property
    def variants_with_baseline(self) -> list[Variant]:
        """The baseline, as the first variant, and all variants."""
        return [Variant(BASELINE, "", self.base), *self.variants]


@dataclass(frozen=True)
class VariantResult:
    """The result of a variant, or of the baseline, over all seeds."""

    axis: str
    value: str
    config: RunConfig
    parameters: int
    flops: float  # of a whole run
    rate: float
    at_edge: bool  # the best rate is the largest or the smallest that was tried
    trials: list[TrialResult]
    comparison: Comparison | None  # None for the baseline
    verdict: Verdict | None
    measure: measures.MeasureName = "loss"

    @property
    def name(self) -> str:
        return BASELINE if self.axis == BASELINE else f"{self.axis} {self.value}"

    @property
    def losses(self) -> list[float | None]:
        """What the study measures of each run: its loss, or its share of wrong answers."""
        return [measures.measured_value(trial, self.measure) for trial in self.trials]


def plan(base: RunConfig, spec: AblationSpec, runner: Runner, study: Path, notify: Notify) -> Plan:
    """Fix the text, the variants and the steps before the first run, and write plan.json.

    Times are measured once: a study that is resumed reads its plan. Raises InputError if that plan
    has other flags, or another engine, device or precision.
    """
    measures.require_measure(spec.measure, base)
    require_margin(spec.margin)
    flags = to_json_types([to_dict(base), spec.settings])
    if saved := load_or_extend(study, flags, runner.compute, notify):
        return _restore_plan(saved, spec)
    if spec.against is not None:
        require_checkout(Path(spec.against))
        other = version_name(Path(spec.against, "src", "glasslm"))
        notify(f"the baseline: commit {version_name()}; {spec.against}: commit {other}")
    elif not variants(spec.axes, base):  # before the text is read
        raise InputError("nothing varies: give --axes, of " + ", ".join(AXES))
    base, dataset = prepare_recipe(base, notify)
    V = dataset.tokenizer.vocab_size
    planned = _list_variants(spec, base, V, notify)
    configs = [base, *(variant.config for variant in planned)]
    largest = max(configs, key=lambda config: sweep.run_flops(config, V))
    compute = resolve_compute(runner.compute, largest, V)
    warn_of_slow_kernel(compute, notify)

    @cache
    def step_seconds(config: RunConfig) -> float:
        if config == base:
            notify("measuring the speed of the baseline")
        return measure_speed(config, compute, dataset).step

    if spec.budget is None:
        matched = [match_budget(c, base, spec.match, V, step_seconds) for c in configs[1:]]
        costs, runs_each = relative_costs(base, matched, spec.match, V), _runs_each(spec)
        steps, step_s = base.train.max_steps, step_seconds(base)
        notify(describe_length(steps, costs, runs_each, runner.slots, step_s))
    else:
        base = _fit_budget(base, planned, spec, runner.slots, V, step_seconds, notify)
    base = with_sparse_logging(base)
    planned = [
        variant._replace(
            config=with_sparse_logging(
                match_budget(variant.config, base, spec.match, V, step_seconds)
            )
        )
        for variant in _list_variants(spec, base, V, ignore_message)
    ]
    # Another version of glasslm may not know how to take a sample.
    measured_tokens = None if spec.against is not None else final_tokens(base, dataset)
    contents = {
        "base": to_dict(base),
        "variants": [[v.axis, v.value, to_dict(v.config), v.checkout] for v in planned],
        "vocab_size": V,
        "compute": to_dict(compute),
        "final_tokens": measured_tokens,
    }
    save_plan(study, flags, contents)
    return Plan(base, planned, spec, V, compute, measured_tokens)


def _list_variants(spec: AblationSpec, base: RunConfig, V: int, notify: Notify) -> list[Variant]:
    """The variants of the axes, and the other version of glasslm with the baseline's config."""
    planned = list_variants(spec.axes, base, spec.match, V, notify)
    if spec.against is not None:
        name = version_name(Path(spec.against, "src", "glasslm"))
        planned.append(Variant(VERSION_AXIS, name, base, str(Path(spec.against).absolute())))
    return planned


def _restore_plan(saved: dict[str, Any], spec: AblationSpec) -> Plan:
    """The plan that plan.json contains."""
    planned = [
        Variant(axis, value, from_dict(RunConfig, config), *checkout)
        for axis, value, config, *checkout in saved["variants"]
    ]
    compute = from_dict(ComputeConfig, saved["compute"])
    base = from_dict(RunConfig, saved["base"])
    spec = dataclasses.replace(spec, seeds=saved.get("seeds", spec.seeds))
    return Plan(
        base,
        planned,
        spec,
        saved["vocab_size"],
        compute,
        saved.get("final_tokens"),
        saved.get("seen_seeds"),
    )


def _runs_each(spec: AblationSpec) -> int:
    """The runs of each variant: its seeds, and one for each learning rate that is tried."""
    return spec.seeds + len(spec.rates)


def _fit_budget(
    base: RunConfig,
    planned: Sequence[Variant],
    spec: AblationSpec,
    workers: int,
    vocab_size: int,
    step_seconds: Callable[[RunConfig], float],
    notify: Notify,
) -> RunConfig:
    """The baseline with as many steps as the budget of the whole study allows."""
    assert spec.budget is not None
    budget_s, runs_each = parse_duration(spec.budget), _runs_each(spec)
    matched = [
        match_budget(variant.config, base, spec.match, vocab_size, step_seconds)
        for variant in planned
    ]
    costs = relative_costs(base, matched, spec.match, vocab_size)
    steps = affordable_steps(budget_s, costs, runs_each, workers, step_seconds(base))
    runs = plural(len(costs) * runs_each, "run")
    if steps < MIN_STEPS:
        # A tenth longer than the measured speed requires, because speeds vary.
        needed_s = required_seconds(MIN_STEPS, costs, runs_each, workers, step_seconds(base))
        smallest = round_up_duration(1.1 * needed_s)
        raise InputError(
            f"{runs} within {format_duration(budget_s)} would have {plural(steps, 'step')} each, "
            f"expected {MIN_STEPS} or more: give --budget {smallest} or more, fewer axes or seeds, "
            "or a smaller model"
        )
    notify(f"{runs}, {plural(steps, 'step')} of the baseline each, {workers} at once")
    return with_flags(base, {"max_steps": steps})


def run(
    plan: Plan, study: Path, runner: Runner, command: str, notify: Notify
) -> list[VariantResult]:
    """Train the runs that have not ended yet, and judge all variants.

    The result of the baseline comes first.
    """
    runner = dataclasses.replace(runner, compute=plan.compute, final_tokens=plan.final_tokens)

    def train(trials: list[Trial]) -> dict[str, TrialOutcome]:
        return sweep.run_all(study, trials, runner, plan.vocab_size, notify, command)

    return _judge_runs(plan, train)


def read(study: Path) -> tuple[Plan, list[VariantResult]]:
    """The plan and the results of a study that has ended; nothing is trained.

    A run that has not ended counts as failed.
    """
    saved = read_plan(study)
    if saved is None or "variants" not in saved:
        raise InputError(f"{study} has no plan of an ablation")
    axes, seeds, match, margin, rates, budget, *against = saved["asked"][1]
    spec = AblationSpec(tuple(axes), seeds, match, margin, tuple(rates), budget, *against)
    plan = _restore_plan(saved, spec)
    return plan, _judge_runs(plan, partial(sweep.read_outcomes, study))


def _judge_runs(
    plan: Plan, train: Callable[[list[Trial]], dict[str, TrialOutcome]]
) -> list[VariantResult]:
    """The results of all variants, whose runs `train` trains or reads."""
    entries = plan.variants_with_baseline
    rates: dict[str, tuple[float, bool]] = {
        _run_stem(entry): (entry.config.optimizer.lr, False) for entry in entries
    }
    if plan.spec.rates:
        rates = _tune_rates(plan, train)
    trials = {
        (stem, seed): Trial(
            f"{stem}-s{seed}",
            with_rate_and_seed(entry.config, rates[stem][0], seed),
            entry.checkout,
        )
        for entry in entries
        for stem in [_run_stem(entry)]
        for seed in plan.seeds
    }
    outcomes = train(list(trials.values()))
    results = {
        stem: [read_trial(seed, outcomes[trials[stem, seed].name]) for seed in plan.seeds]
        for stem in map(_run_stem, entries)
    }
    return judge_variants(plan, results, rates)


def judge_variants(
    plan: Plan, trials: dict[str, list[TrialResult]], rates: dict[str, tuple[float, bool]]
) -> list[VariantResult]:
    """The results with verdicts over the whole family.

    The keys of `trials` and `rates` are "baseline" and the names of the variants; a rate comes with
    whether it is the largest or smallest that was tried.
    """
    declared = plan.spec.measure, plan.spec.margin, plan.family_size
    comparisons = [
        measures.compare_trials(trials[_run_stem(variant)], trials[BASELINE], *declared)
        for variant in plan.variants
    ]
    judged: list[tuple[Comparison | None, Verdict | None]] = [(None, None)]
    judged += list(zip(comparisons, judge_family(comparisons)))
    results = []
    for entry, (comparison, verdict) in zip(plan.variants_with_baseline, judged):
        stem = _run_stem(entry)
        rate, at_edge = rates[stem]
        results.append(
            VariantResult(
                axis=entry.axis,
                value=entry.value,
                config=entry.config,
                parameters=parameter_table(entry.config.model, plan.vocab_size).total,
                flops=sweep.run_flops(entry.config, plan.vocab_size),
                rate=rate,
                at_edge=at_edge,
                trials=trials[stem],
                comparison=comparison,
                verdict=verdict,
                measure=plan.spec.measure,
            )
        )
    return results


def _tune_rates(
    plan: Plan, train: Callable[[list[Trial]], dict[str, TrialOutcome]]
) -> dict[str, tuple[float, bool]]:
    """Each variant's best rate, from a seed that is not compared, and whether it is at the edge."""
    seed = plan.seeds[0] + TUNING_SEED_OFFSET
    multiples = plan.spec.rates
    trials = {
        (_run_stem(entry), multiple): Trial(
            f"tune-{_run_stem(entry)}-x{multiple:g}",
            with_rate_and_seed(entry.config, entry.config.optimizer.lr * multiple, seed),
            entry.checkout,
        )
        for entry in plan.variants_with_baseline
        for multiple in multiples
    }
    outcomes = train(list(trials.values()))
    sweep.require_results(outcomes)
    rates = {}
    for entry in plan.variants_with_baseline:
        stem = _run_stem(entry)
        losses = {
            multiple: read_trial(seed, outcomes[trials[stem, multiple].name]).final_loss
            for multiple in multiples
        }
        finite = {multiple: loss for multiple, loss in losses.items() if loss is not None}
        best = min(finite, key=finite.__getitem__, default=min(multiples))
        at_edge = best in (min(multiples), max(multiples))
        rates[stem] = (entry.config.optimizer.lr * best, at_edge)
    return rates


def _run_stem(variant: Variant) -> str:
    """The first part of the names of a variant's runs."""
    return BASELINE if variant.axis == BASELINE else variant.name
