"""Whether a backward pass is the gradient of its own forward pass, right or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glasslm.course.learn.exercise import Array, Case, Exercise
from glasslm.course.learn.observation import observe

STEP = 1e-5
MAX_ENTRIES = 6  # of each input
TOLERANCE = 1e-5  # relative to the largest entry of the gradient, at least 1


def is_gradient_of_forward(function: Callable[..., Any], exercise: Exercise, case: Case) -> bool:
    """Compare backward with central differences of the function's own output, in float64.

    The loss is the sum of dy times the output, and up to MAX_ENTRIES entries of each input move.
    """
    observation = observe(function, exercise, case)
    if observation.trouble or observation.changed:
        return False

    def loss(name: str, values: Array) -> float:
        moved = Case(case.sizes, case.inputs | {name: values}, case.options, case.dy)
        output = observe(function, exercise, moved).results[exercise.outputs[0]]
        return float(np.sum(output * case.dy))

    for name in (gradient.removeprefix("d") for gradient in exercise.gradients):
        values, gradient = case.inputs[name], observation.results[f"d{name}"]
        if gradient.shape != values.shape:
            return False
        for entry in np.linspace(0, gradient.size - 1, min(MAX_ENTRIES, gradient.size)).astype(int):
            step = STEP * (np.arange(values.size) == entry).reshape(values.shape)
            slope = (loss(name, values + step) - loss(name, values - step)) / (2 * STEP)
            if not abs(slope - gradient.flat[entry]) <= TOLERANCE * max(
                1.0, np.abs(gradient).max()
            ):
                return False
    return True
