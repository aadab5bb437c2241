"""Numbers of a variant over its seeds, as the report of an ablation shows them.

A loss is what the study measures: with --measure accuracy the share of wrong answers.
"""

from __future__ import annotations

import statistics

from glasslm.lab.studies.ablation import VariantResult


def format_loss(result: VariantResult) -> str:
    """The mean over the seeds, or the reason why there is none."""
    mean = mean_loss(result)
    if mean is not None:
        return f"{mean:.4f}"
    return "failed" if any(trial.status == "failed" for trial in result.trials) else "diverged"


def mean_loss(result: VariantResult) -> float | None:
    """The mean over all seeds; None if one has no loss: the mean of the others would be biased."""
    losses = [loss for loss in result.losses if loss is not None]
    return statistics.mean(losses) if len(losses) == len(result.losses) else None


def loss_spread(result: VariantResult) -> float | None:
    """The standard deviation over seeds."""
    losses = [loss for loss in result.losses if loss is not None]
    return statistics.stdev(losses) if len(losses) > 1 else None


def delta(result: VariantResult) -> float:
    """The mean difference from the baseline; 0 where it is unknown."""
    comparison = result.comparison
    return comparison.delta if comparison and comparison.delta is not None else 0.0


def format_interval(result: VariantResult) -> str:
    """The interval of the difference from the baseline; empty where it is unknown."""
    comparison = result.comparison
    if comparison is None or comparison.ci_low is None or comparison.ci_high is None:
        return ""
    return f"{comparison.ci_low:+.4f} to {comparison.ci_high:+.4f}"
