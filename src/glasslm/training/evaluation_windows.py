"""How much of a validation split an evaluation during training takes."""

from __future__ import annotations

from glasslm.config.schema import RunConfig

EVALUATION_SHARE = 0.02  # of a run's FLOPs, for one pass over the validation split


def evaluation_windows(config: RunConfig, val_tokens: int) -> int | None:
    """The number of validation windows of an evaluation during training; None for the whole split.

    The whole split is used where its forward pass, a third of a training step's FLOPs, is cheap.
    """
    max_windows = max_evaluation_windows(config)
    return None if val_tokens - 1 <= max_windows * config.model.block_size else max_windows


def max_evaluation_windows(config: RunConfig) -> int:
    """The most windows that one evaluation during training may take."""
    return max(32, int(3 * EVALUATION_SHARE * config.train.max_steps * config.train.batch_size))
