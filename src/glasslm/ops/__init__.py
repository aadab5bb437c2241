"""The operations of the NumPy engine as functions for arrays of any number of axes.

A function with a gradient returns `output, backward`: backward(gradient of the output) returns the
gradients of the inputs in their order. Arrays are float32 or float64, one type a call, and results
have the same type. No function changes its arguments, except the optimizers, which update weights
and moments in place. "..." in a shape is any number of leading axes, also none.

>>> from glasslm import ops
>>> y, backward = ops.relu([[1.0, -2.0, 3.0]])
>>> backward(y).tolist()
[[1.0, 0.0, 3.0]]
"""

from glasslm.ops.array_file import load_checkpoint, save_checkpoint
from glasslm.ops.layers import (
    cross_entropy,
    dropout,
    embedding,
    geglu,
    gelu,
    layer_norm,
    linear,
    relu,
    relu2,
    rms_norm,
    silu,
    softmax,
    swiglu,
)
from glasslm.ops.masked_attention import attention, causal_mask, scaled_dot_product_attention
from glasslm.ops.models import block, initial_weights, sample_batch, transformer
from glasslm.ops.optimizers import (
    adamw,
    clip_by_norm,
    clip_by_value,
    learning_rate,
    muon,
    sgd,
    step_decay,
)
from glasslm.ops.positions import alibi_bias, rope, rope_tables, sinusoidal_positions

__all__ = [
    "adamw",
    "alibi_bias",
    "attention",
    "block",
    "causal_mask",
    "clip_by_norm",
    "clip_by_value",
    "cross_entropy",
    "dropout",
    "embedding",
    "geglu",
    "gelu",
    "initial_weights",
    "layer_norm",
    "learning_rate",
    "linear",
    "load_checkpoint",
    "muon",
    "relu",
    "relu2",
    "rms_norm",
    "rope",
    "rope_tables",
    "sample_batch",
    "save_checkpoint",
    "scaled_dot_product_attention",
    "sgd",
    "silu",
    "sinusoidal_positions",
    "softmax",
    "step_decay",
    "swiglu",
    "transformer",
]
