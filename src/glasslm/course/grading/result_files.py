"""The results of a class as files: tables, and JSON as Gradescope and otter-grader have it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.course.grading.marking import Record
from glasslm.course.grading.points import Growth
from glasslm.course.isolation.evidence import SENTENCES, Flag

GRADES_COLUMNS = ("student", "exercise", "forward", "backward", "points", "verdict", "flags")
FORMULA = re.compile(r"[=+@\t\r]|-(?!-*$)")  # "--", otter-grader's word for no status, is text
MAX_FLAGS = 5  # in a cell; flags.json has all
Flags = Mapping[tuple[str, str], Sequence[Flag]]  # by student and exercise


def write_results(out: Path, records: Sequence[Record], flags: Flags) -> None:
    """Write grades.csv, points.csv, final_grades.csv and flags.json, and two files a student.

    STUDENT/results.json is Gradescope's and STUDENT/otter.json otter-grader's. They have no flags,
    because students may see them.
    """
    rows = [_grade_row(record, flags[record["student"], record["exercise"]]) for record in records]
    files.write_atomic(out / "grades.csv", format_csv([GRADES_COLUMNS, *rows]))
    files.write_atomic(out / "points.csv", format_csv(_point_rows(records)))
    files.write_atomic(out / "final_grades.csv", format_csv(_otter_rows(records)))
    files.write_json(out / "flags.json", _list_flags(flags))
    for student, own in group_by_student(records).items():
        files.write_json(out / student / "results.json", gradescope_results(own))
        files.write_json(out / student / "otter.json", otter_results(own))


def group_by_student(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each student, in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["student"], []).append(record)
    return groups


def sum_points(records: Sequence[Record], field: str = "points") -> float:
    """The points of some records, or with "possible" the most that they could have."""
    return sum(part[field] for record in records for part in record["parts"])


def gradescope_results(records: Sequence[Record]) -> dict[str, Any]:
    """One student's results as Gradescope's results.json.

    https://gradescope-autograders.readthedocs.io/en/latest/specs/
    """
    return {
        "score": sum_points(records),
        "output": f"{sum_points(records):g} of {sum_points(records, 'possible'):g} points",
        "output_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": [
            {
                "name": f"{record['exercise']}: {part['name']}",
                "score": part["points"],
                "max_score": part["possible"],
                "status": "passed" if part["points"] == part["possible"] else "failed",
                "output": explain_part(record, part["name"]),
                "output_format": "text",
                "visibility": "visible",
            }
            for record in records
            for part in record["parts"]
        ],
    }


def otter_results(records: Sequence[Record]) -> dict[str, Any]:
    """One student's results as otter-grader 7 has them: GradingResults.to_dict()."""
    results = {}
    for record in records:
        cases = [
            {
                "name": part["name"],
                "body": "",
                "hidden": False,
                "points": part["possible"],
                "success_message": None,
                "failure_message": None,
            }
            for part in record["parts"]
        ]
        results[record["exercise"]] = {
            "score": sum_points([record]),
            "possible": sum_points([record], "possible"),
            "name": record["exercise"],
            "path": f"{record['exercise']}.py",
            "test_cases": cases,
            "all_or_nothing": False,
            "test_case_results": [
                {
                    "test_case": case,
                    "message": None if is_passed else explain_part(record, part["name"]),
                    "passed": is_passed,
                }
                for case, part in zip(cases, record["parts"])
                for is_passed in [part["points"] == part["possible"]]
            ],
        }
    return results


def explain_part(record: Record, name: str) -> str:
    """Why one part of an exercise has its points; "" where it has all."""
    points = {part["name"]: (part["points"], part["possible"]) for part in record["parts"]}
    reached, possible = points[name]
    numbers = [points[part] for part in ("forward", "backward") if part in points]
    if reached == possible:
        return ""
    if name in ("stability", "speed") and any(own != most for own, most in numbers):
        return "counts only where all numbers are right"
    if name == "speed":
        if record["growth"] is None:
            return "a larger input took too long, or its results are wrong"
        exponent = Growth(**record["growth"]).exponent
        return (
            "Python loops over elements: the number of instructions grows like the number of "
            f"elements to the power {exponent:.2f}"
        )
    where = f" (look at: {record['where']})" if record["where"] else ""
    return f"{record['verdict'].replace('_', ' ')}: {record['sentence']}{where}"


def format_csv(rows: Sequence[Sequence[object]]) -> bytes:
    """Rows as a CSV file: UTF-8, commas, one line a row.

    Text that a spreadsheet would compute, such as an error "=1+1" of a student's code, gets an
    apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_escape_formula(cell) for cell in row] for row in rows)
    return text.getvalue().encode()


def _escape_formula(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    text = cell.replace("\r", " ")  # which would end the row, as csv.writer does not quote it
    return f"'{text}" if FORMULA.match(cell) else text


def _grade_row(record: Record, flags: Sequence[Flag]) -> list[object]:
    return [
        record["student"],
        record["exercise"],
        record["forward"],
        record["backward"],
        f"{sum_points([record]):g}",
        record["verdict"],
        "; ".join([*map(str, flags[:MAX_FLAGS]), *_count_more(flags)]),
    ]


def _count_more(flags: Sequence[Flag]) -> list[str]:
    return [f"{len(flags) - MAX_FLAGS} more in flags.json"] if len(flags) > MAX_FLAGS else []


def _point_rows(records: Sequence[Record]) -> list[list[object]]:
    names = ("forward", "backward", "stability", "speed")
    rows: list[list[object]] = [["student", "exercise", *names, "points", "possible", "sentence"]]
    for record in records:
        parts = {part["name"]: f"{part['points']:g}" for part in record["parts"]}
        rows.append(
            [
                record["student"],
                record["exercise"],
                *(parts.get(name, "") for name in names),
                f"{sum_points([record]):g}",
                f"{sum_points([record], 'possible'):g}",
                record["sentence"],
            ]
        )
    return rows


def _otter_rows(records: Sequence[Record]) -> list[list[object]]:
    """The table of `otter grade`: a row of possible points, then one for each student."""
    groups = group_by_student(records)
    exercises = list(dict.fromkeys(record["exercise"] for record in records))
    head: list[object] = [
        "file",
        *exercises,
        "total_points_earned",
        "percent_correct",
        "grading_status",
    ]
    first = next(iter(groups.values()), [])
    possible = sum_points(first, "possible")
    points = [f"{sum_points([record], 'possible'):g}" for record in first]
    rows: list[list[object]] = [head, ["points-per-question", *points, f"{possible:g}", "1", "--"]]
    for student, own in groups.items():
        total = sum_points(own)
        share = f"{total / possible:.4f}" if possible else "0"
        points = [f"{sum_points([record]):g}" for record in own]
        rows.append([student, *points, f"{total:g}", share, "Completed"])
    return rows


def _list_flags(flags: Flags) -> list[dict[str, Any]]:
    return [
        {"student": student, "exercise": exercise, "meaning": SENTENCES[flag.kind]} | flag.to_json()
        for (student, exercise), own in flags.items()
        for flag in own
    ]
