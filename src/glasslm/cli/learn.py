"""glasslm learn: exercises in hand-written operations, and what is wrong with yours."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.cli import learn_class, learn_train, parsing
from glasslm.cli.flag_groups import JsonFlag
from glasslm.config.config_fields import optional_flag
from glasslm.course.learn import progress, starter
from glasslm.course.learn.checking import check_file
from glasslm.course.learn.exercises import COURSE, load_exercise
from glasslm.course.learn.verdict import Verdict
from glasslm.errors import InputError, require
from glasslm.text import align_columns, notify, print_escaped, quote_path, suggest_name

HELP = """usage: glasslm learn list | start NAME | hint NAME | solution NAME | check FILE
       glasslm learn train FILE | status
       glasslm learn class new | grade      (for teachers)

  list       list the exercises in the order of a course, with your marks
  start      write a file with the signature, the shapes and one worked example
  hint       show one more hint
  solution   show the solution and its derivation
  check      say what is wrong with the functions of a file
  train      train a small model with your operation, beside the engine's own
  status     show what you have done so far
  class      for teachers: hand out exercises, grade submissions

Examples:
  glasslm learn start rms_norm
  glasslm learn check rms_norm.py
  glasslm learn train rms_norm.py --budget 60s"""

NameArgument = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="NAME", help="Name of an exercise: see glasslm learn list."),
]

LIST_HELP = """List the exercises in the order of a course, with what each needs and your marks.

Example:
  glasslm learn list"""

STATUS_HELP = """Show what you have done so far, and which exercise comes next.

Example:
  glasslm learn status"""

START_HELP = """Write NAME.py with the signature, the shapes and one worked example.
A file that exists is not overwritten.

Example:
  glasslm learn start rms_norm --dir homework"""

HINT_HELP = """Show one more hint on an exercise.

Example:
  glasslm learn hint rms_norm"""

SOLUTION_HELP = """Show the solution of an exercise and its derivation. Your status notes it.

Example:
  glasslm learn solution rms_norm"""

CHECK_HELP = """Say what is right and what is wrong with the functions of a file, in about a second.

The output is compared on random inputs of several shapes and types, then the
gradients in float64 with the reference's; a backward pass whose forward is wrong,
with finite differences of that forward. The file runs in a process of its own
with limits of time and memory, and is not changed.

Exit code: 0 all right, 1 something wrong, 2 the file cannot be read.

Examples:
  glasslm learn check rms_norm.py
  glasslm learn check homework.py --exercise attention --picture difference.png"""


@dataclass(frozen=True)
class NoFlags:
    """A command without arguments."""


@dataclass(frozen=True)
class StartFlags:
    """The exercise to start."""

    name: NameArgument
    dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path()
    """Folder of the new file."""


@dataclass(frozen=True)
class NameFlags:
    """The exercise."""

    name: NameArgument


@dataclass(frozen=True)
class CheckFlags:
    """The file to check."""

    file: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE", help="Your Python file.")
    ]
    exercise: Annotated[
        str | None, optional_flag("NAME", "that of the file's name, else all of its functions")
    ] = None
    """Check the function of this exercise alone."""
    seed: int = 0
    """Seed of the inputs."""
    picture: Annotated[Path | None, optional_flag("FILE.png", "none")] = None
    """Draw which elements are wrong into a PNG file."""
    json: JsonFlag = False


def main(argv: list[str]) -> int:
    if not argv or argv[0] in parsing.HELP_FLAGS:
        print(HELP)
        return 0
    actions: dict[str, Callable[[list[str]], int]] = {
        "list": _list,
        "start": _start,
        "hint": _hint,
        "solution": _solution,
        "check": _check,
        "train": learn_train.main,
        "status": _status,
        "class": learn_class.main,
    }
    if argv[0] not in actions:
        hint = suggest_name(argv[0], actions) or f": choose from {', '.join(actions)}"
        raise InputError(f"there is no 'learn {argv[0]}'{hint}")
    return actions[argv[0]](argv[1:])


def _list(argv: list[str]) -> int:
    parsing.parse(NoFlags, argv, "glasslm learn list", LIST_HELP)
    learner = progress.load_progress(notify)
    rows = [("", "exercise", "what", "needs", "forward", "backward", "state")]
    for number, name in enumerate(COURSE, 1):
        exercise, state = load_exercise(name), learner.state(name)
        backward = (state.backward or "-") if exercise.has_backward else ""
        needs = ", ".join(exercise.needs)
        row = (f"{number}", name, exercise.title, needs, state.forward or "-", backward)
        rows.append((*row, state.describe()))
    for line in align_columns(rows):
        print(line)
    notify("\nstart with: glasslm learn start NAME")
    return 0


def _start(argv: list[str]) -> int:
    flags = parsing.parse(StartFlags, argv, "glasslm learn start", START_HELP)
    exercise = load_exercise(flags.name)
    path = flags.dir / f"{exercise.name}.py"
    if not flags.dir.is_dir():
        raise InputError(f"--dir is {flags.dir}: expected a folder that exists")
    try:
        with path.open("x", encoding="utf-8") as file:  # never overwrites
            file.write(starter.starter_text(exercise))
    except FileExistsError:
        raise InputError(
            f"{path} exists already and is not overwritten: "
            f"go on with glasslm learn check {quote_path(path)}"
        ) from None
    learner = progress.load_progress(notify)
    progress.save_progress(learner.with_changes(exercise.name, started=True), notify)
    print_escaped(str(path))
    missing = [name for name in exercise.needs if learner.state(name).verdict != "right"]
    if missing:
        notify(f"note: it builds on {', '.join(missing)}, which you have not solved yet")
    notify(f"then: glasslm learn check {quote_path(path)}")
    return 0


def _hint(argv: list[str]) -> int:
    flags = parsing.parse(NameFlags, argv, "glasslm learn hint", HINT_HELP)
    exercise = load_exercise(flags.name)
    learner = progress.load_progress(notify)
    count, total = learner.state(exercise.name).hints, len(exercise.hints)
    for number in range(min(count + 1, total)):
        print(f"{number + 1}/{total}  {exercise.hints[number]}")
    if count >= total:
        notify(
            f"there are no more hints; glasslm learn solution {exercise.name} shows the solution"
        )
        return 0
    progress.save_progress(learner.with_changes(exercise.name, hints=count + 1), notify)
    return 0


def _solution(argv: list[str]) -> int:
    flags = parsing.parse(NameFlags, argv, "glasslm learn solution", SOLUTION_HELP)
    exercise = load_exercise(flags.name)
    print(starter.solution_source(exercise))
    if derivation := starter.derivation_text(exercise):
        print(derivation)
    learner = progress.load_progress(notify)
    progress.save_progress(learner.with_changes(exercise.name, solution_seen=True), notify)
    return 0


def _check(argv: list[str]) -> int:
    begin = time.perf_counter()
    flags = parsing.parse(CheckFlags, argv, "glasslm learn check", CHECK_HELP)
    require(flags.seed >= 0, "--seed", flags.seed, "0 or more")
    parsing.require_png("--picture", flags.picture)
    notify(f"checking {flags.file} ...")
    try:
        verdicts = check_file(flags.file, flags.seed, flags.exercise)
    except InputError as error:
        if flags.json:
            unread = Verdict("", "unknown", "unknown", "exception", str(error))
            print(json.dumps(unread.to_json()))
        raise
    learner = progress.load_progress(notify)
    for verdict in verdicts:
        learner = learner.with_verdict(verdict)
    progress.save_progress(learner, notify)
    for verdict in verdicts:
        if flags.json:
            print(json.dumps(verdict.to_json()))
        else:
            print_escaped(f"{verdict}\n" if len(verdicts) > 1 else str(verdict))
    if flags.picture is not None:
        _draw(flags.picture, verdicts)
    is_right = all(verdict.is_right for verdict in verdicts)
    if not is_right and not flags.json:
        _suggest_next(verdicts)
    print(f"{time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return 0 if is_right else 1


def _draw(path: Path, verdicts: list[Verdict]) -> None:
    """Draw the first wrong verdict whose example has numbers to compare."""
    from glasslm.course.learn.difference_picture import draw_difference, has_difference

    for verdict in verdicts:
        if has_difference(verdict):
            draw_difference(verdict, path)
            notify(f"picture: {path}")
            return
    notify("note: no picture, for no verdict has numbers to compare")


def _suggest_next(verdicts: list[Verdict]) -> None:
    wrong = next(verdict for verdict in verdicts if not verdict.is_right)
    notify(f"\na hint: glasslm learn hint {wrong.exercise}")


def _status(argv: list[str]) -> int:
    parsing.parse(NoFlags, argv, "glasslm learn status", STATUS_HELP)
    learner = progress.load_progress(notify)
    names = COURSE
    solved = [name for name in names if learner.state(name).verdict == "right"]
    print(f"{len(solved)} of {len(names)} exercises solved")
    rows = [("exercise", "forward", "backward", "last verdict", "checks", "hints", "notes")]
    for name in names:
        state = learner.state(name)
        if state != progress.ExerciseState():
            backward = (state.backward or "-") if load_exercise(name).has_backward else ""
            notes = {"trained": state.trained, "solution seen": state.solution_seen}
            remarks = ", ".join(note for note, applies in notes.items() if applies)
            counts = (str(state.checks), str(state.hints))
            verdict = state.verdict.replace("_", " ") or "-"
            rows.append((name, state.forward or "-", backward, verdict, *counts, remarks))
    if len(rows) > 1:
        print("", *align_columns(rows), sep="\n")
    ahead = [name for name in names if name not in solved]
    ready = [name for name in ahead if set(load_exercise(name).needs) <= set(solved)]
    if ready:
        print(f"\nnext: glasslm learn start {ready[0]}   ({load_exercise(ready[0]).title})")
    return 0
