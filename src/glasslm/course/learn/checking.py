"""The checker as functions: of a Python function in this process, of a file in a limited one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from glasslm.course.learn.exercise import Exercise
from glasslm.course.learn.exercise_file import read_exercise_file
from glasslm.course.learn.exercises import COURSE, load_exercise
from glasslm.course.learn.judge import judge
from glasslm.course.learn.limited_process import check_in_process
from glasslm.course.learn.observation import locate_error, source_file
from glasslm.course.learn.signature import judge_signature
from glasslm.course.learn.verdict import Verdict, failed_verdict
from glasslm.errors import InputError
from glasslm.text import suggest_name


def check(function: Callable[..., Any], exercise: str = "", seed: int = 0) -> Verdict:
    """The verdict on a function; a notebook shows it.

    Args:
        function: Your function, such as `def rms_norm(x, gain, eps=1e-5): ... return y, backward`.
        exercise: The exercise; by default the function's name.
        seed: Seed of the inputs.

    Returns:
        What is right and what is wrong, with the smallest example.

    Raises:
        InputError: There is no such exercise (a ValueError).
    """
    name = exercise or getattr(function, "__name__", "")
    if not callable(function):
        raise InputError(f"{name or function!r} is no function: give the function itself")
    if name not in COURSE:
        hint = suggest_name(name, COURSE) or ": name it, as in check(f, 'rms_norm')"
        raise InputError(f"there is no exercise '{name}'{hint}")
    return check_function(load_exercise(name), function, seed)


def check_function(exercise: Exercise, function: Callable[..., Any], seed: int = 0) -> Verdict:
    """The verdict on a function, which is called in this process and without limits."""
    problem = judge_signature(exercise, function)
    if problem:
        return problem
    try:
        return judge(function, exercise, seed)
    except MemoryError as error:
        where = locate_error(error, source_file(function))
        return failed_verdict(exercise, f"{where}MemoryError: more memory than there is")


def check_file(path: Path | str, seed: int = 0, exercise: str | None = None) -> list[Verdict]:
    """The verdicts on the functions of a file, in processes with limits of time and memory.

    Args:
        path: The learner's file, which is never changed.
        seed: Seed of the inputs.
        exercise: Check this one alone. By default it is the one that the file is named for, or
            all whose functions the file defines.

    Returns:
        One verdict for each exercise, in the order of the file.

    Raises:
        InputError: The file cannot be read, or has no function of an exercise: one line that
            names the learner's line.
    """
    file = read_exercise_file(Path(path), exercise)
    verdicts: list[Verdict] = []
    while len(verdicts) < len(file.exercises):  # a process that dies leaves the rest to the next
        verdicts += check_in_process(file.path, file.exercises[len(verdicts) :], seed)
    return verdicts
