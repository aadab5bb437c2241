"""The smallest case that fails, with what came out beside what was wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from glasslm.course.learn.comparison import reference_in_float64, wrong_results
from glasslm.course.learn.exercise import Case, Exercise
from glasslm.course.learn.observation import observe

DECIMALS = 4
MAX_NUMBERS = 48  # of one array in an example


def find_example(
    function: Callable[..., Any],
    exercise: Exercise,
    cases: Iterable[Case],
    name: str,
    tolerance: float = 0.0,
) -> dict[str, Any] | None:
    """The first of `cases` where the result `name` is visibly wrong; None if it never is.

    A case in which only the shape is wrong is taken where no case has wrong numbers.
    """
    example: dict[str, Any] | None = None
    for case in cases:
        observation = observe(function, exercise, case)
        if not wrong_results(exercise, case, observation, (name,), tolerance):
            continue
        right = reference_in_float64(exercise, case).total(name)
        output, got, wanted = _side_by_side(name, observation.results[name], right)
        if got == wanted:
            continue
        results = {"output": output, "got": got, "wanted": wanted}
        if example is None:
            example = describe_case(case, name in exercise.gradients) | results
        if _flatten(got) != _flatten(wanted):
            return describe_case(case, name in exercise.gradients) | results
    return example


def _flatten(value: Any) -> list[Any]:
    """The numbers of nested lists in one list."""
    if not isinstance(value, list):
        return [value]
    return [number for item in value for number in _flatten(item)]


def _side_by_side(name: str, actual: Any, right: Any) -> tuple[str, Any, Any]:
    """A result and the right one as numbers; of long arrays the entry that differs most."""
    is_long = isinstance(actual, np.ndarray) and actual.size > MAX_NUMBERS
    if not is_long or np.shape(right) != actual.shape:
        return name, to_numbers(actual), to_numbers(right)
    with np.errstate(all="ignore"):
        error = np.nan_to_num(abs(actual - right), nan=np.inf)
    index = tuple(map(int, np.unravel_index(int(error.argmax()), error.shape)))
    entry = ", ".join(map(str, index))
    return f"{name}[{entry}]", to_numbers(actual[index].item()), to_numbers(right[index].item())


def find_changed_example(
    function: Callable[..., Any], exercise: Exercise, cases: Iterable[Case]
) -> dict[str, Any] | None:
    """The first of `cases` where an argument is changed in place."""
    for case in cases:
        observation = observe(function, exercise, case)
        if observation.changed:
            return describe_case(case, True) | {"changed": observation.changed}
    return None


def describe_case(case: Case, uses_dy: bool) -> dict[str, Any]:
    """Sizes, inputs and options of a case as JSON types."""
    values = {name: to_numbers(value) for name, value in (case.inputs | case.options).items()}
    dy = {"dy": to_numbers(case.dy)} if uses_dy and case.dy is not None else {}
    return {"sizes": case.sizes, **values, **dy}


def to_numbers(value: Any) -> Any:
    """An array as nested lists of rounded numbers; strings for what is not finite or too long."""
    if isinstance(value, np.ndarray):
        if value.size > MAX_NUMBERS:
            return f"array of shape {value.shape}"
        return to_numbers(value.tolist())
    if isinstance(value, (list, tuple)):
        return [to_numbers(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_numbers(item) for key, item in value.items()}
    if isinstance(value, (bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return round(value, DECIMALS) + 0.0 if np.isfinite(value) else str(value)  # no -0.0
    if callable(value):
        return getattr(value, "__name__", "a function")
    return value if isinstance(value, str) else repr(value)
