"""glasslm learn class: hand out exercises to a class, and grade what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from glasslm.cli import parsing
from glasslm.config.config_fields import optional_flag
from glasslm.errors import InputError, require
from glasslm.text import align_columns, notify, plural, print_escaped, suggest_name, to_one_line

if TYPE_CHECKING:
    from glasslm.course.grading.class_folder import Class
    from glasslm.course.grading.marking import Record
    from glasslm.course.grading.result_files import Flags

MAX_NAMES = 10  # in one warning

HELP = """usage: glasslm learn class new | grade SUBMISSIONS [FLAGS]

  new      write a folder to hand out: a file to start with for each exercise,
           and instructions; and class.json, which stays with you
  grade    grade what students handed in: tables, and files for Gradescope
           and otter-grader

Examples:
  glasslm learn class new --exercises rms_norm,silu --students roster.csv
  glasslm learn class grade submissions --out grades

docs/teaching.md has the whole way, and what this does not protect from."""

NEW_HELP = """Write the folder of a class. Its part `handout` is for the students. Its file
class.json has the seed of the hidden cases and stays with you.

Example:
  glasslm learn class new --exercises rms_norm,silu --students roster.csv"""

GRADE_HELP = """Grade the submissions of a class: SUBMISSIONS/STUDENT/EXERCISE.py, or
STUDENT_EXERCISE.py, or STUDENT.zip. Each file runs in a process of its own, with
limits. The same submission always gets the same marks. A call after an
interruption continues.

This is no sandbox: docs/teaching.md says how to grade in a container.

Example:
  glasslm learn class grade submissions --out grades"""


@dataclass(frozen=True)
class NewFlags:
    """A new class."""

    exercises: Annotated[str, tyro.conf.arg(metavar="NAME,NAME...")]
    """Names of exercises, with commas: see glasslm learn list."""
    students: Annotated[Path, tyro.conf.arg(metavar="ROSTER.csv")]
    """A table with a column `student`: an id for each student."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("class")
    """The new folder."""
    seed: Annotated[int | None, optional_flag("N", "random")] = None
    """Seed of the hidden cases. Keep it secret."""


@dataclass(frozen=True)
class GradeFlags:
    """Submissions to grade."""

    submissions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SUBMISSIONS")]
    """The folder of what students handed in."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder of the results."""
    class_file: Annotated[Path | None, optional_flag("PATH", "found beside SUBMISSIONS")] = None
    """class.json of `class new`, or its folder."""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """Processes side by side."""
    cpu_limit: Annotated[int, tyro.conf.arg(metavar="SECONDS")] = 10
    """CPU time of each file. A right solution takes less than one second."""


def main(argv: list[str]) -> int:
    """Run `new` or `grade`."""
    if not argv or argv[0] in parsing.HELP_FLAGS:
        print(HELP)
        return 0
    actions = {"new": _new, "grade": _grade}
    if argv[0] not in actions:
        hint = suggest_name(argv[0], actions) or ": choose new or grade"
        raise InputError(f"there is no 'learn class {argv[0]}'{hint}")
    return actions[argv[0]](argv[1:])


def _new(argv: list[str]) -> int:
    flags = parsing.parse(NewFlags, argv, "glasslm learn class new", NEW_HELP)
    from glasslm.course.grading import class_folder
    from glasslm.course.grading.roster import read_roster

    names = tuple(name.strip() for name in flags.exercises.split(",") if name.strip())
    course = class_folder.new_class(flags.out, names, read_roster(flags.students), flags.seed)
    n_exercises, n_students = len(course.exercises), len(course.students)
    print_escaped(f"{plural(n_exercises, 'exercise')} for {plural(n_students, 'student')}")
    print_escaped(f"hand out: {flags.out / class_folder.HANDOUT_FOLDER}")
    print_escaped(
        f"keep secret: {flags.out / class_folder.CLASS_FILE} (the seed of the hidden cases)"
    )
    return 0


def _grade(argv: list[str]) -> int:
    flags = parsing.parse(GradeFlags, argv, "glasslm learn class grade", GRADE_HELP)
    require(flags.workers >= 1, "--workers", flags.workers, "1 or more")
    require(flags.cpu_limit >= 1, "--cpu-limit", flags.cpu_limit, "1 or more seconds")
    from glasslm.course.grading.grading import grade_class

    if not flags.submissions.is_dir():
        raise InputError(f"{flags.submissions} is no folder: give the folder of the submissions")
    course = _find_class(flags)
    records, evidence = grade_class(
        course, flags.submissions, flags.out, flags.workers, flags.cpu_limit, notify
    )
    _note_limits(records)
    _print_summary(records, evidence)
    print_escaped(f"grades: {flags.out / 'grades.csv'}")
    return 0


def _find_class(flags: GradeFlags) -> Class:
    """The class in class.json; without it all students and exercises of the submissions."""
    from glasslm.course.grading import class_folder
    from glasslm.course.grading.roster import find_id_problem
    from glasslm.course.grading.submissions import (
        find_exercises,
        find_students,
        find_unread_files,
    )

    _warn_of_names(
        find_unread_files(flags.submissions),
        "a folder, a .py file or a .zip file",
        "unpack it into a folder with the student's id",
    )
    path = flags.class_file or class_folder.find_class(flags.submissions)
    if path is not None:
        course = class_folder.load_class(path)
        notify(f"class: {path} ({plural(len(course.students), 'student')})")
        names = find_students(flags.submissions, course.exercises)
        _warn_of_names([name for name in names if name not in course.students], "in the roster")
        return course
    exercises = find_exercises(flags.submissions)
    names = find_students(flags.submissions, exercises)
    students = [name for name in names if not find_id_problem(name)]
    if not exercises or not students:
        raise InputError(
            f"{flags.submissions} has no STUDENT/EXERCISE.py, STUDENT_EXERCISE.py or STUDENT.zip "
            "with the name of an exercise: see glasslm learn list"
        )
    notify(
        "note: no class.json was found: the hidden cases are those of seed 0, which students can "
        "know, and who handed in nothing is not listed; name it with --class-file"
    )
    _warn_of_names([name for name in names if name not in students], "a student's id")
    return class_folder.Class(tuple(exercises), tuple(students), 0)


def _warn_of_names(
    names: list[str], what: str, cure: str = "rename the folder or file to the student's id"
) -> None:
    """Say which folders and files are not graded, because they are not `what`."""
    if names:
        shown = ", ".join(to_one_line(name, 40) for name in names[:MAX_NAMES])
        more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
        notify(f"warning: not graded, because it is not {what}: {shown}{more}: {cure}")


def _note_limits(records: Sequence[Record]) -> None:
    """Say which limits the system does not keep."""
    started = [record["limits"] for record in records if record["limits"]]
    missing = {name for limits in started for name, is_kept in limits.items() if not is_kept}
    texts = {
        "network": "the network, other programs and changes of files could not be forbidden",
        "memory": "the memory could not be limited",
        "cpu": "the CPU time could not be limited; the time by the clock was",
    }
    for name in sorted(missing):
        notify(f"warning: {texts[name]} on this system: grade in a container (docs/teaching.md)")


def _print_summary(records: Sequence[Record], flags: Flags) -> None:
    """One line for each exercise, and the number of flags."""
    from glasslm.course.grading.result_files import sum_points

    rows = [("exercise", "handed in", "right", "mean points", "flagged")]
    for exercise in dict.fromkeys(record["exercise"] for record in records):
        own = [record for record in records if record["exercise"] == exercise]
        flagged = sum(bool(flags[record["student"], exercise]) for record in own)
        rows.append(
            (
                exercise,
                f"{sum(bool(record['origin']) for record in own)} of {len(own)}",
                str(sum(record["verdict"] == "right" for record in own)),
                f"{sum_points(own) / len(own):.2f} of {sum_points(own[:1], 'possible'):g}",
                str(flagged),
            )
        )
    for line in align_columns(rows):
        print_escaped(line)
