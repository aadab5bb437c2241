"""A try: base and change are trained with the same seeds until their difference is clear.

Pairs are added one batch after another. A try ends when the sequential test tells better from
worse, when an improvement as large as the user cares for is excluded, or when the time or the seeds
are used up.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from glasslm.config.conversion import to_dict, with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.operations import admit_operations
from glasslm.errors import InputError
from glasslm.lab.studies import sweep
from glasslm.lab.studies.ablation_axes import Match, match_budget
from glasslm.lab.studies.study_plan import (
    final_tokens,
    measure_speed,
    prepare_recipe,
    resolve_compute,
    with_rate_and_seed,
    with_sparse_logging,
)
from glasslm.lab.studies.sweep import Runner, Trial
from glasslm.lab.studies.trial_results import TrialResult, describe_sample, read_trial
from glasslm.lab.tries.sequential_test import MIN_PAIRS, Look, look, pairs_needed
from glasslm.text import Notify, format_duration, plural

TryVerdict = Literal["better", "worse", "not_distinguishable", "diverged"]
HIDDEN_FRACTION = 0.1  # of the text, that only --final touches
PLANNED_PAIRS = 8  # for which a budget should suffice
MIN_STEPS = 20
FAILED_TRY = "This try has ended and counts; remove the cause, and the same command is a new try"
BUDGET_SHARE = 0.85  # of the budget, for training; the remainder is for starts and the page


@dataclass(frozen=True)
class Change:
    """A change to be tried: its words, its settings, and the source that trains it."""

    words: str  # as the user gave them
    config: RunConfig
    checkout: str = ""  # of another version of glasslm


@dataclass(frozen=True)
class TrySpec:
    """What decides a try besides its change."""

    alpha: float  # probability of a false "better" of this try
    detect: float  # nats; a smaller improvement does not matter
    max_pairs: int
    budget_s: float | None
    match: Match = "tokens"


@dataclass(frozen=True)
class TryPlan:
    """The runs of a try: base and change at equal tokens, FLOPs or time, without their seeds."""

    base: RunConfig
    change: Change
    spec: TrySpec
    vocab_size: int
    compute: ComputeConfig
    final_tokens: int | None


@dataclass(frozen=True)
class TryResult:
    """The end of a try."""

    plan: TryPlan
    verdict: TryVerdict
    reason: str  # why it ended
    base: list[TrialResult]
    change: list[TrialResult]
    look: Look
    seconds: float

    @property
    def seeds_needed(self) -> int | None:
        """The pairs that would find `detect`, as far as the noise of these pairs tells."""
        if self.look.n < 2:
            return None
        return pairs_needed(self.plan.spec.detect, self.look.sd, self.plan.spec.alpha)

    @property
    def bpb_delta(self) -> float | None:
        """The mean difference in bits per byte; None for a tokenizer that loses text."""
        pairs = [
            (b.bpb, a.bpb)
            for a, b in zip(self.base, self.change)
            if a.bpb is not None and b.bpb is not None
        ]
        return fmean(b - a for b, a in pairs) if pairs else None

    @property
    def facts(self) -> dict[str, Any]:
        """The result for the ledger and for JSON."""
        return {
            "change": self.plan.change.words,
            "verdict": self.verdict,
            "reason": self.reason,
            "delta": self.look.delta,
            "ci_low": self.look.ci_low,
            "ci_high": self.look.ci_high,
            "bpb_delta": self.bpb_delta,
            "seeds": self.look.n,
            "seeds_needed": self.seeds_needed,
            "alpha": self.plan.spec.alpha,
            "e_value": self.look.e_value,
            "detect": self.plan.spec.detect,
            "equal": self.plan.spec.match,
            "steps": self.plan.base.train.max_steps,
            "base_losses": [trial.final_loss for trial in self.base],
            "change_losses": [trial.final_loss for trial in self.change],
            "base_cost": _cost(self.base),
            "change_cost": _cost(self.change),
            "config": to_dict(self.plan.base),
            "change_config": to_dict(self.plan.change.config),
            "seconds": self.seconds,
        }

    def sentences(self) -> list[str]:
        """The verdict in words, its interval, its cost, and what more seeds would tell."""
        spec, estimate = self.plan.spec, self.look
        words = {"not_distinguishable": "not distinguishable"}.get(self.verdict, self.verdict)
        first = f"{self.plan.change.words}: {words}"
        if self.verdict == "diverged":
            return [f"{first}; {self.reason}."]
        interval = (
            f", {1 - 2 * spec.alpha:.1%} interval {estimate.ci_low:+.4f} to {estimate.ci_high:+.4f}"
            if math.isfinite(estimate.ci_low)
            else ", too few pairs for an interval"
        )
        bits = "" if self.bpb_delta is None else f" ({self.bpb_delta:+.4f} bits per byte)"
        result = [
            f"{first}. {estimate.delta:+.4f} nats{bits}{interval}, over "
            f"{plural(estimate.n, 'pair')} of seeds at equal {spec.match}; {self.reason}.",
            _compare_costs(self.base, self.change),
            *describe_sample([*self.base, *self.change]),
        ]
        needed = self.seeds_needed
        if self.verdict == "not_distinguishable" and estimate.sd > 0:
            seeds = "more than 200 pairs" if needed is None else plural(needed, "pair")
            result.append(f"A difference of {spec.detect:g} nats would take about {seeds}.")
        return result


def plan_try(
    base: RunConfig, change: Change, spec: TrySpec, runner: Runner, notify: Notify
) -> TryPlan:
    """Fix the text, the steps and the engine of a try. Raises InputError where nothing differs.

    A part of the text stays hidden for --final.
    """
    if not base.data.test_fraction:
        base = with_flags(base, {"test_fraction": HIDDEN_FRACTION})
    base, dataset = prepare_recipe(base, notify)
    changed = admit_operations(dataclasses.replace(change.config, data=base.data)).resolve()
    if with_sparse_logging(changed) == with_sparse_logging(base) and not change.checkout:
        raise InputError(f"--change '{change.words}' changes nothing: the base has these settings")
    V = dataset.tokenizer.vocab_size
    larger = max((base, changed), key=lambda config: sweep.run_flops(config, V))
    compute = resolve_compute(runner.compute, larger, V)

    def step_seconds(config: RunConfig) -> float:
        return measure_speed(config, compute, dataset).step

    if spec.budget_s is not None:
        notify("measuring the speed of base and change")
        pair_s = step_seconds(base) + step_seconds(changed)
        affordable = BUDGET_SHARE * spec.budget_s * runner.slots / (PLANNED_PAIRS * pair_s)
        steps = min(base.train.max_steps, int(affordable))
        if steps < MIN_STEPS:
            raise InputError(
                f"--budget allows {plural(steps, 'step')} for each of {2 * PLANNED_PAIRS} runs, "
                f"expected {MIN_STEPS} or more: give more time, or a smaller model"
            )
        base = with_flags(base, {"max_steps": steps})
    changed = match_budget(changed, base, spec.match, V, step_seconds)
    base, changed = with_sparse_logging(base), with_sparse_logging(changed)
    tokens = None if change.checkout else final_tokens(base, dataset)
    return TryPlan(base, dataclasses.replace(change, config=changed), spec, V, compute, tokens)


def run_try(plan: TryPlan, study: Path, runner: Runner, command: str, notify: Notify) -> TryResult:
    """Train pairs until the verdict is clear."""
    began = time.monotonic()
    runner = dataclasses.replace(runner, compute=plan.compute, final_tokens=plan.final_tokens)

    def train(seeds: Sequence[int]) -> tuple[list[TrialResult], list[TrialResult]]:
        sides = [
            [
                Trial(
                    f"{name}-s{seed}", with_rate_and_seed(config, config.optimizer.lr, seed), source
                )
                for seed in seeds
            ]
            for name, config, source in (
                ("base", plan.base, ""),
                ("change", plan.change.config, plan.change.checkout),
            )
        ]
        outcomes = sweep.run_all(
            study, [*sides[0], *sides[1]], runner, plan.vocab_size, notify, command
        )
        sweep.require_results(outcomes, FAILED_TRY)
        base, change = (
            [read_trial(seed, outcomes[trial.name]) for seed, trial in zip(seeds, side)]
            for side in sides
        )
        return base, change

    return collect_pairs(plan, train, lambda: time.monotonic() - began, runner.slots, notify)


def collect_pairs(
    plan: TryPlan,
    train: Callable[[Sequence[int]], tuple[list[TrialResult], list[TrialResult]]],
    elapsed_s: Callable[[], float],
    slots: int,
    notify: Notify,
) -> TryResult:
    """Add pairs, which `train` trains for some seeds, until the try ends."""
    spec, first = plan.spec, plan.base.train.seed
    base: list[TrialResult] = []
    change: list[TrialResult] = []
    batch = max(MIN_PAIRS, slots // 2)
    while True:
        n = min(batch, spec.max_pairs - len(base))
        pairs = train(range(first + len(base), first + len(base) + n))
        base += pairs[0]
        change += pairs[1]
        decision = judge(base, change, spec)
        used_s = elapsed_s()
        if decision.verdict is None:
            pair_s = used_s / len(base)
            batch = max(1, slots // 2)
            if len(base) >= spec.max_pairs:
                decision = decision.ended("not_distinguishable", "all seeds are used")
            elif spec.budget_s is not None and used_s + pair_s * batch > spec.budget_s:
                decision = decision.ended("not_distinguishable", "the time is used up")
        if decision.verdict is not None:
            return TryResult(
                plan, decision.verdict, decision.reason, base, change, decision.look, used_s
            )
        left = ""
        if spec.budget_s is not None:
            left = f", {format_duration(spec.budget_s - used_s)} left"
        notify(
            f"after {plural(len(base), 'pair')}: {decision.look.delta:+.4f} nats, not clear yet"
            + left
        )


@dataclass(frozen=True)
class Decision:
    """The state of a try after some pairs; `verdict` is None while it goes on."""

    verdict: TryVerdict | None
    reason: str
    look: Look

    def ended(self, verdict: TryVerdict, reason: str) -> Decision:
        """This state, ended for another reason."""
        return Decision(verdict, reason, self.look)


def judge(base: Sequence[TrialResult], change: Sequence[TrialResult], spec: TrySpec) -> Decision:
    """The decision after these pairs. A run that diverged ends the try."""
    diverged = sum(trial.final_loss is None for trial in change)
    failed_base = sum(trial.final_loss is None for trial in base)
    differences = [
        b.final_loss - a.final_loss
        for a, b in zip(base, change)
        if a.final_loss is not None and b.final_loss is not None
    ]
    estimate = look(differences, spec.alpha)
    if failed_base:
        raise InputError(
            f"the base diverged in {failed_base} of {len(base)} runs: choose a base that trains, "
            "for instance with a lower --lr"
        )
    if diverged:
        return Decision(
            "diverged", f"the change diverged in {diverged} of {len(change)} runs", estimate
        )
    if estimate.e_value >= 1 / (2 * spec.alpha):
        verdict: TryVerdict = "better" if estimate.delta < 0 else "worse"
        return Decision(verdict, f"clear after {plural(estimate.n, 'pair')}", estimate)
    if estimate.n >= MIN_PAIRS and estimate.sd == 0:
        same = "the losses of all pairs are the same"
        reason = same if estimate.delta == 0 else "all pairs differ by the same"
        return Decision("not_distinguishable", reason, estimate)
    if estimate.ci_low > -spec.detect:
        reason = f"an improvement of {spec.detect:g} nats or more is excluded"
        return Decision("not_distinguishable", reason, estimate)
    return Decision(None, "", estimate)


def _cost(trials: Sequence[TrialResult]) -> dict[str, float | None]:
    memory = [trial.peak_bytes for trial in trials if trial.peak_bytes is not None]
    return {
        "seconds": fmean(trial.wall_s for trial in trials),
        "peak_bytes": max(memory, default=None),
    }


def _compare_costs(base: Sequence[TrialResult], change: Sequence[TrialResult]) -> str:
    a, b = _cost(base), _cost(change)
    seconds = (a["seconds"] or 0.0, b["seconds"] or 0.0)
    text = f"A run took {seconds[1]:.1f} s, the base {seconds[0]:.1f} s"
    if a["peak_bytes"] and b["peak_bytes"]:
        text += (
            f"; peak memory {b['peak_bytes'] / 1e6:.0f} MB, the base {a['peak_bytes'] / 1e6:.0f} MB"
        )
    return text + "."
