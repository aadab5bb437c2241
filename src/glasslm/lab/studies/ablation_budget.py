"""The time of an ablation: steps that fit a budget, and the budget that some steps need."""

from __future__ import annotations

from collections.abc import Sequence

from glasslm.config.schema import RunConfig
from glasslm.lab.studies import sweep
from glasslm.lab.studies.ablation_axes import Match
from glasslm.lab.studies.study_plan import run_start_seconds
from glasslm.text import format_duration, plural
from glasslm.training.plan import LONG_RUN_S

PLANNED_SHARE = 0.8  # of a budget: larger models are slower per FLOP, and evaluations take time too


def relative_costs(
    base: RunConfig, others: Sequence[RunConfig], match: Match, vocab_size: int
) -> list[float]:
    """The cost of each run in runs of the baseline, which comes first.

    The cost is the ratio of FLOPs, or 1 if the times are equal.
    """
    costs = [sweep.run_flops(config, vocab_size) for config in (base, *others)]
    return [1.0 if match == "time" else cost / costs[0] for cost in costs]


def affordable_steps(
    budget_s: float, costs: Sequence[float], runs_each: int, workers: int, step_s: float
) -> int:
    """The number of baseline steps with which all runs, `workers` at once, fit the budget."""
    per_step = step_s * sum(costs) * runs_each
    starts_s = run_start_seconds() * len(costs) * runs_each
    return max(0, int((PLANNED_SHARE * budget_s * workers - starts_s) / per_step))


def describe_length(
    steps: int, costs: Sequence[float], runs_each: int, workers: int, step_s: float
) -> str:
    """The runs and the expected time of a study without a budget, with a cure for a long one."""
    seconds = PLANNED_SHARE * required_seconds(steps, costs, runs_each, workers, step_s)
    cure = ": --budget 1h makes it fit into an hour" if seconds > LONG_RUN_S else ""
    return (
        f"{plural(len(costs) * runs_each, 'run')}, {plural(steps, 'step')} of the baseline each, "
        f"{workers} at once, about {format_duration(seconds)}{cure}"
    )


def required_seconds(
    steps: int, costs: Sequence[float], runs_each: int, workers: int, step_s: float
) -> float:
    """The budget that allows this number of baseline steps: the inverse of affordable_steps."""
    starts_s = run_start_seconds() * len(costs) * runs_each
    return (steps * step_s * sum(costs) * runs_each + starts_s) / (PLANNED_SHARE * workers)
