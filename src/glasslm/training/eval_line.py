"""The metrics line of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from glasslm.inference.evaluation import Score
from glasslm.runs.metrics import EvalLine, Split, Timing

NO_MEASURES: Mapping[str, float] = {}  # those of preference tuning, where there is none


def eval_line(
    step: int,
    score: Score,
    is_best: bool,
    split: Split,
    timing: Timing,
    measures: Mapping[str, float] = NO_MEASURES,
) -> EvalLine:
    """The line of a score; a sample's line has its standard error.

    `measures` are those of preference tuning.
    """
    line: EvalLine = {
        "kind": "eval",
        "step": step,
        "split": split,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bpb": score.bpb if score.bytes else None,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "whole": score.whole,
        "best": is_best,
    }
    if not score.whole:
        line["stderr"] = score.stderr
    if score.accuracy is not None:
        line["accuracy"] = score.accuracy.facts
    if score.train_accuracy is not None:
        line["train_accuracy"] = score.train_accuracy.facts
    if measures:
        line["preference"] = measures
    line["timing"] = timing
    return line
