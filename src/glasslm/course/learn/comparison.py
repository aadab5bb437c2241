"""Results equal up to rounding: tolerances relative to the size of the terms, which may cancel."""

from __future__ import annotations

from typing import Any

import numpy as np

from glasslm.course.learn.exercise import Array, Case, Exercise, Reference
from glasslm.course.learn.observation import Observation

TOLERANCES = {"float64": 1e-9, "float32": 2e-4}  # by the type of the inputs
# Of results in float32 for inputs in float64: right formulas reach 1.5e-6. A mistake must not hide
# behind a cast, so it is no looser, and float16 has none.
FLOAT32_ROUNDING = 5e-6
MAX_UNDEFINED_SHARE = 0.5  # of a prediction, whose NaN entries match everything


def is_equal(expected: Any, actual: Any, scale: float, tolerance: float = 0.0) -> bool:
    """Whether `actual` is `expected` up to rounding; NaN in `expected` matches everything.

    The error may be `tolerance` times the larger of `scale` and the entry; 0 stands for that of
    inputs in float64.
    """
    if isinstance(expected, np.generic):
        expected = np.asarray(expected)
    if not isinstance(expected, np.ndarray) or not isinstance(actual, np.ndarray):
        return type(expected) is type(actual) and bool(expected == actual)
    if expected.shape != actual.shape or actual.dtype.kind not in "fiub":
        return False
    undefined = np.isnan(expected)
    if expected.size and undefined.mean() > MAX_UNDEFINED_SHARE:
        return False
    with np.errstate(all="ignore"):
        limit = (tolerance or rounding_of(actual)) * np.maximum(scale, abs(expected))
        is_close = np.isfinite(expected) & (abs(actual - expected) <= limit)
        is_close |= (expected == actual) | undefined  # equal infinities have no difference
    return bool(is_close.all())


def rounding_of(actual: Array) -> float:
    """The tolerance of a result for inputs in float64."""
    return FLOAT32_ROUNDING if actual.dtype == np.float32 else TOLERANCES["float64"]


def scale_of(reference: Reference, name: str) -> float:
    """The largest sum of |terms|: terms may cancel to a result that is much smaller than they."""
    terms = reference.terms[name].values()
    if not all(is_numeric(term) for term in terms):
        return 1.0
    with np.errstate(all="ignore"):
        total: Array = np.asarray(sum(np.abs(np.asarray(term, float)) for term in terms))
    finite = total[np.isfinite(total)]
    return max(float(np.max(finite, initial=0)), 1e-12)


def is_numeric(value: Any) -> bool:
    """Whether a term is a number or an array of numbers."""
    return isinstance(value, (int, float)) or (
        isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub"
    )


def reference_in_float64(exercise: Exercise, case: Case) -> Reference:
    """The right results of a case, computed in float64 whatever its type."""
    return exercise.compute(case.cast("float64"))


def wrong_results(
    exercise: Exercise,
    case: Case,
    observation: Observation,
    names: tuple[str, ...],
    tolerance: float = 0.0,
) -> list[str]:
    """Those of `names` that were returned and differ from the reference by more than rounding."""
    reference = reference_in_float64(exercise, case)
    return [
        name
        for name in names
        if name in observation.results
        and not is_equal(
            reference.total(name),
            observation.results[name],
            scale_of(reference, name),
            tolerance,
        )
    ]
