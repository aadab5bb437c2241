"""The learning rate as a function of the step, and nothing else: a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from glasslm.config.schema import OptimizerConfig

WSD_DECAY = 0.2  # share of the steps over which the wsd schedule falls, at the end


def lr_at(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The rate of update `step` = 0 .. max_steps - 1.

    Linear warmup (step + 1) / W to the peak, at most half of the run long; then by schedule down to min_lr, which the
    last step has. `constant` stays at the peak, and so does a run of a single step, which would learn nothing at 0.
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
    if config.schedule == "cosine":
        return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (last - warmup)))
    decay_from = max(warmup, last - round(WSD_DECAY * max_steps))
    return lr if step < decay_from else low + (lr - low) * (last - step) / (last - decay_from)
