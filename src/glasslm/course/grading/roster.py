"""The students of a class, read from a table."""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path

from glasslm.errors import InputError, explain_system_errors
from glasslm.text import suggest_name, to_one_line

MAX_ROSTER_BYTES = 10 << 20
MAX_ID_CHARS = 100
# A student's id is the name of a folder on every system, and a cell that no spreadsheet computes.
FORBIDDEN_CHARACTERS = frozenset('/\\<>:"|?*')
FORBIDDEN_STARTS = ("=", "+", "-", "@", ".", "~")
RESERVED_NAMES = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)))
)
# Files of results stand beside the folders of students.
RESULT_FILES = frozenset(("grades.csv", "points.csv", "final_grades.csv", "flags.json"))
CURE = "give each student a short id of letters and digits"


def read_roster(path: Path) -> list[str]:
    """The ids of the column "student" of a CSV file, in its order.

    The separator is a comma, a semicolon or a tab. A byte order mark, quotes, other columns and
    empty lines are allowed. Ids are in Unicode's composed form (NFC).

    Raises InputError with the line for an id that cannot name a folder, or comes twice.
    """
    rows = _read_rows(path)
    header_line, header = rows[0]
    names = [name.strip().casefold() for name in header]
    if "student" not in names:
        hint = suggest_name("student", names)
        raise InputError(
            f"{path}, line {header_line}: the columns are {to_one_line(', '.join(header))}: one "
            f"must be named 'student'{hint}"
        )
    column = names.index("student")
    lines: dict[str, int] = {}
    students = []
    for line, row in rows[1:]:
        if len(row) > len(header):
            raise InputError(
                f"{path}, line {line}: {len(row)} cells under {len(header)} columns: put cells "
                "with a separator in quotes"
            )
        student = normalize_id(row[column]) if column < len(row) else ""
        if problem := find_id_problem(student):
            raise InputError(f"{path}, line {line}: the student id {problem}: {CURE}")
        if student.casefold() in lines:
            raise InputError(
                f"{path}, line {line}: the student '{student}' is in line "
                f"{lines[student.casefold()]}, too: leave one of them out"
            )
        lines[student.casefold()] = line
        students.append(student)
    if not students:
        raise InputError(f"{path} has a line of column names and no student")
    return students


def normalize_id(text: str) -> str:
    """An id without spaces around it, in Unicode's composed form, as file systems may not have it.

    >>> normalize_id(" Zoe\\u0308 ")
    'Zoë'
    """
    return unicodedata.normalize("NFC", text).strip()


def find_id_problem(student: str) -> str:
    """Why an id cannot be the name of a student's folder; "" if it can."""
    shown = f"'{to_one_line(student, 40)}'"
    if not student:
        return "is empty"
    if len(student) > MAX_ID_CHARS:
        return f"{shown} has more than {MAX_ID_CHARS} characters"
    if bad := sorted(FORBIDDEN_CHARACTERS & set(student)):
        return f"{shown} has a {bad[0]}, which no folder's name may have"
    if not student.isprintable():
        return f"{shown} has a control character"
    if student.startswith(FORBIDDEN_STARTS) or student.endswith("."):
        place = "begins" if student.startswith(FORBIDDEN_STARTS) else "ends"
        return f"{shown} {place} with {student[0 if place == 'begins' else -1]}"
    if student.casefold() in RESULT_FILES or student.casefold().endswith(".py"):
        return f"{shown} is the name of a file"
    if student.casefold().partition(".")[0] in RESERVED_NAMES:
        return f"{shown} is a reserved name on Windows"
    return ""


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the line on which it ends."""
    text = _read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: {error}: expected a table with commas or semicolons"
        ) from None
    if not rows:
        raise InputError(f"{path} is empty: expected a column 'student' with an id in each line")
    return rows


def _read_text(path: Path) -> str:
    with (
        explain_system_errors(
            path, lambda why: InputError(f"{path} cannot be read ({why}): check its name")
        ),
        path.open("rb") as file,
    ):
        data = file.read(MAX_ROSTER_BYTES + 1)
    if len(data) > MAX_ROSTER_BYTES:
        raise InputError(f"{path} has more than {MAX_ROSTER_BYTES:,} bytes: expected a CSV file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is no UTF-8: save it as CSV UTF-8"
        ) from None
