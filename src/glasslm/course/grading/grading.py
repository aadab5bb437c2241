"""Grade the submissions of a class. What is graded already is not graded again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from glasslm import files
from glasslm.course.grading.class_folder import Class
from glasslm.course.grading.marking import Job, Record
from glasslm.course.grading.marking_pool import mark_all
from glasslm.course.grading.near_copies import NearCopy, find_near_copies
from glasslm.course.grading.result_files import Flags, write_results
from glasslm.course.grading.submissions import collect_submissions
from glasslm.course.isolation.evidence import Flag
from glasslm.errors import DamagedError, InputError
from glasslm.text import Notify, Progress

MARKS_FOLDER = "marks"


def grade_class(
    course: Class, submissions: Path, out: Path, workers: int, cpu_s: int, notify: Notify
) -> tuple[list[Record], Flags]:
    """Grade all submissions of a class and write the results to `out` (result_files.py).

    The record of each file is kept in OUT/STUDENT/marks/, so that a call after an interruption
    continues, and a call after the deadline of a latecomer grades one student.

    Args:
        course: Exercises, students and seed.
        submissions: The folder of what was handed in.
        out: The folder of the results, outside of `submissions`.
        workers: Processes side by side.
        cpu_s: Limit of CPU time of each file, in seconds.
        notify: Receives the progress.

    Returns:
        The records in the order of the roster, and the flags by student and exercise.
    """
    if submissions.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"{out} lies in {submissions}: choose a folder outside of it, with --out")
    files.make_folder(out)
    jobs = list(_list_jobs(course, submissions, cpu_s))
    program = _program_hash()
    keys = {_path(out, job): _key(job, program) for job in jobs}
    records = {path: record for path, key in keys.items() if (record := _read(path, key))}
    new = [job for job in jobs if _path(out, job) not in records]
    if records:
        notify(f"{len(records):,} of {len(jobs):,} files are graded already")
    progress = Progress(notify)
    for done, record in enumerate(mark_all(new, workers), 1):
        path = _path(out, record)
        files.make_folder(path.parent)
        files.write_json(path, {"key": keys[path], "record": record})
        records[path] = record
        progress.update(done / len(new), f"graded {done:,} of {len(new):,} files")
    ordered = [records[path] for path in keys]
    flags = collect_flags(ordered)
    write_results(out, ordered, flags)
    return ordered, flags


def collect_flags(records: Sequence[Record]) -> Flags:
    """The evidence about each file, and near copies among all of them."""
    flags: dict[tuple[str, str], list[Flag]] = {
        (record["student"], record["exercise"]): [Flag(**flag) for flag in record["flags"]]
        for record in records
    }
    fingerprints: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for record in records:
        fingerprints[record["exercise"]][record["student"]] = record["fingerprint"]
    for exercise, by_student in fingerprints.items():
        for student, others in _group_copies(find_near_copies(exercise, by_student)).items():
            similarity, other = others[0]
            more = f" (and of {len(others) - 1:,} more)" if len(others) > 1 else ""
            detail = f"{similarity:.0%} of the syntax tree is that of {other}{more}"
            flags[student, exercise].append(Flag("near_copy", 0, detail))
    return flags


def _group_copies(pairs: Sequence[NearCopy]) -> dict[str, list[tuple[float, str]]]:
    """Similarity and student of the near copies of each student, the most similar first."""
    groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for pair in pairs:
        groups[pair.student].append((pair.similarity, pair.other))
        groups[pair.other].append((pair.similarity, pair.student))
    return groups


def _list_jobs(course: Class, submissions: Path, cpu_s: int) -> Iterator[Job]:
    found = collect_submissions(submissions, course.students, course.exercises)
    for (student, exercise), submission in found.items():
        yield {
            "student": student,
            "exercise": exercise,
            "origin": submission.origin,
            "source": submission.source,
            "problem": submission.problem,
            "seed": course.student_seed(student, exercise),
            "cpu_s": cpu_s,
        }


def _path(out: Path, job: Job | Record) -> Path:
    return out / job["student"] / MARKS_FOLDER / f"{job['exercise']}.json"


def _read(path: Path, key: str) -> Record | None:
    """The record of a former call, if it is of the same file, seed and program."""
    try:
        kept = files.read_json(path)
    except (OSError, DamagedError):
        return None
    record: Record | None = kept.get("record") if kept.get("key") == key else None
    return record


def _key(job: Job, program: str) -> str:
    """A hash of all that the marks depend on."""
    text = json.dumps([job, program], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _program_hash() -> str:
    """A hash of the code that marks, and of the versions of Python and NumPy."""
    digest = hashlib.sha256(f"{sys.version_info[:3]} {np.__version__}".encode())
    folder = Path(__file__).parents[1]
    for name in ("grading", "isolation", "learn"):
        for path in sorted((folder / name).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
