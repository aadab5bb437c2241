"""The course of a run as columns, read from metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from glasslm.runs import metrics
from glasslm.runs.metrics import Line

Point = tuple[float, float]  # step, loss


@dataclass(frozen=True)
class History:
    """What metrics.jsonl says, as columns. A number that was not finite is None."""

    steps: list[int] = field(default_factory=list)
    train_losses: list[float | None] = field(
        default_factory=list
    )  # nats per token, one for each of `steps`
    grad_norms: list[float | None] = field(default_factory=list)  # before clipping
    lrs: list[float | None] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    val_losses: list[float | None] = field(
        default_factory=list
    )  # nats per token, one for each of `eval_steps`
    val_bpb: list[float | None] = field(default_factory=list)  # bits per byte
    best_val_loss: float | None = None
    best_step: int | None = None
    status: str | None = None  # how it ended; None while it runs, or when it was killed


def read_history(lines: Iterator[metrics.Line]) -> History:
    steps: list[metrics.Line] = []
    evals: dict[
        int, metrics.Line
    ] = {}  # a second evaluation of a step, on the whole split, replaces the first
    end: metrics.Line = {}
    for line in lines:
        if line["kind"] == "step":
            steps.append(line)
        elif line["kind"] == "eval" and line["split"] == "val":
            evals[line["step"]] = line
        elif line["kind"] in ("resume", "end"):
            end = line
    finite = [line for line in evals.values() if line["loss"] is not None]
    best = min(finite, key=lambda line: line["loss"], default={"step": None, "loss": None})
    return History(
        steps=[line["step"] for line in steps],
        train_losses=[line["loss"] for line in steps],
        grad_norms=[line["grad_norm"] for line in steps],
        lrs=[line["lr"] for line in steps],
        eval_steps=list(evals),
        val_losses=[line["loss"] for line in evals.values()],
        val_bpb=[line["bpb"] for line in evals.values()],
        best_val_loss=end.get("best_loss", best["loss"]),
        best_step=end.get("best_step", best["step"]),
        status=end.get("status"),
    )


def best_eval(lines: Iterable[Line], history: History) -> Line | None:
    """The validation line with the best loss, of several measurements at that step the one that the run counts."""
    evals = [line for line in lines if line["kind"] == "eval" and line.get("split", "val") == "val"]
    finite = [line for line in evals if line.get("loss") is not None]
    counted = [
        line
        for line in finite
        if (line["step"], line["loss"]) == (history.best_step, history.best_val_loss)
    ]
    return counted[-1] if counted else min(finite, key=lambda line: line["loss"], default=None)


def loss_range(points: Sequence[Point]) -> tuple[float, float]:
    """The losses worth showing: not those of the first tenth of the steps so far, whose fall would flatten the rest."""
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not finite:
        return 0.0, 1.0
    start = max(step for step, _ in finite) / 10
    late = [loss for step, loss in finite if step >= start]
    low, high = min(late), max(late)
    margin = max(0.02, 0.05 * (high - low))
    return low - margin, high + margin
