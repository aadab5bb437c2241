"""A class: its exercises, its students, and the secret seed of the hidden cases."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from glasslm import files
from glasslm.course.grading.handout import handout_files
from glasslm.course.grading.roster import find_id_problem
from glasslm.course.learn.exercises import COURSE, require_exercise
from glasslm.errors import DamagedError, InputError

CLASS_FILE = "class.json"
HANDOUT_FOLDER = "handout"
FORMAT = 1


@dataclass(frozen=True)
class Class:
    """A class. Its seed decides the hidden cases and stays with the teacher.

    Args:
        exercises: Names of exercises in the order of the course.
        students: Ids; () where the class has no roster, and everybody who hands in is graded.
        seed: Of the hidden cases.
    """

    exercises: tuple[str, ...]
    students: tuple[str, ...]
    seed: int

    def student_seed(self, student: str, exercise: str) -> int:
        """The seed of one student's hidden cases: the same number on every machine.

        >>> Class((), (), 7).student_seed("ada", "silu")
        3440901820
        """
        text = f"{self.seed}\n{student}\n{exercise}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def new_class(
    out: Path, exercises: tuple[str, ...], students: list[str], seed: int | None
) -> Class:
    """Write the folder of a new class: HANDOUT_FOLDER for the students, CLASS_FILE for the teacher.

    Args:
        out: The folder, which is new or empty.
        exercises: Names, in any order.
        students: Ids.
        seed: Of the hidden cases; None draws one that nobody can guess.
    """
    chosen = order_exercises(exercises)
    course = Class(chosen, tuple(students), secrets.randbits(63) if seed is None else seed)
    with files.atomic_path(out) as folder:
        (folder / HANDOUT_FOLDER).mkdir(parents=True)
        for name, text in handout_files(chosen).items():
            files.write_atomic(folder / HANDOUT_FOLDER / name, text.encode())
        files.write_json(
            folder / CLASS_FILE,
            {
                "format": FORMAT,
                "seed": course.seed,
                "exercises": list(course.exercises),
                "students": list(course.students),
            },
        )
    return course


def load_class(path: Path) -> Class:
    """The class of a CLASS_FILE, or of the folder that has it.

    Raises DamagedError where the file was changed, InputError where an exercise is not known.
    """
    file = path / CLASS_FILE if path.is_dir() else path
    values = files.read_json(file)
    try:
        course = Class(tuple(values["exercises"]), tuple(values["students"]), values["seed"])
        is_sound = (
            type(course.seed) is int
            and all(isinstance(name, str) for name in course.exercises + course.students)
            and not any(map(find_id_problem, course.students))
        )
    except (KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise DamagedError(
            f"{file} is not as `glasslm learn class new` wrote it: take a copy of it"
        )
    return Class(order_exercises(course.exercises), course.students, course.seed)


def find_class(submissions: Path) -> Path | None:
    """The CLASS_FILE beside a folder of submissions, in it, or in the working folder."""
    folders = (submissions, submissions.resolve().parent, Path(), Path("class"))
    return next((path for f in folders if (path := f / CLASS_FILE).is_file()), None)


def order_exercises(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names in the order of the course. Raises InputError for unknown and repeated ones."""
    for name in names:
        require_exercise(name)
        if names.count(name) > 1:
            raise InputError(f"the exercise '{name}' is named twice: leave one of them out")
    if not names:
        raise InputError("no exercise is named: choose some from glasslm learn list")
    return tuple(name for name in COURSE if name in names)
