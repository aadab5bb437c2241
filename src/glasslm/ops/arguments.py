"""Reads the arguments of glasslm.ops: copies with one type, and shapes that fit each other.

A pattern of a shape is its letters, separated by spaces: "O I", or "... D" with any number of
leading axes. A letter has the same size in all arguments of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.engines.numpy.ops import Array, New
from glasslm.errors import InputError, require

FLOAT_TYPES = (np.dtype(np.float32), np.dtype(np.float64))
Sizes = dict[str, Any]  # the size of each letter, and the leading axes under "..."


def read_arrays(**arguments: tuple[Any, str]) -> list[Array]:
    """Contiguous copies of arrays, given by name as (array, pattern of its shape).

    Raises InputError for a type other than float32 and float64, two types in one call, an empty
    array, or shapes that do not fit their patterns and each other.
    """
    sizes: Sizes = {}
    arrays: list[Array] = []
    first_name = ""
    for name, (value, pattern) in arguments.items():
        array = require_floats(name, value)
        if arrays:
            require_type(name, array, first_name, arrays[0].dtype)
        sizes |= _require_shape(name, array.shape, pattern, sizes)
        arrays.append(np.array(array, order="C"))
        first_name = first_name or name
    return arrays


def require_type(name: str, array: Array, other: str, dtype: np.dtype[Any]) -> None:
    """Raise InputError unless an array has the type of the argument `other`."""
    if array.dtype != dtype:
        raise InputError(
            f"{name} is {array.dtype} and {other} is {dtype}: expected one type; give "
            f"{name}.astype(np.{dtype})"
        )


def read_float_type(dtype: DTypeLike) -> np.dtype[Any]:
    """`dtype` as a NumPy type; InputError unless it is float32 or float64."""
    try:
        numpy_type = np.dtype(dtype)
    except (TypeError, ValueError):
        raise InputError(f"dtype is {dtype}: expected np.float32 or np.float64") from None
    if numpy_type not in FLOAT_TYPES:
        raise InputError(f"dtype is {numpy_type}: expected np.float32 or np.float64")
    return numpy_type


def as_array(name: str, value: Any) -> NDArray[Any]:
    """`value` as an array of any type; InputError for rows of different lengths."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(f"{name} is not an array ({error}): give rows of one length") from None


def require_floats(name: str, value: Any) -> Array:
    """`value` as an array, not copied; InputError unless it holds float32 or float64."""
    array = as_array(name, value)
    if isinstance(value, np.ma.MaskedArray) or array.dtype not in FLOAT_TYPES:
        kind = "masked" if isinstance(value, np.ma.MaskedArray) else array.dtype
        raise InputError(
            f"{name} is {kind}, with the shape {array.shape}: expected an array of float32 or "
            f"float64; give np.asarray({name}, np.float32)"
        )
    if not array.size:
        raise InputError(
            f"{name} has the shape {array.shape}: expected at least one element on each axis"
        )
    return array


def _require_shape(name: str, shape: tuple[int, ...], pattern: str, sizes: Sizes) -> Sizes:
    """The sizes of the letters of `pattern`; InputError unless the shape fits them."""
    bindings = _match_shape(shape, pattern, sizes)
    if bindings is not None:
        return bindings
    letters = pattern.split()
    known_sizes = [f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes]
    swapped = shape[:-2] + shape[:-3:-1]
    is_transposed = len(shape) > 1 and _match_shape(swapped, pattern, sizes) is not None
    cure = f"give np.swapaxes({name}, -1, -2)" if is_transposed else "reshape or slice it"
    raise InputError(
        f"{name} has the shape {shape}: expected {_format_shape(letters)}"
        f"{' with ' if known_sizes else ''}{', '.join(known_sizes)}; {cure}"
    )


def _match_shape(shape: tuple[int, ...], pattern: str, sizes: Sizes) -> Sizes | None:
    """The sizes of the letters of `pattern` in `shape`; None unless they fit `sizes`."""
    letters = pattern.split()
    bindings: Sizes = {}
    if letters[0] == "...":
        letters = letters[1:]
        bindings["..."] = shape[: max(0, len(shape) - len(letters))]
        shape = shape[len(bindings["..."]) :]
    if len(shape) != len(letters):
        return None
    bindings |= zip(letters, shape, strict=True)
    if any(bindings[letter] != size for letter, size in zip(letters, shape, strict=True)):
        return None  # a letter that occurs twice
    return bindings if all(sizes.get(key, size) == size for key, size in bindings.items()) else None


def _format_shape(letters: list[str]) -> str:
    return f"({', '.join(letters)}{',' if len(letters) == 1 and letters != ['...'] else ''})"


def read_gradient(dy: Any, y: Array, name: str = "dy") -> Array:
    """A contiguous copy of the gradient of y (any shape); InputError for another shape or type."""
    gradient = require_floats(name, dy)
    if gradient.shape != y.shape:
        raise InputError(
            f"{name} has the shape {gradient.shape}: expected {y.shape}, that of the output"
        )
    if gradient.dtype != y.dtype:
        raise InputError(
            f"{name} is {gradient.dtype}: expected {y.dtype}, the type of the output; give "
            f"{name}.astype(np.{y.dtype})"
        )
    return np.array(gradient, order="C")


def read_ids(
    name: str, value: Any, limit: int, shape: tuple[int, ...] | None = None, lowest: int = 0
) -> NDArray[np.int64]:
    """A copy of ids (any shape) as int64; InputError unless lowest <= id < limit.

    `shape`, if given, is the shape that they must have.
    """
    ids = as_array(name, value)
    if ids.dtype.kind not in "iu":
        raise InputError(
            f"{name} is {ids.dtype}, with the shape {ids.shape}: expected ids, integers from "
            f"{lowest} to {limit - 1}"
        )
    if shape is not None and ids.shape != shape:
        raise InputError(f"{name} has the shape {ids.shape}: expected {shape}, one id a position")
    if not ids.size:
        raise InputError(f"{name} has the shape {ids.shape}: expected at least one id")
    outside = np.argwhere((ids < lowest) | (ids >= limit))
    if len(outside):
        index = tuple(outside[0].tolist())
        raise InputError(
            f"{name}{list(index) if index else ''} is {ids[index]}: expected ids from {lowest} to "
            f"{limit - 1}; encode the text with the tokenizer of this vocabulary"
        )
    return ids.astype(np.int64)


def require_count(name: str, value: Any, lowest: int = 1, bits: int = 63) -> None:
    """Raise InputError unless `value` is an integer, `lowest` or more and below 2**bits."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(is_integer and value >= lowest, name, value, f"an integer, {lowest} or more")
    require(value < 2**bits, name, value, f"below 2**{bits}")


def require_seed(seed: Any) -> None:
    """Raise InputError unless `seed` is an integer that the generators use as a whole."""
    require_count("seed", seed, 0, bits=64)


def require_number(name: str, value: Any, is_valid: Callable[[float], bool], expected: str) -> None:
    """Raise InputError unless `value` is a number for which `is_valid` holds."""
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    require(is_number and is_valid(_to_float(value)), name, value, f"a number, {expected}")


def _to_float(value: Any) -> float:
    """A number as a float; an integer above the largest float becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def read_new(new: New | None, dtype: DTypeLike) -> New:
    """The allocator `new`, or np.empty of this type; its arrays must have the type."""
    dtype = np.dtype(dtype)
    if new is None:
        return lambda shape: np.empty(shape, dtype)
    if not callable(new):
        raise InputError(
            f"new is {new}: expected a function new(shape) that returns an array; leave it out, or "
            f"give functools.partial(np.empty, dtype=np.{dtype})"
        )
    allocate: Callable[[tuple[int, ...]], Array] = new

    def allocate_checked(shape: tuple[int, ...]) -> Array:
        array = allocate(shape)
        if not isinstance(array, np.ndarray):
            raise InputError(
                f"new({shape}) returned {type(array).__name__}: expected an array; leave "
                f"`new` out, or give functools.partial(np.empty, dtype=np.{dtype})"
            )
        if array.dtype != dtype or array.shape != tuple(shape):
            raise InputError(
                f"new({shape}) returned {array.dtype} with the shape {array.shape}: expected "
                f"{dtype} with this shape; leave `new` out, or give "
                f"functools.partial(np.empty, dtype=np.{dtype})"
            )
        return array

    return allocate_checked
