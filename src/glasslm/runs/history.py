"""The columns of metrics.jsonl: losses, learning rates, gradient norms and evaluations by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glasslm.runs.metrics import EndLine, EvalLine, Line, ResumeLine, Status, eval_lines, step_lines
from glasslm.text import as_float

Point = tuple[float, float]  # step, loss


@dataclass(frozen=True)
class History:
    """The logged values of a run as columns. A non-finite number is None.

    >>> history = Run("runs/shakespeare-quick").history
    >>> list(zip(history.eval_steps, history.val_losses))[-1]
    (2000, 1.587)
    """

    steps: list[int] = field(default_factory=list)
    train_losses: list[float | None] = field(default_factory=list)  # nats per token, at `steps`
    grad_norms: list[float | None] = field(default_factory=list)  # before clipping, at `steps`
    lrs: list[float | None] = field(default_factory=list)  # at `steps`
    eval_steps: list[int] = field(default_factory=list)
    val_losses: list[float | None] = field(default_factory=list)  # nats per token, at `eval_steps`
    val_bpb: list[float | None] = field(default_factory=list)  # bits per byte, at `eval_steps`
    best_val_loss: float | None = None
    best_step: int | None = None
    status: Status | None = None  # how the run ended; None while it runs or after it was killed


def read_history(lines: Iterable[Line]) -> History:
    """The history of a run from its metrics lines.

    A second evaluation of a step, on the whole split, replaces the first.
    """
    lines = list(lines)
    steps = step_lines(lines)
    evals = {line["step"]: line for line in eval_lines(lines)}
    best = _lowest_loss(evals.values())
    best_step, best_loss = (best["step"], best["loss"]) if best else (None, None)
    last_part: EndLine | ResumeLine | None = None
    for line in lines:
        if line["kind"] == "end" or line["kind"] == "resume":
            last_part = line
    status: Status | None = None
    if last_part is not None and last_part["kind"] == "end":
        best_step, best_loss = last_part["best_step"], last_part["best_loss"]
        status = last_part["status"]
    return History(
        steps=[line["step"] for line in steps],
        train_losses=[line["loss"] for line in steps],
        grad_norms=[line["grad_norm"] for line in steps],
        lrs=[line["lr"] for line in steps],
        eval_steps=list(evals),
        val_losses=[line["loss"] for line in evals.values()],
        val_bpb=[line["bpb"] for line in evals.values()],
        best_val_loss=best_loss,
        best_step=best_step,
        status=status,
    )


def best_eval(lines: Iterable[Line], history: History) -> EvalLine | None:
    """The validation line with the best loss; None where no loss is finite.

    Of several evaluations of the best step, it is the one whose loss the history names.
    """
    evals = [line for line in eval_lines(lines) if line.get("loss") is not None]
    best_point = (history.best_step, history.best_val_loss)
    matches = [line for line in evals if (line["step"], line["loss"]) == best_point]
    return matches[-1] if matches else _lowest_loss(evals)


def sample_note(line: Mapping[str, Any]) -> str:
    """How exact the loss of a sample of the split is, such as "sampled, standard error 0.0123".

    Empty for a loss of the whole split.
    """
    if line.get("whole"):
        return ""
    error = line.get("stderr")  # older versions did not log it
    return "sampled" if error is None else f"sampled, standard error {error:.4f}"


def _lowest_loss(evals: Iterable[EvalLine]) -> EvalLine | None:
    """The first line with the lowest finite loss."""
    finite = [line for line in evals if line["loss"] is not None]
    return min(finite, key=lambda line: as_float(line["loss"]), default=None)


def loss_range(points: Sequence[Point]) -> tuple[float, float]:
    """The range of losses to draw, with a margin.

    The first tenth of the steps is left out: its steep fall would flatten the rest of the curve.
    """
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not finite:
        return 0.0, 1.0
    start = max(step for step, _ in finite) / 10
    late_losses = [loss for step, loss in finite if step >= start]
    low, high = min(late_losses), max(late_losses)
    margin = max(0.02, 0.05 * (high - low))
    return low - margin, high + margin
