"""What a precision means: the types of activations and weights, and float16's loss scale.

The loss scale halves where gradients overflow, and doubles after many updates; other precisions
have the scale 1. arXiv:1710.03740, section 3.2.
"""

from __future__ import annotations

import torch

from glasslm.config.schema import Precision

# The types of activations.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
SCALE_GROWTH_UPDATES = 2000  # updates between attempts at a larger scale
MAX_LOSS_SCALE, MIN_LOSS_SCALE = 2.0**16, 2.0


def master_dtype(precision: Precision) -> torch.dtype:
    """The type of weights, gradients and moments."""
    return torch.float64 if precision == "fp64" else torch.float32


def muon_dtype(precision: Precision) -> torch.dtype:
    """The type of the factors in Muon's products: bfloat16 at bf16, else that of the weights."""
    return torch.bfloat16 if precision == "bf16" else master_dtype(precision)


def initial_loss_scale(precision: Precision, saved: float = 1.0) -> float:
    """The scale of the first step: `saved`, unless that is 1, the scale of another precision."""
    if precision != "fp16":
        return 1.0
    return saved if saved > 1 else MAX_LOSS_SCALE


def next_loss_scale(
    scale: float, precision: Precision, updates: int, is_finite: bool, applied: bool
) -> float:
    """The scale after a step with gradients of the scale `scale`; `updates` counts this step's."""
    if not is_finite:
        return scale / 2 if scale > MIN_LOSS_SCALE else scale
    if precision == "fp16" and applied and updates % SCALE_GROWTH_UPDATES == 0:
        return min(2 * scale, MAX_LOSS_SCALE)
    return scale
