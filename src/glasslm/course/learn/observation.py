"""What a function does with a case: results, arguments that it changes, errors with a line."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from glasslm.course.learn.exercise import Case, Exercise, VerdictName, to_array
from glasslm.text import describe_error

Stage = Literal["forward", "backward"]

# Words in NumPy's messages about shapes that do not fit.
SHAPE_WORDS = ("broadcast", "shape", "matmul", "dimension", "align", "axis", "axes", "length")
ALLOCATOR = "new"  # an optional parameter, as in a file for --ops: new(shape) returns an array
OTHER_WORDS = ("out of bounds", "inhomogeneous")


@dataclass(frozen=True)
class Trouble:
    """Why a call gave no results."""

    verdict: VerdictName
    stage: Stage
    sentence: str


@dataclass
class Observation:
    """Results of one call by name; the argument that was changed in place; what went wrong."""

    results: dict[str, Any] = field(default_factory=dict)
    changed: str = ""
    trouble: Trouble | None = None


def observe(function: Callable[..., Any], exercise: Exercise, case: Case) -> Observation:
    """Call the function on copies of a case, forward and then backward."""
    observation = Observation()
    copied = Case(case.sizes, copy_values(case.inputs), dict(case.options), case.dy)
    stage: Stage = "forward"
    try:
        with np.errstate(all="ignore"):
            if exercise.call is not None:
                results = exercise.call(function, copied)
                observation.results = {name: to_array(value) for name, value in results.items()}
                return observation
            returned = call_function(function, exercise, copied)
            output = returned
            if exercise.has_backward:
                is_pair = isinstance(returned, tuple) and len(returned) == 2
                output, backward = returned if is_pair else (returned, None)
            if output is None:
                raise NotImplementedError("nothing is returned")
            _record_outputs(output, exercise, observation)
            observation.changed = find_change(copied.inputs, case.inputs)
            if exercise.has_backward:
                stage = "backward"
                _observe_backward(backward, output, exercise, copied, case, observation)
    except NotImplementedError as error:
        sentence = str(error) or "not written yet: it raises NotImplementedError"
        observation.trouble = Trouble("not_implemented", stage, sentence)
    except MemoryError:
        raise  # the next case would fill the memory again
    except Exception as error:  # the learner's code may raise anything
        observation.trouble = _explain_error(error, function, case, stage)
    return observation


def _record_outputs(returned: Any, exercise: Exercise, observation: Observation) -> None:
    """Record what the function returns: its output, or a tuple of its outputs by name."""
    names = exercise.outputs
    if len(names) == 1:
        observation.results[names[0]] = to_array(returned)
        return
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    for name, output in zip(names, outputs, strict=False):
        if output is None:
            raise NotImplementedError(f"{name} is None")
        observation.results[name] = to_array(output)
    if len(outputs) != len(names):
        count = f"{len(outputs)} result" + "s" * (len(outputs) != 1)
        sentence = f"the function returns {count}; expected {', '.join(names)}"
        observation.trouble = Trouble("shape", "forward", sentence)


def call_function(function: Callable[..., Any], exercise: Exercise, case: Case) -> Any:
    """What function(*inputs, **options) returns; optional options that it lacks are left out.

    A function with a parameter `new` gets an allocator of arrays in the type of the inputs.
    """
    known = inspect.signature(function).parameters
    takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in known.values())
    optional = exercise.optional_names()
    options = {
        name: value
        for name, value in case.options.items()
        if takes_any or name in known or name not in optional
    }
    if ALLOCATOR in known:
        arrays = (value for value in case.inputs.values() if isinstance(value, np.ndarray))
        dtype = next((array.dtype for array in arrays if array.dtype.kind == "f"), np.dtype(float))
        # The engine's arrays hold old values, so a function that expects zeros is wrong.
        options[ALLOCATOR] = lambda shape: np.full(shape, np.nan, dtype)
    return function(*case.inputs.values(), **options)


def _observe_backward(
    backward: Any,
    output: Any,
    exercise: Exercise,
    copied: Case,
    case: Case,
    observation: Observation,
) -> None:
    """Call backward, and record the gradients and what it changed."""
    if not callable(backward):
        raise NotImplementedError(
            "no backward is returned: return output, backward, and backward must be a function"
        )
    before = observation.results[exercise.outputs[0]]
    dy = np.array(case.dy) if isinstance(case.dy, np.ndarray) else case.dy
    returned, names = backward(dy), exercise.gradients
    several = isinstance(returned, (tuple, list)) and len(names) > 1
    gradients = list(returned) if several else [returned]
    for name, gradient in zip(names, gradients, strict=False):
        if gradient is None:
            raise NotImplementedError(f"{name} is None")
        observation.results[name] = to_array(gradient)
    if len(gradients) < len(names):
        raise NotImplementedError(
            f"{names[len(gradients)]} is not returned: backward returns {', '.join(names)}"
        )
    if len(gradients) > len(names):
        sentence = f"backward returns {len(gradients)} arrays; expected {', '.join(names)}"
        observation.trouble = Trouble("shape", "backward", sentence)
    if not observation.changed:
        after = {"dy": dy} | copied.inputs
        changed = find_change(after, {"dy": case.dy} | case.inputs)
        if not changed and not are_same(to_array(output), before):
            changed = "the output"
        observation.changed = changed and f"{changed}, by backward,"


def copy_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with copies of the arrays and lists."""
    return {
        name: np.array(value)
        if isinstance(value, np.ndarray)
        else value.copy()
        if isinstance(value, (list, dict, set))
        else value
        for name, value in values.items()
    }


def find_change(after: dict[str, Any], before: dict[str, Any]) -> str:
    """The name of the first argument that a call has changed; "" if there is none."""
    return next((name for name in before if not are_same(after[name], before[name])), "")


def are_same(a: Any, b: Any) -> bool:
    """Whether two values are equal, NaN included."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f" and b.dtype.kind == "f")
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(are_same, a, b))
    return type(a) is type(b) and bool(np.all(a == b))


def _explain_error(
    error: Exception, function: Callable[..., Any], case: Case, stage: Stage
) -> Trouble:
    """The error as what went wrong; one about shapes with the sizes of the case."""
    description = describe_error(error)
    fits_shapes = isinstance(error, (ValueError, IndexError)) and any(
        word in description for word in SHAPE_WORDS
    )
    fits_shapes &= not any(word in description for word in OTHER_WORDS)
    sentence = locate_error(error, source_file(function)) + description
    if not fits_shapes:
        return Trouble("exception", stage, sentence)
    sizes = ", ".join(f"{name} = {size:g}" for name, size in case.sizes.items())
    return Trouble("shape", stage, f"{sentence} (with {sizes})")


def source_file(function: Callable[..., Any]) -> str:
    """The file name in the tracebacks of the function; "" for a class or a built-in."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_filename if code else ""


def locate_error(error: BaseException, file: str) -> str:
    """ "line 12: ": the last line of the learner's file in the traceback; "" if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"line {lines[-1]}: " if lines else ""
