"""A gradient compared with central finite differences, element by element.

error = max over the elements of |a - n| / max(|a|, |n|, 1e-3 max|g|), a by hand, n numerical, g all gradients of the
case. In float64 with h = 1e-5 a right gradient stays below 1e-6; a wrong factor or sign gives about 1.

Where the two-point difference disagrees, its own error, of order h², is removed with two more points before judging:
next to the pole of a norm the third derivative can be that large. A wrong gradient stays wrong.
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

H = 1e-5
TOLERANCE = 1e-6
FLOOR = 1e-3
KINK = 1e-2  # one-sided slopes that differ by more than this share of max|g| straddle a kink
REDRAWS = 50


@dataclass(frozen=True)
class Finding:
    """The largest error of one case, and where it is."""

    case: str
    error: float
    where: str  # NAME[index]
    elements: int  # compared
    redrawn: int  # points at a kink that were moved

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE  # a NaN does not pass


def compare(
    case: str,
    inputs: Mapping[str, Array],
    value: Callable[[], float],
    gradients: Callable[[], Gradients],
    rng: np.random.Generator,
    kinks: bool = False,
    sample: int | None = None,
) -> Finding:
    """Compare `gradients()` with central differences of `value()`, for every element of the `inputs` (float64).

    Both functions read the inputs, which are changed in place and restored. With `kinks`, a point where the slope
    jumps within h is moved a little and counted. With `sample`, that many elements of each input are taken.
    """
    by_hand = {name: gradient.copy() for name, gradient in gradients().items()}
    largest = max(float(np.abs(gradient).max()) for gradient in by_hand.values())
    worst, where, elements, redrawn = -1.0, "", 0, 0
    for name, array in inputs.items():
        assert array.flags.c_contiguous, "a reshape of the input must be a view"
        flat = array.reshape(-1)
        indices = np.arange(flat.size)
        if sample is not None and sample < flat.size:
            indices = np.sort(rng.choice(flat.size, sample, replace=False))
        for index in map(int, indices):
            before, analytic = flat[index], by_hand[name].reshape(-1)[index]
            numeric, smooth = slope(flat, index, value, largest)
            for _ in range(REDRAWS if kinks else 0):
                if smooth:
                    break
                redrawn += 1
                flat[index] += 0.1 * rng.standard_normal()
                analytic = gradients()[name].reshape(-1)[index]
                numeric, smooth = slope(flat, index, value, largest)
            if relative(analytic, numeric, largest) > TOLERANCE:
                numeric = four_points(flat, index, value, numeric)
            flat[index] = before
            error = relative(analytic, numeric, largest)
            elements += 1
            if not (error <= worst or math.isnan(worst)):  # a NaN is the worst, and stays it
                position = ", ".join(str(i) for i in np.unravel_index(index, array.shape))
                worst, where = float(error), f"{name}[{position}]"
    return Finding(case, worst, where, elements, redrawn)


def relative(analytic: float, numeric: float, largest: float) -> float:
    return abs(analytic - numeric) / max(abs(analytic), abs(numeric), FLOOR * largest)


def four_points(flat: Array, index: int, value: Callable[[], float], two_points: float) -> float:
    """The central difference with its error of order h² removed (Richardson): (4 d(h) - d(2h)) / 3."""
    middle = flat[index]
    flat[index] = middle + 2 * H
    above = value()
    flat[index] = middle - 2 * H
    below = value()
    flat[index] = middle
    return (4 * two_points - (above - below) / (4 * H)) / 3


def slope(
    flat: Array, index: int, value: Callable[[], float], largest: float
) -> tuple[float, bool]:
    """The central difference at an element, and whether the slopes to both sides agree."""
    middle = flat[index]
    flat[index] = middle + H
    above = value()
    flat[index] = middle - H
    below = value()
    flat[index] = middle
    here = value()
    smooth = abs((above - here) - (here - below)) / H <= KINK * largest
    return (above - below) / (2 * H), smooth
