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
    """A token that moves with another token of `source` and must not (`moves`), or the reverse."""

    token: int
    source: str
    other: int
    moves: bool


def find_wrong_influence(
    function: Callable[..., Any], exercise: Exercise, name: str, case: Case
) -> Influence | None:
    """The first token whose output or gradient depends on other tokens than the reference's does.

    An output is compared for each input that has tokens, a gradient for dy. None where the
    dependence is right, or where the arrays have no axis of tokens in common.
    """
    base = observe(function, exercise, case).results.get(name)
    right = exercise.compute(case).total(name)
    if not isinstance(base, np.ndarray) or base.shape != np.shape(right):
        return None
    sources = exercise.token_inputs if name in exercise.outputs else ("dy",)
    for source in sources:
        moved = case.dy if source == "dy" else case.inputs[source]
        if not isinstance(moved, np.ndarray) or (source == "dy" and moved.shape != base.shape):
            continue
        axis = 1 if moved.ndim > 2 else 0
        if base.ndim <= axis or base.shape[axis] != moved.shape[axis]:
            continue
        for other, token in itertools.product(range(base.shape[axis]), repeat=2):
            changed_case = _move_token(case, source, axis, other)
            changed = observe(function, exercise, changed_case).results.get(name, base)
            moves = _differs(base, changed, axis, token)
            changed_right = exercise.compute(changed_case).total(name)
            if not moves and (token == other or not exercise.mixes_tokens):
                continue  # the function is flat there
            if moves != _differs(right, changed_right, axis, token):
                return Influence(token, source, other, moves)
    return None


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
