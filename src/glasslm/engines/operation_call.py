"""The checked call of an operation of a learner's file, with arrays.

A fault of the file is one line with the operation, where the model called it, and the line number.
Inputs are read-only views, so that a function that changes them stops at the line that does it.
Outputs and gradients are copies: the engine may overwrite them, and the file keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.learner_file import Function, LearnerFile
from glasslm.engines.operations import SIGNATURES, OperationsFile, takes_new
from glasslm.errors import InputError
from glasslm.text import describe_error

Array = NDArray[Any]
Gradients = tuple[Array, ...]


class OperationError(InputError):
    """An operation of a file failed or returned something else than its contract says."""

    def __init__(self, place: str, operation: str, fault: str) -> None:
        super().__init__(place, operation, fault)
        self.place, self.operation, self.fault = place, operation, fault
        self.sites: list[str] = []  # where the model called it: a layer, a step

    def __str__(self) -> str:
        sites = f" ({', '.join(self.sites)})" if self.sites else ""
        return f"{self.place}: {self.operation}{sites}: {self.fault}"


@contextmanager
def call_site(site: str) -> Iterator[None]:
    """A context that adds a site, such as "step 3", to an OperationError; "" adds none."""
    try:
        yield
    except OperationError as error:
        if site:
            error.sites.append(site)
        raise


def output_shape(name: str, inputs: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of an operation's output for inputs of any array type."""
    first = tuple(inputs[0].shape)
    match name:
        case "embedding":
            return (*first, inputs[1].shape[1])
        case "linear":
            return (*first[:-1], inputs[1].shape[0])
        case "cross_entropy":
            return first[:-1]
        case _:
            return first


def gradient_inputs(name: str) -> list[int]:
    """The positions of the inputs that an operation's gradients belong to."""
    signature = SIGNATURES[name]
    return [signature.inputs.index(gradient[1:]) for gradient in signature.gradients]


@dataclass(frozen=True)
class FileOperation:
    """An operation of a file: its name, its function, and the messages about its faults."""

    file: LearnerFile
    name: str
    function: Function
    takes_new: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "takes_new", takes_new(self.function))

    def fault(self, fault: str, line: int | None = None) -> OperationError:
        """The error that this operation has a fault, in a line (its first one by default)."""
        line = line or self.file.first_line(self.function)
        return OperationError(f"{self.file.name}, line {line}", self.name, fault)

    def fault_of_backward(self, backward: Function, fault: str) -> OperationError:
        """The error that the backward pass of this operation has a fault."""
        return self.fault(f"backward {fault}", self.file.first_line(backward))

    def call(self, function: Function, what: str, *inputs: Any, **settings: Any) -> Any:
        """function(*inputs, **settings); raises OperationError for whatever it raises."""
        try:
            return function(*inputs, **settings)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # SystemExit, too: a file does not end the program
            fault = f"{what}raised {describe_error(error)}"
            if isinstance(error, ValueError) and "read-only" in str(error):
                fault = (
                    f"{what}changes an input in place: work on a copy, as in dx = dy.copy(), "
                    "because the model still needs it"
                )
            raise self.fault(fault, self.file.find_line(error)) from None

    def split_result(self, result: Any) -> tuple[Any, Function]:
        """The output and the backward function; OperationError unless the result is this pair."""
        if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
            raise self.fault(
                f"returned {describe_value(result)}: expected `output, backward`, with a function "
                "that returns the gradients"
            )
        return result

    def split_gradients(self, backward: Function, result: Any) -> tuple[Any, ...]:
        """The gradients that `backward` returned; OperationError for another number of them."""
        names = SIGNATURES[self.name].gradients
        parts = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if len(parts) != len(names) or any(part is None for part in parts):
            raise self.fault_of_backward(
                backward,
                f"returned {describe_value(result)}: expected {format_gradients(names)}",
            )
        return parts

    def __call__(
        self, *inputs: Array, new: Callable[[tuple[int, ...]], Array] | None = None, **settings: Any
    ) -> tuple[Array, Callable[[Any], Gradients]]:
        """The output of arrays, and backward(gradient of the output) -> all gradients.

        cross_entropy's backward gets a float. `new` allocates the results: np.empty by default.
        Raises OperationError for an exception in the file, and for an output or a gradient of
        another shape or type, or with nan where the inputs have none.
        """
        places = gradient_inputs(self.name)
        dtype = inputs[places[0]].dtype
        allocate = new or (lambda shape: np.empty(shape, dtype))
        views = tuple(_read_only(array) for array in inputs)
        if self.takes_new:
            settings["new"] = allocate
        shape = output_shape(self.name, inputs)
        if inputs[0].size == 0:  # an expert without tokens
            return np.zeros(shape, dtype), lambda dy: tuple(
                np.zeros_like(inputs[place]) for place in places
            )
        result, own_backward = self.split_result(self.call(self.function, "", *views, **settings))
        output = self._copy(result, "output", shape, dtype, inputs, None, allocate)

        def backward(dy: Any) -> Gradients:
            upstream = _read_only(dy) if isinstance(dy, np.ndarray) else dy
            gradients = self.split_gradients(
                own_backward, self.call(own_backward, "backward ", upstream)
            )
            names = SIGNATURES[self.name].gradients
            return tuple(
                self._copy(
                    gradient, name, inputs[place].shape, dtype, (dy, *inputs), own_backward,
                    allocate,
                )
                for gradient, name, place in zip(gradients, names, places)
            )  # fmt: skip

        return output, backward

    def _copy(
        self,
        value: Any,
        what: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        inputs: tuple[Any, ...],
        backward: Function | None,
        allocate: Callable[[tuple[int, ...]], Array],
    ) -> Array:
        """A copy of an output or a gradient; OperationError unless it is as expected."""
        fault = ""
        if not isinstance(value, np.ndarray):
            fault = f"returned {describe_value(value)} as {what}: expected an array {shape}"
        elif value.shape != shape:
            fault = f"returned {what} with the shape {value.shape}: expected {shape}"
        elif value.dtype != dtype:
            cure = "; np.float64 scalars promote arrays, Python floats do not"
            fault = (
                f"returned {what} in {value.dtype}: expected {dtype}, the type of the inputs"
                f"{cure if value.dtype == np.float64 else ''}"
            )
        elif _has_nan(value) and not any(map(_has_nan_source, inputs)):
            fault = f"returned nan in {what}, and the inputs have none"
        if fault:
            raise self.fault_of_backward(backward, fault) if backward else self.fault(fault)
        copy = allocate(shape)
        copy[...] = value
        return copy

    def update(self, *arrays: Array, **settings: Any) -> None:
        """One update of an optimizer, in place: arrays p, g and moments, of one shape.

        Raises OperationError for an exception, for an update that changes neither p nor a moment,
        and for nan in them where the gradient is finite.
        """
        p, g, *moments = arrays
        gradient = _read_only(g)
        before = [array.copy() for array in (p, *moments)]
        if self.takes_new:
            settings["new"] = lambda shape: np.empty(shape, p.dtype)
        self.call(self.function, "", p, gradient, *moments, **settings)
        changed = [*zip(SIGNATURES[self.name].inputs[:1], before, arrays)]
        changed += zip(SIGNATURES[self.name].inputs[2:], before[1:], moments)
        if g.any() and all(np.array_equal(old, new) for _, old, new in changed):
            raise self.fault("changed neither p nor a moment: update them in place, as in p -= ...")
        for name, old, new in changed:
            if _has_nan(new) and not _has_nan(old) and not _has_nan_source(g):
                raise self.fault(f"wrote nan into {name}, and the gradient has none")


class ArrayOperation(Protocol):
    """An operation called with arrays, as FileOperation is; that of a file may take tensors."""

    def __call__(self, *inputs: Array, new: Any = None, **settings: Any) -> tuple[Array, Any]:
        """The output, and backward(gradient of the output) -> all gradients."""
        ...

    def update(self, *arrays: Array, **settings: Any) -> None:
        """One update of an optimizer, in place."""
        ...


def file_operations(operations: OperationsFile) -> dict[str, FileOperation]:
    """The operations of a file by name, as checked calls."""
    return {
        name: FileOperation(operations.file, name, function)
        for name, function in operations.functions.items()
    }


def format_gradients(names: tuple[str, ...]) -> str:
    """The gradients that a backward pass has to return, as text."""
    return f"({', '.join(names)})" if len(names) > 1 else names[0]


def describe_value(value: Any) -> str:
    """What a function returned, in a few words."""
    if value is None:
        return "nothing"
    if isinstance(value, tuple):
        return f"({', '.join(map(describe_value, value))})"
    if hasattr(value, "shape"):
        return f"an array {tuple(value.shape)}"
    return "a function" if callable(value) else type(value).__name__


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _has_nan(array: Array) -> bool:
    """Whether an array has a nan; the sum of all its elements shows at first that it has none."""
    return math.isnan(float(array.sum())) and bool(np.isnan(array).any())


def _has_nan_source(value: Any) -> bool:
    """Whether an input has what nan may come of: nan, inf, or a number whose cube overflows.

    So training that diverges is not blamed on the file. The -inf of a mask do not count.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return isinstance(value, float) and not math.isfinite(value)
    is_huge = (abs(value) > float(np.finfo(value.dtype).max) ** (1 / 3)) & (value != -np.inf)
    return bool((np.isnan(value) | is_huge).any())
