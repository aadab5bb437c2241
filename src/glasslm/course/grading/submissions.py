"""What the students of a class handed in: folders, single files and zip files, read without trust.

Nothing is unpacked to the disk, no link is followed, and each file is read up to a limit.
"""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from glasslm.course.grading.class_folder import CLASS_FILE
from glasslm.course.grading.roster import normalize_id
from glasslm.course.learn.exercises import COURSE
from glasslm.errors import InputError, explain_system_errors
from glasslm.text import to_one_line

MAX_FILE_BYTES = 1 << 20
MAX_ZIP_ENTRIES = 1000


@dataclass(frozen=True)
class Submission:
    """One student's file for one exercise.

    Args:
        origin: Where it was found, such as "ada/rms_norm.py"; "" where there is none.
        source: Its text.
        problem: Why it has no text; "" if it has.
    """

    origin: str
    source: str = ""
    problem: str = ""


@dataclass(frozen=True)
class SubmittedFile:
    """A file of a student, before it is known which exercise it is for."""

    origin: str
    name: str
    data: bytes
    problem: str = ""


def collect_submissions(
    folder: Path, students: Iterable[str], exercises: Iterable[str]
) -> dict[tuple[str, str], Submission]:
    """The submission of each student for each exercise, by (student, exercise).

    Looks for STUDENT/EXERCISE.py, STUDENT_EXERCISE.py, and EXERCISE.py inside of STUDENT.zip, at
    any depth. A student without a file gets a Submission that says so.
    """
    students, exercises = list(students), list(exercises)
    entries = {normalize_id(entry.name): entry for entry in _list_folder(folder)}
    submissions = {}
    for student in students:
        files, problem = _list_files(folder, entries, student, exercises)
        for exercise in exercises:
            submissions[student, exercise] = _choose(student, exercise, files, problem)
    return submissions


def find_students(folder: Path, exercises: Iterable[str]) -> list[str]:
    """The names that folders, zip files and single files of a folder are for, sorted.

    A Python file that is for nobody has its own name in the list. Not every name is a student's id
    (`find_id_problem`).
    """
    students = set()
    endings = [f"_{exercise}.py" for exercise in exercises]
    for entry in _list_folder(folder):
        name = normalize_id(entry.name)
        if name.startswith((".", "__")):  # of the system, such as __MACOSX
            continue
        if entry.is_dir():
            students.add(name)
        elif _is_zip(entry):
            students.add(PurePosixPath(name).stem)
        elif entry.suffix == ".py":
            ending = max((e for e in endings if name.endswith(e)), key=len, default="")
            students.add(name.removesuffix(ending))
    return sorted(students)


def find_unread_files(folder: Path) -> list[str]:
    """The names of files that are for nobody because of their kind, such as ada.rar, sorted."""
    return sorted(
        entry.name
        for entry in _list_folder(folder)
        if not entry.name.startswith((".", "__"))
        and not entry.is_dir()
        and not _is_zip(entry)
        and entry.suffix != ".py"
        and entry.name != CLASS_FILE
    )


def find_exercises(folder: Path) -> list[str]:
    """The exercises that occur in the names of submitted files, in the order of the course."""
    names = set()
    for entry in _list_folder(folder):
        if entry.is_dir():
            names |= {path.name for path in entry.rglob("*.py")}
        elif _is_zip(entry):
            names |= {file.name for file in read_zip(entry, set())[0]}
        else:
            names.add(entry.name)
    return [
        exercise
        for exercise in COURSE
        if any(name == f"{exercise}.py" or name.endswith(f"_{exercise}.py") for name in names)
    ]


def _list_folder(folder: Path) -> list[Path]:
    with explain_system_errors(
        folder, lambda why: InputError(f"{folder} cannot be read ({why}): check its name")
    ):
        return sorted(entry for entry in folder.iterdir() if not entry.is_symlink())


def _is_zip(entry: Path) -> bool:
    """Whether a file is a zip file by its name, as Windows writes it too: ada.ZIP."""
    return entry.suffix.lower() == ".zip"


def _list_files(
    folder: Path, entries: dict[str, Path], student: str, exercises: list[str]
) -> tuple[list[SubmittedFile], str]:
    """The files of a student, and why his or her zip file was refused, or ""."""
    files, problem = [], ""
    wanted = {f"{exercise}.py" for exercise in exercises}
    if (entry := entries.get(student)) and entry.is_dir():
        for path in sorted(entry.rglob("*")):
            relative = path.relative_to(entry)
            if path.is_file() and not any(part.startswith((".", "__")) for part in relative.parts):
                files.append(_read_file(path, f"{student}/{relative.as_posix()}", wanted))
    for exercise in exercises:
        if (entry := entries.get(f"{student}_{exercise}.py")) and entry.is_file():
            found = _read_file(entry, entry.name, {entry.name})
            files.append(SubmittedFile(found.origin, f"{exercise}.py", found.data, found.problem))
    for name, entry in entries.items():
        if _is_zip(entry) and PurePosixPath(name).stem == student and entry.is_file():
            zipped, reason = read_zip(entry, wanted)
            files += zipped
            problem = problem or reason
    return files, problem


def _read_file(path: Path, origin: str, wanted: set[str]) -> SubmittedFile:
    """A file up to the limit, or its name alone where that is not wanted.

    A link is refused, because it may lead out of the folder.
    """
    if path.is_symlink():
        return SubmittedFile(origin, path.name, b"", "is a link: hand in the file itself")
    if path.name not in wanted:
        return SubmittedFile(origin, path.name, b"")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        return SubmittedFile(origin, path.name, b"", f"cannot be read ({error.strerror})")
    return SubmittedFile(origin, path.name, data, _size_problem(len(data)))


def read_zip(path: Path, wanted: set[str]) -> tuple[list[SubmittedFile], str]:
    """The Python files of a zip file, and why the file was refused, or "".

    Those with a wanted name are read, in memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ZIP_ENTRIES:
                return [], f"{path.name} has more than {MAX_ZIP_ENTRIES} entries"
            for entry in entries:
                if problem := _entry_problem(entry):
                    return [], f"{path.name}: the entry '{to_one_line(entry.filename)}' {problem}"
            found = [_read_entry(archive, e, path.name, wanted) for e in _python_files(entries)]
            return found, ""
    # zipfile raises many kinds for a damaged file: BadZipFile, zlib.error, NotImplementedError
    except Exception as error:
        return [], f"{path.name} is no zip file that can be read ({to_one_line(str(error))})"


def _entry_problem(entry: zipfile.ZipInfo) -> str:
    """Why an entry makes the whole zip file refused; "" if it does not."""
    path = _entry_path(entry)
    if path.is_absolute() or ":" in str(path) or ".." in path.parts:
        return "leads out of the folder"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    if entry.flag_bits & 1:
        return "is encrypted"
    return ""


def _python_files(entries: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The Python files, without those that macOS and Python add."""
    return [
        entry
        for entry in entries
        if entry.filename.endswith(".py")
        and not any(part.startswith((".", "__")) for part in _entry_path(entry).parts)
    ]


def _entry_path(entry: zipfile.ZipInfo) -> PurePosixPath:
    """The path of an entry; older tools of Windows write it with backslashes."""
    return PurePosixPath(entry.filename.replace("\\", "/"))


def _read_entry(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, zip_name: str, wanted: set[str]
) -> SubmittedFile:
    path = _entry_path(entry)
    origin, name = f"{zip_name}: {path}", path.name
    if name not in wanted:
        return SubmittedFile(origin, name, b"")
    with archive.open(entry) as file:
        data = file.read(MAX_FILE_BYTES + 1)  # whatever size the entry claims to have
    return SubmittedFile(origin, name, data, _size_problem(len(data)))


def _size_problem(size: int) -> str:
    too_large = size > MAX_FILE_BYTES
    return f"has more than {MAX_FILE_BYTES:,} bytes: expected Python source" if too_large else ""


def _choose(
    student: str, exercise: str, files: list[SubmittedFile], zip_problem: str
) -> Submission:
    """The one file of an exercise, or why there is none."""
    wanted = f"{exercise}.py"
    matching = [file for file in files if file.name == wanted]
    if zip_problem:
        return Submission("", problem=f"{zip_problem}: nothing of it was read")
    if not matching:
        similar = [file.origin for file in files if exercise in file.name.casefold()]
        hint = f"; is it {to_one_line(similar[0])}?" if similar else ""
        return Submission("", problem=f"no file {wanted} was handed in{hint}")
    file = matching[0]
    if len({other.data for other in matching}) > 1:
        origins = ", ".join(to_one_line(other.origin) for other in matching[:3])
        return Submission("", problem=f"there are {len(matching)} files {wanted}: {origins}")
    if file.problem:
        return Submission(file.origin, problem=f"{to_one_line(file.origin)} {file.problem}")
    return _decode(file)


def _decode(file: SubmittedFile) -> Submission:
    try:
        return Submission(file.origin, file.data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = file.data[: error.start].count(b"\n") + 1
        return Submission(
            file.origin,
            problem=f"line {line}: byte {file.data[error.start]:#04x} is no UTF-8",
        )
