"""Which tokens an output depends on: found by moving one token at a time, without a hypothesis."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from glasslm.course.learn.exercise import Array, Case, Exercise
from glasslm.course.learn.observation import observe

MIN_CHANGE = 1e-9


class Influence(NamedTuple):
    """An output that moves with a token and must not (`moves`), or the reverse."""

    token: int
    other: int
    moves: bool


def find_wrong_influence(
    function: Callable[..., Any], exercise: Exercise, name: str, case: Case
) -> Influence | None:
    """The first token whose output or gradient depends on other tokens than the reference's does.

    None where the dependence is right, or where the arrays have no axis of tokens in common.
    """
    source = _source_of(exercise, name)
    if source is None or ("N" not in case.sizes and "T" not in case.sizes):
        return None
    moved_array = case.dy if source == "dy" else case.inputs[source]
    base = observe(function, exercise, case).results.get(name)
    right = exercise.compute(case).total(name)
    axis = 1 if "T" in case.sizes and moved_array.ndim > 2 else 0
    if not isinstance(base, np.ndarray) or base.shape != right.shape or base.ndim <= axis:
        return None
    if base.shape[axis] != moved_array.shape[axis]:
        return None
    for other, token in itertools.product(range(base.shape[axis]), repeat=2):
        moved = _move_token(case, source, axis, other)
        changed = observe(function, exercise, moved).results.get(name, base)
        moves = _differs(base, changed, axis, token)
        if moves != _differs(right, exercise.compute(moved).total(name), axis, token):
            return Influence(token, other, moves)
    return None


def _source_of(exercise: Exercise, name: str) -> str | None:
    """What to move: for the output the last input with its shape, for a gradient of one, dy."""
    floats = exercise.token_inputs
    if name in exercise.outputs:
        return floats[-1] if floats else None
    return "dy" if name.removeprefix("d") in floats else None


def _move_token(case: Case, source: str, axis: int, token: int) -> Case:
    """The case with one token's entries of an input or of dy changed, each by another share."""
    moved = np.array(case.dy if source == "dy" else case.inputs[source])
    entries = np.moveaxis(moved, axis, 0)[token]
    entries *= np.linspace(1.2, 1.5, entries.size).reshape(entries.shape)
    inputs = case.inputs if source == "dy" else case.inputs | {source: moved}
    return Case(case.sizes, inputs, case.options, moved if source == "dy" else case.dy)


def _differs(before: Array, after: Array, axis: int, token: int) -> bool:
    """Whether one token's entries moved."""
    if not isinstance(after, np.ndarray) or after.shape != before.shape:
        return True
    difference = np.take(after, token, axis) - np.take(before, token, axis)
    return bool(np.abs(difference).max(initial=0) > MIN_CHANGE)
