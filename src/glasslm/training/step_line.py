"""The metrics line of a training step."""

from __future__ import annotations

from collections.abc import Mapping

from glasslm.config.schema import OptimizerConfig
from glasslm.engines.protocol import Losses, Update
from glasslm.runs.metrics import StepLine
from glasslm.training.learning_rate import lr_at


def step_line(
    step: int,
    losses: Losses,
    update: Update,
    optimizer: OptimizerConfig,
    max_steps: int,
    measures: Mapping[str, float],
) -> StepLine:
    """The line of `step`, from 1, without `tokens`, `epoch` and `timing`, which the loop counts.

    `measures` are those of preference tuning.
    """
    clip = optimizer.grad_clip
    line: StepLine = {
        "kind": "step",
        "step": step,
        "loss": losses.cross_entropy,
        "lr": lr_at(step - 1, optimizer, max_steps),
        "grad_norm": update.norm,
        "clipped": bool(clip and update.norm > clip),
        "tokens": 0,
        "epoch": 0.0,
    }
    if not update.applied:
        line["skipped"] = True
    if losses.auxiliary:
        line["auxiliary"] = losses.auxiliary
    if losses.experts is not None:  # (layers, E): each expert's share of its layer's choices
        shares = losses.experts / losses.experts.sum(-1, keepdims=True)
        line["experts"] = shares.round(4).tolist()
    if measures:
        line["preference"] = measures
    return line
