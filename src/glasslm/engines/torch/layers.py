"""What the model is made of besides attention. Weights are kept in float32 (float64 for checks) and cast to the type of
the activations, so that bfloat16 and float16 need no second copy of the model; norms and softmax compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasslm.config.schema import ModelConfig
from glasslm.engines.dropout import threshold


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compiled_on_cpu(x: Tensor) -> bool:
    """Whether torch.compile is at work on what computes on a CPU, where other forms of the same are quicker."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


class Linear(nn.Linear):
    """x (..., I) -> x wᵀ + bias (..., O), in the type of x; with an adapter of some `rank`, + scale (x aᵀ) bᵀ.

    The adapter is LoRA's: arXiv:2106.09685, equation 3.
    """

    def __init__(
        self, width: int, height: int, bias: bool, rank: int = 0, scale: float = 1.0
    ) -> None:
        super().__init__(width, height, bias)
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, width)) if rank else None
        self.lora_b = nn.Parameter(torch.empty(height, rank)) if rank else None

    def reset_parameters(self) -> None:
        """Nothing: the engine loads the table's initial values."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        y = F.linear(input, self.weight.to(input.dtype), bias)
        if self.lora_a is None or self.lora_b is None:
            return y
        inner = F.linear(input, self.lora_a.to(input.dtype)) * self.scale
        return y + F.linear(inner, self.lora_b.to(input.dtype))


def linear(c: ModelConfig, name: str, width: int, height: int, bias: bool = False) -> Linear:
    """The matrix `name` of a block, with an adapter if the config asks for one."""
    if c.lora_rank and name in c.adapted_matrices:
        return Linear(width, height, bias, c.lora_rank, c.lora_alpha / c.lora_rank)
    return Linear(width, height, bias)


class Embedding(nn.Embedding):
    """tokens -> rows of the table, or the whole table as `weight`."""

    def reset_parameters(self) -> None:
        """Nothing: the engine loads the table's initial values."""


class RMSNorm(nn.RMSNorm):
    """arXiv:1910.07467, over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """arXiv:1607.06450, over the last axis."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__(width, eps, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.layer_norm(
            input, self.normalized_shape, self.weight.to(input.dtype), bias, self.eps
        )


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)². arXiv:2109.08668."""
    return F.relu(x).square()


def gelu(x: Tensor) -> Tensor:
    """The tanh form, as in the other engine. arXiv:1606.08415."""
    if compiled_on_cpu(x):
        # 1 + tanh(u) = 2 sigmoid(2u), and compiled for CPUs tanh takes more than twice as long (docs/log.md)
        wide = widened(x)
        return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(
            x.dtype
        )
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu, "geglu": gelu, "gelu": gelu, "relu": F.relu, "relu2": relu2,
}  # fmt: skip


def dropout(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """x (B, ...), keys (B,): the mask of engines/dropout.py."""
    element = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
    return x * dropout_mask(element, p, keys, x.dtype)


def dropout_mask(element: Tensor, p: float, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where an element is dropped, else 1 / (1 - p). `element` (...) numbers those of a row, keys (B,): (B, ...)."""
    h = mix(element.to(torch.int32) ^ keys.view(-1, *[1] * element.dim()))
    # The hash is unsigned, PyTorch's integers are signed: moving both sides by 2^31 compares them all the same.
    return ((h ^ -(2**31)) >= threshold(p) - 2**31).to(dtype) * (1 / (1 - p))


def mix(h: Tensor) -> Tensor:
    """murmur3's finaliser as in engines/dropout.py, on int32 bits: products wrap; masks make the shifts unsigned."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * (0x85EBCA6B - 2**32)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)
