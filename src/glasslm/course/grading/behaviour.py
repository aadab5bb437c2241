"""What a submission's function does beyond right and wrong: loops, and remembered results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glasslm.course.grading.points import Growth
from glasslm.course.isolation.evidence import Flag
from glasslm.course.isolation.learner_process import LearnerProcess
from glasslm.course.learn.comparison import wrong_results
from glasslm.course.learn.exercise import Case, CaseRandom, Exercise
from glasslm.course.learn.observation import observe

Function = Callable[..., Any]
SIZE_RATIO = 3  # between the dimensions of the two cases whose instructions are counted


def measure_growth(
    process: LearnerProcess, function: Function, exercise: Exercise, seed: int
) -> tuple[Growth | None, list[Flag]]:
    """Instructions of Python in two sizes, forward and backward.

    Growth is None where a call fails or gives wrong results. The function was right before, so
    wrong results are evidence that it looks for the count, or at the size.
    """
    sizes = exercise.sizes.distinct[0]
    names = exercise.outputs + exercise.gradients
    elements, instructions = [], []
    process.counts_instructions = True
    try:
        # Python 3.12 and later count from the second call of a function on.
        for ratio in (1, 1, SIZE_RATIO):
            scaled = {name: size * ratio for name, size in sizes.items()}
            case = exercise.draw(CaseRandom((seed, 9, ratio)), scaled, 0, False)
            process.instructions = 0
            observation = observe(function, exercise, case)
            if observation.trouble:
                return None, []
            if wrong := wrong_results(exercise, case, observation, names):
                return None, [_flag_wrong_count(wrong[0], scaled if ratio > 1 else {})]
            elements.append(count_elements(case))
            instructions.append(process.instructions)
    finally:
        process.counts_instructions = False
    return Growth(elements[1], instructions[1], elements[2], instructions[2]), []


def _flag_wrong_count(name: str, larger: dict[str, int]) -> Flag:
    """Evidence that a right function is wrong where instructions are counted, or in `larger`."""
    if not larger:
        return Flag("checker", 0, f"{name} is wrong while instructions are counted")
    sizes = ", ".join(f"{dimension} = {size}" for dimension, size in larger.items())
    return Flag("remembered", 0, f"{name} is right for small inputs, wrong with {sizes}")


def count_elements(case: Case) -> int:
    """The number of elements of all arrays that a call gets."""
    return sum(value.size for value in case.inputs.values() if isinstance(value, np.ndarray))


def find_remembered(function: Function, exercise: Exercise, seed: int) -> list[Flag]:
    """Evidence that results do not depend on the inputs: two cases with the same numbers.

    Arrays of one number are no evidence: unfinished code returns zeros.
    """
    sizes = exercise.sizes.distinct[:1]
    first, second = (exercise.draw_cases(sizes, seed + n, start=8)[0] for n in (1, 2))
    results = [observe(function, exercise, case).results for case in (first, second)]
    right = [exercise.compute(case) for case in (first, second)]
    for name in (*exercise.outputs, *exercise.gradients):
        arrays = [result[name] for result in results if isinstance(result.get(name), np.ndarray)]
        if len(arrays) < 2 or np.array_equal(right[0].total(name), right[1].total(name)):
            continue
        if len(np.unique(arrays[0])) > 2 and np.array_equal(*arrays):
            detail = f"{name} {arrays[0].shape} is the same for two different inputs"
            return [Flag("remembered", 0, detail)]
    return []


def find_example_numbers(source: str, exercise: Exercise, example: Case) -> list[Flag]:
    """Evidence that the text holds results of the worked example: at least three of them."""
    import ast

    reference = exercise.compute(example)
    wanted = {
        f"{abs(value):.4g}"
        for name in (*exercise.outputs, *exercise.gradients)
        for value in np.ravel(np.asarray(reference.total(name), dtype=object))
        if isinstance(value, float) and len(f"{abs(value):.4g}".strip("0.")) >= 3
    }
    lines = source.splitlines()
    found = {
        f"{abs(node.value):.4g}": node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, float)
    }
    hits = sorted(wanted & found.keys())
    if len(hits) < 3:
        return []
    line = found[hits[0]]
    detail = f"results of the worked example stand in the text: {', '.join(hits[:4])}"
    return [Flag("remembered", line, detail, lines[line - 1].strip()[:200])]
