"""Operations of a file in the PyTorch engine, and those written for tensors in the NumPy engine.

A function for arrays becomes an autograd.Function: its inputs are copied to the CPU, its results to
the device. A function for tensors runs where the model is; autograd computes its gradients, unless
it returns its own backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasslm.config.schema import RunConfig
from glasslm.engines.learner_file import Function
from glasslm.engines.operation_call import (
    FileOperation,
    call_site,
    describe_value,
    file_operations,
    gradient_inputs,
    output_shape,
)
from glasslm.engines.operations import SIGNATURES, OperationsFile, find_operations
from glasslm.errors import InputError

Array = NDArray[Any]
TensorOperation = Callable[..., Tensor]  # op(*tensors, **settings) -> output, differentiable


class Operations:
    """The operations of a file for the modules of a model, by name."""

    def __init__(self, calls: Mapping[str, FileOperation], uses_torch: bool) -> None:
        self._calls, self._uses_torch, self.site = calls, uses_torch, ""

    def at(self, site: str) -> Operations:
        """The same operations for the module `site`, which messages name."""
        operations = Operations(self._calls, self._uses_torch)
        operations.site = site
        return operations

    def get(self, name: str) -> TensorOperation | None:
        """The operation that replaces `name`; None if the engine's own is used."""
        call = self._calls.get(name)
        if call is None:
            return None
        return partial(apply_to_tensors if self._uses_torch else apply_to_arrays, call, self.site)

    def update(self, name: str) -> Callable[..., None] | None:
        """The optimizer that replaces `name`, for tensors p, g and moments, in place; or None."""
        call = self._calls.get(name)
        if call is None:
            return None
        return partial(_update_tensors if self._uses_torch else _update_arrays, call)

    def __contains__(self, name: str) -> bool:
        return name in self._calls

    def __bool__(self) -> bool:
        return bool(self._calls)


BUILT_IN = Operations({}, False)


def make_operations(config: RunConfig) -> Operations:
    """The operations of a config; InputError where its file is unknown or cannot be used here."""
    operations = find_operations(config)
    if operations is None:
        return BUILT_IN
    return Operations(file_operations(operations), operations.uses_torch)


def require_gradients(parameters: Mapping[str, Tensor], file: str) -> None:
    """Raise InputError where an operation of `file` lets no gradient through to a parameter."""
    for name, parameter in parameters.items():
        if parameter.grad is None:
            raise InputError(
                f"{file}: no gradient reaches {name}: an operation does not depend on it"
            )


# -- functions for arrays --------------------------------------------------------------------------


def apply_to_arrays(op: FileOperation, site: str, *tensors: Tensor, **settings: Any) -> Tensor:
    """An operation for arrays, applied to tensors on any device: a differentiable output."""
    output: Tensor = _ArrayFunction.apply(op, site, settings, *tensors)  # type: ignore[no-untyped-call]
    return output


class _ArrayFunction(torch.autograd.Function):
    """op(*arrays) with its own backward pass, computed on the CPU."""

    @staticmethod
    def forward(
        ctx: Any, op: FileOperation, site: str, settings: dict[str, Any], *tensors: Tensor
    ) -> Tensor:
        places = gradient_inputs(op.name)
        like = tensors[places[0]]
        ctx.site, ctx.name, ctx.count = site, op.name, len(tensors)
        ctx.device, ctx.dtype = like.device, like.dtype
        with call_site(site):
            y, ctx.own_backward = op(*map(_to_array, tensors), **settings)
        return torch.from_numpy(y).to(ctx.device, ctx.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # cross_entropy's gradient is the same number in every row: its losses are summed.
        upstream = float(dy.flatten()[0]) if ctx.name == "cross_entropy" else _to_array(dy)
        with call_site(ctx.site):
            gradients = ctx.own_backward(upstream)
        inputs: list[Tensor | None] = [None] * ctx.count
        for place, gradient in zip(gradient_inputs(ctx.name), gradients):
            inputs[place] = torch.from_numpy(gradient).to(ctx.device, ctx.dtype)
        return None, None, None, *inputs


def _update_arrays(op: FileOperation, *tensors: Tensor, **settings: Any) -> None:
    arrays = [_to_array(tensor) for tensor in tensors]
    op.update(*arrays, **settings)
    for index, (tensor, array) in enumerate(zip(tensors, arrays)):
        if index != 1:  # the gradient
            tensor.copy_(torch.from_numpy(array))


def _to_array(tensor: Tensor) -> Array:
    """A tensor as an array of float32, float64 or integers; memory may be shared."""
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    array: Array = tensor.cpu().numpy()
    return array


# -- functions for tensors -------------------------------------------------------------------------


def apply_to_tensors(op: FileOperation, site: str, *tensors: Tensor, **settings: Any) -> Tensor:
    """An operation for tensors: a differentiable output, checked as arrays are."""
    places = gradient_inputs(op.name)
    if not tensors[0].numel():  # an expert without tokens: its weights get gradients of zero
        like = tensors[places[0]]
        empty = like.new_zeros(output_shape(op.name, tensors))
        return empty + sum(0 * tensors[place].sum() for place in places)
    with call_site(site):
        result, own_backward = _call_with_tensors(op, tensors, settings)
        like = tensors[places[0]]
        fault = _tensor_fault(result, output_shape(op.name, tensors), like.dtype, tensors)
        if fault:
            raise op.fault(fault.format("output"))
        needs_gradient = torch.is_grad_enabled() and any(tensors[i].requires_grad for i in places)
        if own_backward is None:
            if needs_gradient and not result.requires_grad:
                raise op.fault(
                    "returned an output that autograd cannot differentiate: compute it with torch, "
                    "without detach(), or return `output, backward`"
                )
            return result
    if not needs_gradient:
        return result.detach()
    output: Tensor = _OwnBackward.apply(op, site, own_backward, result.detach(), *tensors)  # type: ignore[no-untyped-call]
    return output


def _call_with_tensors(
    op: FileOperation, tensors: tuple[Tensor, ...], settings: dict[str, Any]
) -> tuple[Any, Function | None]:
    """The output, and the file's own backward pass if it returns one."""
    if op.takes_new:
        settings["new"] = lambda shape: torch.empty(
            shape, dtype=tensors[0].dtype, device=tensors[0].device
        )
    versions = [tensor._version for tensor in tensors if not tensor.is_inference()]
    result = op.call(op.function, "", *tensors, **settings)
    if versions != [tensor._version for tensor in tensors if not tensor.is_inference()]:
        raise op.fault("changes an input in place: work on a copy, as in x.clone()")
    if isinstance(result, tuple):
        return op.split_result(result)
    return result, None


def _tensor_fault(
    value: Any, shape: tuple[int, ...], dtype: torch.dtype, inputs: tuple[Any, ...]
) -> str:
    """What is wrong with an output or a gradient, which {} stands for; empty if nothing is."""
    if not isinstance(value, Tensor):
        return f"returned {describe_value(value)} as {{}}: expected a tensor {shape}"
    if tuple(value.shape) != shape:
        return f"returned {{}} with the shape {tuple(value.shape)}: expected {shape}"
    if value.dtype != dtype:
        return f"returned {{}} in {value.dtype}: expected {dtype}, the type of the inputs"
    if (
        bool(value.sum().isnan())
        and bool(value.isnan().any())
        and not any(map(_has_nan_source, inputs))
    ):
        return "returned nan in {}, and the inputs have none"
    return ""


def _has_nan_source(value: Any) -> bool:
    """As `operation_call._has_nan_source`, of a tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    is_huge = (value.abs() > torch.finfo(value.dtype).max ** (1 / 3)) & (value != -torch.inf)
    return bool((value.isnan() | is_huge).any())


class _OwnBackward(torch.autograd.Function):
    """The output of a function for tensors that has its own backward pass."""

    @staticmethod
    def forward(
        ctx: Any, op: FileOperation, site: str, own_backward: Function, y: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.op, ctx.site, ctx.own_backward = op, site, own_backward
        ctx.save_for_backward(*tensors)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        op, tensors = ctx.op, ctx.saved_tensors
        upstream: Any = float(dy.flatten()[0]) if op.name == "cross_entropy" else dy
        with call_site(ctx.site):
            gradients = own_gradients(op, ctx.own_backward, upstream, tensors)
        inputs: list[Tensor | None] = [None] * len(tensors)
        for place, gradient in zip(gradient_inputs(op.name), gradients):
            inputs[place] = gradient
        return None, None, None, None, *inputs


def own_gradients(
    op: FileOperation, own_backward: Function, upstream: Any, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients that a file's own backward pass returns, checked."""
    result = op.call(own_backward, "backward ", upstream)
    gradients = op.split_gradients(own_backward, result)
    names = SIGNATURES[op.name].gradients
    for gradient, name, place in zip(gradients, names, gradient_inputs(op.name)):
        like = tensors[place]
        fault = _tensor_fault(gradient, tuple(like.shape), like.dtype, (upstream, *tensors))
        if fault:
            raise op.fault_of_backward(own_backward, fault.format(name))
    return gradients


def _update_tensors(op: FileOperation, *tensors: Tensor, **settings: Any) -> None:
    p, g, *moments = tensors
    before = [tensor.clone() for tensor in (p, *moments)]
    op.call(op.function, "", *tensors, **settings)
    if bool(g.any()) and all(map(torch.equal, before, (p, *moments))):
        raise op.fault("changed neither p nor a moment: update them in place, as in p.sub_(...)")
    if any(bool(x.isnan().any()) for x in (p, *moments)) and bool(g.isfinite().all()):
        raise op.fault("wrote nan into p or a moment, and the gradient has none")


# -- functions for tensors in the NumPy engine -----------------------------------------------------


def as_array_operations(operations: OperationsFile) -> dict[str, ArrayCall]:
    """The operations of a file that takes tensors, as functions of arrays with backward passes."""
    return {name: ArrayCall(op) for name, op in file_operations(operations).items()}


class ArrayCall:
    """A function for tensors, called like FileOperation with arrays; autograd differentiates it."""

    def __init__(self, op: FileOperation) -> None:
        self.op = op

    def __call__(
        self, *inputs: Array, new: object = None, **settings: Any
    ) -> tuple[Array, Callable[[Any], tuple[Array, ...]]]:
        """The output of arrays, and backward(gradient of the output) -> all gradients."""
        places = gradient_inputs(self.op.name)
        tensors = [torch.from_numpy(np.array(array)) for array in inputs]
        for place in places:
            tensors[place].requires_grad_(True)
        with torch.enable_grad():
            y = apply_to_tensors(self.op, "", *tensors, **settings)

        def backward(dy: Any) -> tuple[Array, ...]:
            upstream = torch.from_numpy(np.array(dy)) if isinstance(dy, np.ndarray) else None
            if upstream is None:  # of cross_entropy
                upstream = torch.full_like(y, dy)
            own = torch.autograd.grad(
                y, [tensors[place] for place in places], upstream, allow_unused=True
            )
            return tuple(
                _to_array(self._require(gradient, name))
                for gradient, name in zip(own, SIGNATURES[self.op.name].gradients)
            )

        return y.detach().numpy().copy(), backward

    def _require(self, gradient: Tensor | None, name: str) -> Tensor:
        if gradient is None:
            raise self.op.fault(f"has no {name}: its output does not depend on {name[1:]}")
        return gradient

    def update(self, *arrays: Array, **settings: Any) -> None:
        """One update of an optimizer, in place: arrays p, g and moments, of one shape."""
        _update_tensors(self.op, *map(torch.from_numpy, arrays), **settings)
