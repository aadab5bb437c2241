"""Compares a hand-written gradient with central finite differences, element by element.

error = max over the elements of |a - n| / max(|a|, |n|, 1e-3 max|g|), with a by hand, n numerical
and g all gradients of the case. In float64 with h = 1e-5 a correct gradient has an error below
1e-6; a wrong factor or sign gives about 1.

The two-point difference has an error of order h². Where it disagrees with the gradient, two more
points remove that error before the comparison: near the pole of a norm the third derivative is
large. A wrong gradient still fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Gradients = Mapping[str, Array]

STEP_SIZE = 1e-5  # h
TOLERANCE = 1e-6
SCALE_FLOOR = 1e-3  # of max|g|: the smallest scale that an error is relative to
KINK_THRESHOLD = 1e-2  # of max|g|: one-sided slopes that differ by more lie on both sides of a kink
MAX_REDRAWS = 50


@dataclass(frozen=True)
class CheckResult:
    """The largest error of one case, and where it is."""

    case: str
    error: float
    where: str  # NAME[index]
    elements: int  # compared
    redrawn: int  # points at a kink that were moved

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= TOLERANCE


def check_gradients(
    case: str,
    inputs: Mapping[str, Array],
    value: Callable[[], float],
    gradients: Callable[[], Gradients],
    rng: np.random.Generator,
    kinks: bool = False,
    sample: int | None = None,
) -> CheckResult:
    """Compare `gradients()` with central differences of `value()`, for every element of the inputs.

    `inputs` are float64 arrays of any shape; a gradient has the shape of its input. Both functions
    read the inputs, which are changed in place and restored. With `kinks`, a point where the slope
    jumps within h is moved by a random amount and counted. With `sample`, that many elements of
    each input are compared.
    """
    by_hand = {name: gradient.copy() for name, gradient in gradients().items()}
    max_gradient = max(float(np.abs(gradient).max()) for gradient in by_hand.values())
    worst, where, elements, redrawn = -1.0, "", 0, 0
    for name, array in inputs.items():
        assert array.flags.c_contiguous, "a reshape of the input must be a view"
        flat = array.reshape(-1)
        indices = np.arange(flat.size)
        if sample is not None and sample < flat.size:
            indices = np.sort(rng.choice(flat.size, sample, replace=False))
        for index in map(int, indices):
            before, analytic = flat[index], by_hand[name].reshape(-1)[index]
            numeric, is_smooth = central_difference(flat, index, value, max_gradient)
            for _ in range(MAX_REDRAWS if kinks else 0):
                if is_smooth:
                    break
                redrawn += 1
                flat[index] += 0.1 * rng.standard_normal()
                analytic = gradients()[name].reshape(-1)[index]
                numeric, is_smooth = central_difference(flat, index, value, max_gradient)
            if relative_error(analytic, numeric, max_gradient) > TOLERANCE:
                numeric = four_point_difference(flat, index, value, numeric)
            flat[index] = before
            error = relative_error(analytic, numeric, max_gradient)
            elements += 1
            # A NaN is the worst error, and no later error replaces it.
            if not (error <= worst or math.isnan(worst)):
                position = ", ".join(str(i) for i in np.unravel_index(index, array.shape))
                worst, where = float(error), f"{name}[{position}]"
    return CheckResult(case, worst, where, elements, redrawn)


def relative_error(analytic: float, numeric: float, max_gradient: float) -> float:
    """The difference of two slopes, relative to the larger of them or to the floor."""
    return abs(analytic - numeric) / max(abs(analytic), abs(numeric), SCALE_FLOOR * max_gradient)


def central_difference(
    flat: Array, index: int, value: Callable[[], float], max_gradient: float
) -> tuple[float, bool]:
    """The two-point difference at an element of flat (N,), and whether both slopes agree."""
    middle = flat[index]
    flat[index] = middle + STEP_SIZE
    above = value()
    flat[index] = middle - STEP_SIZE
    below = value()
    flat[index] = middle
    here = value()
    is_smooth = abs((above - here) - (here - below)) / STEP_SIZE <= KINK_THRESHOLD * max_gradient
    return (above - below) / (2 * STEP_SIZE), is_smooth


def four_point_difference(
    flat: Array, index: int, value: Callable[[], float], two_points: float
) -> float:
    """The central difference at an element of flat (N,) without its error of order h².

    Richardson extrapolation: (4 d(h) - d(2h)) / 3, with d(h) given as `two_points`.
    """
    middle = flat[index]
    flat[index] = middle + 2 * STEP_SIZE
    above = value()
    flat[index] = middle - 2 * STEP_SIZE
    below = value()
    flat[index] = middle
    return (4 * two_points - (above - below) / (4 * STEP_SIZE)) / 3
