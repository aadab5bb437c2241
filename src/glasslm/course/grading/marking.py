"""Marks for one file: the verdict of the checker, points, and evidence of what looks odd.

The learner's functions run in a process of their own. The right results, the comparison and the
seeds are in this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from glasslm.course.grading.behaviour import find_example_numbers, find_remembered, measure_growth
from glasslm.course.grading.near_copies import fingerprint
from glasslm.course.grading.points import Growth, give_points
from glasslm.course.grading.source_flags import find_source_flags
from glasslm.course.isolation.evidence import Flag
from glasslm.course.isolation.learner_process import ForkServer, LearnerProcess
from glasslm.course.isolation.process_limits import Limits
from glasslm.course.isolation.remote_error import LearnerStopped
from glasslm.course.isolation.remote_function import RemoteFunction, load_function
from glasslm.course.learn import check_function
from glasslm.course.learn.exercise import Exercise
from glasslm.course.learn.exercises import load_exercise
from glasslm.course.learn.observation import locate_error
from glasslm.course.learn.starter import starter_text
from glasslm.course.learn.trial import Trial
from glasslm.course.learn.verdict import Mark, Verdict, failed_verdict
from glasslm.text import describe_error, suggest_name

WALL_S_PER_CPU_S = 6.0  # a busy machine takes longer by the clock


class Job(TypedDict):
    """One file to mark.

    `problem` says why there is no source; the seed draws the hidden cases; `cpu_s` is the limit of
    CPU time in seconds.
    """

    student: str
    exercise: str
    origin: str
    source: str
    problem: str
    seed: int
    cpu_s: int


class Record(TypedDict):
    """The marks of one file. `parts` and `flags` have the fields of Part and Flag.

    `growth` has those of Growth, and `fingerprint` is that of near_copies.py. `limits` are those
    that the system keeps for the learner's process; empty where none was started.
    """

    student: str
    exercise: str
    origin: str
    forward: Mark
    backward: Mark
    verdict: str
    sentence: str
    where: str
    parts: list[dict[str, Any]]
    flags: list[dict[str, Any]]
    growth: dict[str, Any] | None
    fingerprint: dict[str, int]
    limits: dict[str, bool]


@dataclass
class Marks:
    """What marking has found so far."""

    verdict: Verdict
    forward: Mark
    backward: Mark
    is_stable: bool = False
    growth: Growth | None = None


def mark(job: Job, server: ForkServer | None) -> Record:
    """The record of one file. The same job gives the same record."""
    exercise = load_exercise(job["exercise"])
    if job["problem"]:
        verdict = Verdict(exercise.name, "missing", "missing", "not_implemented", job["problem"])
        return _record(job, exercise, Marks(verdict, "missing", "missing"), [], {})
    flags = find_source_flags(job["source"])
    limits = Limits(cpu_s=job["cpu_s"], wall_s=WALL_S_PER_CPU_S * job["cpu_s"])
    with LearnerProcess(server, limits) as process:
        marks = _mark_in_process(process, exercise, job["source"], job["seed"], flags)
        flags += process.finish()
        kept = process.limits_kept
    if marks.verdict.verdict != "exception":
        example = exercise.draw_cases(exercise.sizes.small, 0)[-1]
        flags += find_example_numbers(job["source"], exercise, example)
    return _record(job, exercise, marks, flags, kept)


def _mark_in_process(
    process: LearnerProcess, exercise: Exercise, source: str, seed: int, flags: list[Flag]
) -> Marks:
    """Load the file, check its function, and look at how it behaves; evidence goes to `flags`."""
    file = f"{exercise.name}.py"
    try:
        function = _load(process, file, source, exercise.name)
        if isinstance(function, str):
            return _failed(exercise, function)
        marks = _mark_numbers(function, exercise, seed)
    except LearnerStopped as stopped:
        return _failed(exercise, str(stopped))
    except Exception as error:  # of the learner's file, when it is loaded
        return _failed(exercise, locate_error(error, file) + describe_error(error))
    try:
        flags += find_remembered(function, exercise, seed)
        if exercise.has_backward and marks.forward == marks.backward == "right":
            marks.growth, growth_flags = measure_growth(process, function, exercise, seed)
            flags += growth_flags
    except (LearnerStopped, Exception):  # of the learner's function, which the verdict names
        pass
    return marks


def _load(process: LearnerProcess, file: str, source: str, name: str) -> RemoteFunction | str:
    """The function of the exercise, or why there is none."""
    names = process.load(file, source)
    function = load_function(process, file, name) if name in names else None
    if function is None:
        hint = suggest_name(name, names)
        return f"the file has no function {name}{hint}"
    return function


def _mark_numbers(function: RemoteFunction, exercise: Exercise, seed: int) -> Marks:
    """The checker's verdict, and marks for ordinary inputs alone.

    Large values and types are marked as stability. The checker's own marks call a function wrong
    that fails there.
    """
    verdict = check_function(exercise, function, seed)
    marks = Marks(verdict, verdict.forward, verdict.backward, verdict.is_right)
    if verdict.verdict in ("unstable", "dtype"):
        trial = Trial(function, exercise, seed)
        if not any(observation.trouble for observation in trial.observations):
            wrong = [
                trial.wrong_names(trial.distinct, trial.observations, names)
                for _, names in trial.stages
            ]
            marks.forward = "wrong" if wrong[0] else "right"
            if exercise.has_backward:
                marks.backward = "wrong" if wrong[1] else "right"
    return marks


def _failed(exercise: Exercise, sentence: str) -> Marks:
    verdict = failed_verdict(exercise, sentence)
    return Marks(verdict, verdict.forward, verdict.backward)


def _record(
    job: Job, exercise: Exercise, marks: Marks, flags: list[Flag], limits: dict[str, bool]
) -> Record:
    parts = give_points(
        has_backward=exercise.has_backward,
        forward=marks.forward,
        backward=marks.backward,
        is_stable=marks.is_stable,
        growth=marks.growth,
    )
    return {
        "student": job["student"],
        "exercise": exercise.name,
        "origin": job["origin"],
        "forward": marks.forward,
        "backward": marks.backward,
        "verdict": marks.verdict.verdict,
        "sentence": marks.verdict.sentence,
        "where": marks.verdict.where,
        "parts": [part.to_json() for part in parts],
        "flags": [flag.to_json() for flag in sorted(set(flags))],
        "growth": marks.growth.to_json() if marks.growth else None,
        "fingerprint": fingerprint(job["source"], starter_text(exercise)),
        "limits": limits,
    }
