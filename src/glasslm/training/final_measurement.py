"""The final measurement of a run: its last and its best weights on the same validation windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glasslm.engines.protocol import Engine
from glasslm.inference.evaluation import Score
from glasslm.runs import checkpoint
from glasslm.text import Notify
from glasslm.training.time_limit import OutOfTime

TOO_SLOW = (
    "--max-time leaves no time to measure the last and the best weights on more windows: the best "
    "loss is that of an evaluation during training, with its standard error. `glasslm evaluate RUN "
    "--split val` measures the whole split"
)


def score_last_and_best(
    engine: Engine, run_dir: Path, step: int, score: Callable[[], Score], notify: Notify
) -> dict[int, Score]:
    """The scores of the last weights, of `step`, and of the best ones, by their steps.

    Empty where `score` raises OutOfTime. The engine has the last weights, before and after.
    `notify` receives the names of damaged checkpoints.
    """
    best_step = step
    try:
        scores = {step: score()}
        best = checkpoint.load(run_dir, "best", notify)
        best_step = best.step
        if best_step != step:
            engine.load(best.weights().items())
            scores[best_step] = score()
    except OutOfTime:
        scores = {}
    if best_step != step:
        load_checkpoint(engine, run_dir, step)
    return scores


def load_checkpoint(engine: Engine, run_dir: Path, step: int) -> None:
    """Load the weights and moments of a step into the engine."""
    saved = checkpoint.load(run_dir, step)
    engine.load(saved.state(), saved.position.updates, saved.position.loss_scale)
