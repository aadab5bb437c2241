"""What a learner has done so far: marks, hints and solutions seen, in one JSON of the user's data.

The file is `learn.json` in the user's data folder (XDG_DATA_HOME on Linux). A damaged one is said
and replaced.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.course.learn.verdict import Verdict
from glasslm.text import Notify

FORMAT = 1
MAX_STATE_BYTES = 1 << 20


@dataclass(frozen=True)
class ExerciseState:
    """One exercise of a learner."""

    forward: str = ""
    """Mark of the last check: right, wrong, missing or unknown; empty before the first."""
    backward: str = ""
    verdict: str = ""
    checks: int = 0
    hints: int = 0
    """Hints that were shown."""
    solution_seen: bool = False
    started: bool = False
    trained: bool = False

    def describe(self) -> str:
        """The state in a word."""
        if self.verdict == "right":
            return "solved, solution seen" if self.solution_seen else "solved"
        if self.checks:
            return "tried"
        return "started" if self.started else ""


@dataclass(frozen=True)
class CourseProgress:
    """The states of all exercises by name; an exercise that is not in it is new."""

    exercises: dict[str, ExerciseState] = field(default_factory=dict)

    def state(self, name: str) -> ExerciseState:
        """The state of an exercise."""
        return self.exercises.get(name, ExerciseState())

    def with_changes(self, name: str, **changes: Any) -> CourseProgress:
        """Progress in which the state of one exercise has other fields."""
        return CourseProgress(self.exercises | {name: replace(self.state(name), **changes)})

    def with_verdict(self, verdict: Verdict) -> CourseProgress:
        """Progress after a check."""
        return self.with_changes(
            verdict.exercise,
            forward=verdict.forward,
            backward=verdict.backward,
            verdict=verdict.verdict,
            checks=self.state(verdict.exercise).checks + 1,
        )


def progress_path() -> Path:
    """The file of the learner's progress."""
    import platformdirs

    return Path(platformdirs.user_data_dir("glasslm")) / "learn.json"


def load_progress(notify: Notify) -> CourseProgress:
    """The learner's progress; a new one, with a note, where the file cannot be used."""
    path = progress_path()
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MAX_STATE_BYTES))
        if value["format"] != FORMAT:
            raise ValueError(f"its format is {value['format']}, not {FORMAT}")
        return CourseProgress({str(k): _read_state(v) for k, v in value["exercises"].items()})
    except FileNotFoundError:
        return CourseProgress()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        notify(f"note: {path} cannot be used ({type(error).__name__}): progress starts anew")
        return CourseProgress()


def _read_state(value: dict[str, Any]) -> ExerciseState:
    """The state of an exercise from JSON. Raises ValueError or TypeError."""
    state = ExerciseState(**value)
    for known in fields(state):
        if type(getattr(state, known.name)) is not type(known.default):
            raise ValueError(f"{known.name} has a wrong type")
    return state


def save_progress(progress: CourseProgress, notify: Notify) -> None:
    """Write the progress; says so where it cannot be written, since it is no reason to fail."""
    path = progress_path()
    states = {name: asdict(state) for name, state in progress.exercises.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {"format": FORMAT, "exercises": states})
    except OSError as error:
        notify(f"note: the progress is not saved: {path} cannot be written ({error.strerror})")
