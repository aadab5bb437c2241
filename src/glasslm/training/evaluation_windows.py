"""How many windows of a validation split an evaluation takes: during training, and at the end."""

from __future__ import annotations

import math

from glasslm.config.schema import RunConfig
from glasslm.model.flops import flops_per_token

EVALUATION_SHARE = 0.02  # of a run's FLOPs, for one pass over the validation split
FINAL_SHARE = 0.1  # of the time left or of a run's FLOPs, for the final measurement
FINAL_PASSES = 2  # the final measurement takes the last and the best weights
SHORT_FLOPS = 5e11  # of a final measurement that takes 5 to 15 s on two cores: it is never sampled


def evaluation_windows(config: RunConfig, val_tokens: int) -> int | None:
    """The number of validation windows of an evaluation during training; None for the whole split.

    The whole split is used where its forward pass, a third of a training step's FLOPs, is cheap,
    and always for the answers of conversations.
    """
    if config.data.chat is not None:
        return None
    max_windows = max_evaluation_windows(config)
    return None if val_tokens - 1 <= max_windows * config.model.block_size else max_windows


def max_evaluation_windows(config: RunConfig) -> int:
    """The most windows that one evaluation during training may take."""
    return max(32, int(3 * EVALUATION_SHARE * config.train.max_steps * config.train.batch_size))


def count_windows(config: RunConfig, val_tokens: int) -> int:
    """The number of windows of the whole split."""
    return math.ceil((val_tokens - 1) / config.model.block_size)


def final_windows(
    config: RunConfig, val_tokens: int, vocab_size: int, max_share: float = 1.0
) -> int | None:
    """The windows of the final measurement of a run without a time limit; None for the whole split.

    The split is sampled where its measurement is long and would take more than `max_share` of the
    training. The rule compares FLOPs, not seconds, so that equal runs measure equal windows.
    """
    forward_flops = flops_per_token(config.model, vocab_size) / 3
    if FINAL_PASSES * val_tokens * forward_flops <= SHORT_FLOPS:
        return None
    if evaluation_windows(config, val_tokens) is None:
        return None
    training_windows = 3 * config.train.max_steps * config.train.batch_size  # forward passes
    if FINAL_PASSES * count_windows(config, val_tokens) <= max_share * training_windows:
        return None
    return max(max_evaluation_windows(config), int(FINAL_SHARE * training_windows / FINAL_PASSES))


def windows_of(tokens: int | None, config: RunConfig) -> int | None:
    """The number of windows with these tokens; None, for the whole split, stays None."""
    return None if tokens is None else max(1, tokens // config.model.block_size)


def second_measurement_windows(
    config: RunConfig, val_tokens: int, n_final: int | None
) -> int | None:
    """The windows on which the last and the best weights are measured again; None: on none.

    They are not measured again where evaluations during training take all of those windows.
    """
    sampled = evaluation_windows(config, val_tokens)
    if sampled is None or (n_final is not None and n_final <= sampled):
        return None
    return count_windows(config, val_tokens) if n_final is None else n_final
