"""The exercises, one a module, in the order of a course."""

from __future__ import annotations

import importlib

from glasslm.course.learn.exercise import Exercise
from glasslm.errors import InputError
from glasslm.text import suggest_name

COURSE = (
    "softmax",
    "cross_entropy",
    "embedding",
    "linear",
    "relu",
    "silu",
    "swiglu",
    "gelu",
    "rms_norm",
    "layer_norm",
    "residual",
    "causal_mask",
    "attention",
    "multi_head",
    "gqa",
    "rope",
    "alibi_bias",
    "sinusoidal_positions",
    "tied_logits",
    "dropout",
    "initial_matrix",
    "clip_by_norm",
    "adamw",
    "orthogonalize",
    "muon",
    "learning_rate",
    "sample",
    "train_bpe",
    "encode_bpe",
    "attend_with_cache",
    "flash_step",
    "flash_backward",
    "lora",
    "mixture",
    "perplexity_and_bpb",
    "count_parameters",
    "training_flops",
)


def require_exercise(name: str) -> None:
    """Raise InputError unless there is an exercise of this name."""
    if name not in COURSE:
        hint = suggest_name(name, COURSE) or ": see glasslm learn list"
        raise InputError(f"there is no exercise '{name}'{hint}")


def load_exercise(name: str) -> Exercise:
    """The exercise of this name. Raises InputError where there is none."""
    require_exercise(name)
    exercise: Exercise = importlib.import_module(f"{__name__}.{name}").EXERCISE
    return exercise
