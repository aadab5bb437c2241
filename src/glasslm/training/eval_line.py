"""The metrics line of an evaluation."""

from __future__ import annotations

from glasslm.inference.evaluation import Score
from glasslm.runs.metrics import EvalLine, Split


def eval_line(step: int, score: Score, is_best: bool, split: Split) -> EvalLine:
    """The line of a score, without its timing; a sample's line has its standard error."""
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
    return line
