"""The learning rate as a function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import assert_never

from glasslm.config.schema import OptimizerConfig

WSD_DECAY = 0.2  # share of the steps over which the wsd schedule falls, at the end


def lr_at(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The learning rate of update `step`, 0 .. max_steps - 1.

    A linear warmup (step + 1) / W, at most half of the run long, reaches the peak. Then the
    schedule falls to min_lr at the last step. `constant` stays at the peak, and so does a run of
    one step, which would learn nothing at min_lr.
    """
    lr, low = config.lr, config.min_lr
    warmup = min(config.warmup_steps, max_steps // 2)
    if step < warmup:
        return lr * (step + 1) / warmup
    last = max_steps - 1
    if config.schedule == "constant" or last == 0:
        return lr
    if step >= last:
        return low
    match config.schedule:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (last - warmup)))
            return low + (lr - low) * share
        case "wsd":
            start = max(warmup, last - round(WSD_DECAY * max_steps))
            return lr if step < start else low + (lr - low) * (last - step) / (last - start)
        case _:
            assert_never(config.schedule)
