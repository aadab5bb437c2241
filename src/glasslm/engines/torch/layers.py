"""The layers of the model besides attention: linear with adapters, norms, activations, dropout.

Weights are float32 (float64 for checks) and are cast to the type of the activations, so that
bfloat16 and float16 need no second copy of the model. Norms and softmax compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from glasslm.config.schema import ModelConfig
from glasslm.engines.dropout import drop_threshold
from glasslm.engines.torch.operations import BUILT_IN, Operations, TensorOperation


def upcast(x: Tensor) -> Tensor:
    """x in float32, or as it is in a wider type; any shape."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array of its shape, on the CPU; it may share the tensor's memory."""
    return tensor.detach().cpu().numpy()


def is_compiling_for_cpu(x: Tensor) -> bool:
    """Whether torch.compile is compiling for a CPU, where other forms of an op are faster."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


class Replaceable(nn.Module):
    """A module that computes with the operations of a file where these replace its own."""

    operations: Operations = BUILT_IN


class Linear(nn.Linear, Replaceable):
    """x (..., I) -> x wᵀ + bias, (..., O), in the type of x.

    With an adapter of some `rank` the output is x wᵀ + bias + scale (x aᵀ) bᵀ: LoRA,
    arXiv:2106.09685, equation 3.
    """

    def __init__(
        self, width: int, height: int, bias: bool, rank: int = 0, scale: float = 1.0
    ) -> None:
        super().__init__(width, height, bias)
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, width)) if rank else None
        self.lora_b = nn.Parameter(torch.empty(height, rank)) if rank else None

    def reset_parameters(self) -> None:
        """Do nothing: the engine loads the table's initial values."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        weight = self.weight.to(input.dtype)
        if (replaced := self.operations.get("linear")) is not None:
            y = apply_to_rows(replaced, input, weight)
            return y if bias is None else y + bias
        y = F.linear(input, weight, bias)
        if self.lora_a is None or self.lora_b is None:
            return y
        inner = F.linear(input, self.lora_a.to(input.dtype)) * self.scale
        return y + F.linear(inner, self.lora_b.to(input.dtype))


def apply_to_rows(
    operation: TensorOperation, x: Tensor, *parameters: Tensor, **settings: Any
) -> Tensor:
    """An operation for rows (N, I), applied to x (..., I): (N, O) as (..., O)."""
    y = operation(x.flatten(0, -2), *parameters, **settings)
    return y.view(*x.shape[:-1], y.shape[-1])


def make_linear(c: ModelConfig, name: str, width: int, height: int, bias: bool = False) -> Linear:
    """The matrix `name` of a block, with an adapter if the config asks for one."""
    if c.lora_rank and name in c.adapted_matrices:
        return Linear(width, height, bias, c.lora_rank, c.lora_alpha / c.lora_rank)
    return Linear(width, height, bias)


class Embedding(nn.Embedding, Replaceable):
    """tokens (...) -> rows of the weight (V, D), (..., D)."""

    def forward(self, input: Tensor) -> Tensor:
        if (replaced := self.operations.get("embedding")) is not None:
            return replaced(input.flatten(), self.weight).view(*input.shape, -1)
        return super().forward(input)

    def reset_parameters(self) -> None:
        """Do nothing: the engine loads the table's initial values."""


class RMSNorm(nn.RMSNorm, Replaceable):
    """x (..., D) -> (..., D): arXiv:1910.07467, over the last axis."""

    is_wide = False  # whether it multiplies in the type of the weights instead of that of x

    def __init__(self, width: int, eps: float, operation: str = "rms_norm") -> None:
        """`operation` is its name for a file, which replaces rms_norm."""
        super().__init__(width, eps)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        if (replaced := self.operations.get(self.operation)) is not None:
            rows = upcast(x)
            gain = self.gain().to(rows.dtype)
            return apply_to_rows(replaced, rows, gain, eps=self.eps).to(x.dtype)
        wide = x.to(self.weight.dtype) if self.is_wide else x
        gain = self.gain().to(wide.dtype)
        return F.rms_norm(wide, self.normalized_shape, gain, self.eps).to(x.dtype)

    def gain(self) -> Tensor:
        """What the normalized input is multiplied by, (D,)."""
        return self.weight


@final
class RMSNorm1p(RMSNorm):
    """x (..., D) -> (..., D): RMSNorm with the gain 1 + weight, as in Gemma."""

    is_wide = True  # as Gemma's own code is: in half precision 1 + weight loses small weights

    def gain(self) -> Tensor:
        return self.weight + 1


class LayerNorm(nn.LayerNorm, Replaceable):
    """x (..., D) -> (..., D): arXiv:1607.06450, over the last axis."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__(width, eps, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        if (replaced := self.operations.get("layer_norm")) is not None:
            rows = upcast(input)
            gain = self.weight.to(rows.dtype)
            offset = torch.zeros_like(gain) if self.bias is None else self.bias.to(rows.dtype)
            return apply_to_rows(replaced, rows, gain, offset, eps=self.eps).to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.layer_norm(
            input, self.normalized_shape, self.weight.to(input.dtype), bias, self.eps
        )


NORMS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "rmsnorm": lambda c: RMSNorm(c.d_model, c.norm_eps),
    "layernorm": lambda c: LayerNorm(c.d_model, c.norm_eps, "norm" in c.biased_modules),
    "rmsnorm1p": lambda c: RMSNorm1p(c.d_model, c.norm_eps, "rms_norm_1p"),  # as in NumPy's ops.py
    "none": lambda c: nn.Identity(),
}


def make_norm(c: ModelConfig) -> nn.Module:
    """The norm that the config names, (..., D) -> (..., D)."""
    return NORMS[c.norm](c)


def make_head_norm(c: ModelConfig) -> RMSNorm | None:
    """The norm of queries or keys over a head, with the kind of gain of the other norms.

    It is rms_norm, of the gain 1 + weight with rmsnorm1p, so a file replaces it.
    """
    if not c.qk_norm:
        return None
    kind = RMSNorm1p if c.norm == "rmsnorm1p" else RMSNorm
    return kind(c.head_size, c.norm_eps)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)², any shape. arXiv:2109.08668."""
    return F.relu(x).square()


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU, as in the NumPy engine, any shape. arXiv:1606.08415."""
    if is_compiling_for_cpu(x):
        # 1 + tanh(y) = 2 sigmoid(2y). On CPUs compiled tanh takes over twice as long (docs/log.md).
        u = upcast(x)
        return (u * torch.sigmoid(math.sqrt(8 / math.pi) * (u + 0.044715 * u**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


def gelu_exact(x: Tensor) -> Tensor:
    """GELU with erf, any shape. arXiv:1606.08415."""
    return F.gelu(x)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap), any shape. arXiv:2408.00118."""
    return cap * torch.tanh(x / cap)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu, "geglu": gelu, "geglu_exact": gelu_exact, "gelu": gelu,
    "gelu_exact": gelu_exact, "relu": F.relu, "relu2": relu2,
}  # fmt: skip


def dropout(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """x (B, ...), keys (B,) -> x times the mask of engines/dropout.py, (B, ...)."""
    element = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
    return x * dropout_mask(element, p, keys, x.dtype)


def dropout_mask(element: Tensor, p: float, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, ...), 0 where an element is dropped, else 1 / (1 - p).

    element (...) is the number of each element in its row, keys (B,).
    """
    h = mix_bits(element.to(torch.int32) ^ keys.view(-1, *[1] * element.dim()))
    # The hash is unsigned and PyTorch's integers are signed: both sides are moved by 2^31.
    return ((h ^ -(2**31)) >= drop_threshold(p) - 2**31).to(dtype) * (1 / (1 - p))


def mix_bits(h: Tensor) -> Tensor:
    """murmur3's finalizer of int32 bits, any shape: mix_bits of engines/dropout.py.

    Products wrap around; the masks make the shifts unsigned.
    """
    h = (h ^ ((h >> 16) & 0xFFFF)) * (0x85EBCA6B - 2**32)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)
