"""The checker names planted faults, passes none, and raises no false alarm: faults/*.txt."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_faults import FOLDER, UNREAD_FOLDER, Solution, list_exercises, read_solutions

from glasslm import ops
from glasslm.course.learn import check, check_function
from glasslm.course.learn.exercise import Case, Exercise, Reference
from glasslm.course.learn.exercises import COURSE, load_exercise

EXERCISES = [load_exercise(name) for name in COURSE]
MIN_NAMED = 0.97
MIN_NAMED_UNREAD = 0.9
MIN_FAULTS = 5  # of each exercise
MIN_RIGHT_SOLUTIONS = 80


def judge(solution: Solution, seed: int) -> str:
    return check_function(load_exercise(solution.exercise), solution.load(), seed).verdict


def measure(
    seeds: Sequence[int],
    every: int = 1,
    folder: Path = FOLDER,
    one_seed_per_fault: bool = False,
) -> tuple[Counter[str], list[str]]:
    """Counts of faults, named ones, passed ones, right solutions and alarms; and the misses.

    With `every` = 3 only each third fault is judged, but all right solutions. With
    `one_seed_per_fault` the faults take turns at the seeds, but right solutions are judged at all.
    """
    counts: Counter[str] = Counter()
    misses = []
    for exercise in list_exercises(folder):
        for number, solution in enumerate(read_solutions(exercise, folder)):
            is_right = solution.verdict == "right"
            if number % every and not is_right:
                continue
            turn = number % len(seeds)
            for seed in seeds[turn : turn + 1] if one_seed_per_fault and not is_right else seeds:
                verdict = judge(solution, seed)
                counts["right" if is_right else "faults"] += 1
                counts["alarms"] += is_right and verdict != "right"
                counts["named"] += verdict == solution.verdict and not is_right
                counts["passed"] += verdict == "right" and not is_right
                if verdict != solution.verdict:
                    misses.append(f"{solution.label}: {solution.verdict}, got {verdict}, {seed=}")
    return counts, misses


def test_planted_faults_are_named_and_none_passes() -> None:
    counts, misses = measure(range(1), every=3)
    assert counts["passed"] == 0, misses
    assert counts["alarms"] == 0, misses
    assert counts["named"] >= MIN_NAMED * counts["faults"], misses
    assert counts["right"] >= MIN_RIGHT_SOLUTIONS


@pytest.mark.slow
def test_all_planted_faults_are_named_at_other_seeds() -> None:
    counts, misses = measure(range(1, 5), one_seed_per_fault=True)
    assert counts["faults"] >= 1000
    assert counts["passed"] == 0, misses
    assert counts["alarms"] == 0, misses
    assert counts["named"] >= MIN_NAMED * counts["faults"], misses


def test_faults_written_without_reading_the_checker_are_named() -> None:
    """Ordinary mistakes, by somebody who knew the signatures and the names of the verdicts."""
    counts, misses = measure(range(1), folder=UNREAD_FOLDER)
    assert counts["faults"] >= 40
    assert counts["passed"] == 0, misses
    assert counts["named"] >= MIN_NAMED_UNREAD * counts["faults"], misses


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_exercise_has_planted_faults_and_a_right_solution(exercise: Exercise) -> None:
    solutions = read_solutions(exercise.name)
    assert sum(solution.verdict != "right" for solution in solutions) >= MIN_FAULTS
    assert any(solution.verdict == "right" for solution in solutions)


@pytest.mark.parametrize(
    "exercise", [e for e in EXERCISES if e.has_backward], ids=lambda exercise: exercise.name
)
def test_references_are_the_gradients_of_their_outputs(exercise: Exercise) -> None:
    """Every entry of every gradient, by central differences."""
    case = exercise.draw_cases(exercise.sizes.distinct[:1], seed=3)[0]
    reference = exercise.compute(case)
    for name in exercise.gradients:
        values = case.inputs[name.removeprefix("d")]
        numeric = np.zeros_like(values)
        for index in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[index] = 1e-5
            upper, lower = (
                loss(exercise, case.inputs | {name.removeprefix("d"): values + sign * step}, case)
                for sign in (1, -1)
            )
            numeric[index] = (upper - lower) / 2e-5
        np.testing.assert_allclose(reference.total(name), numeric, rtol=1e-6, atol=1e-7)


def loss(exercise: Exercise, inputs: dict[str, Any], case: Case) -> float:
    moved = Case(case.sizes, inputs, case.options, case.dy)
    return float(np.sum(exercise.compute(moved).total(exercise.outputs[0]) * case.dy))


@pytest.mark.parametrize(
    "name",
    ["softmax", "silu", "gelu", "relu", "rms_norm", "layer_norm", "linear", "embedding",
     "cross_entropy", "attention"],
)  # fmt: skip
def test_the_operations_of_glasslm_are_right(name: str) -> None:
    assert check(getattr(ops, name), name).verdict == "right"


def test_mistakes_of_an_exercise_predict_other_numbers_than_the_reference() -> None:
    """A mistake that changes nothing in any case would be named when something else is wrong."""
    for exercise in EXERCISES:
        cases = exercise.draw_cases(exercise.sizes.distinct + exercise.more_axes, seed=0)
        for mistake in exercise.mistakes:
            changed = [changes_result(exercise, case, mistake.changes) for case in cases]
            assert any(changed), (exercise.name, mistake)


def changes_result(exercise: Exercise, case: Case, changes: dict[str, Any]) -> bool:
    try:
        changed: Reference = exercise.compute(case, **changes)
    except (ValueError, IndexError):  # a mistake that runs with equal sizes only
        return True
    right = exercise.compute(case)
    return any(
        np.shape(changed.total(name)) != np.shape(right.total(name))
        or not np.allclose(changed.total(name), right.total(name), 1e-7, 1e-12, equal_nan=True)
        for name in changed.terms
    )
