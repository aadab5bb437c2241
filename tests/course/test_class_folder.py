"""A class: the roster, the folder to hand out, the seeds, and what students hand in."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from glasslm.cli import main
from glasslm.course.grading import submissions
from glasslm.course.grading.class_folder import Class, load_class
from glasslm.course.grading.roster import find_id_problem, read_roster
from glasslm.course.grading.submissions import (
    collect_submissions,
    find_exercises,
    find_students,
    find_unread_files,
)
from glasslm.course.learn.exercises import load_exercise
from glasslm.errors import DamagedError, InputError

SILU = "def silu(x):\n    return x, lambda dy: dy\n"


def write_roster(folder: Path, data: bytes | str) -> Path:
    path = folder / "roster.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "student,name\nada,A\nZoë,Z\n",
        '\ufeffname;Student\n\n"Lovelace; A";"ada"\nZ;Zoe\u0308\n;\n',
        "id\tstudent\r\n1\t ada \r\n2\tZoë\r\n",
        "student\nada\nZoë",
    ],
)
def test_a_roster_is_read_as_spreadsheets_write_it(tmp_path: Path, text: str) -> None:
    assert read_roster(write_roster(tmp_path, text)) == ["ada", "Zoë"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("name,mail\nada,a@b\n", "line 1: the columns are name, mail"),
        ("students\nada\n", "did you mean 'students'"),
        ("student\nada\nbob\nADA\n", "line 4: the student 'ADA' is in line 2"),
        ("student,name\nada,A\n,B\n", "line 3: the student id is empty"),
        ("student\n../x\n", "line 2: the student id '../x' has a /"),
        ("student\n..\n", "begins with ."),
        ("student\n=1+1\n", "begins with ="),
        ("student\na\\b\n", "which no folder's name may have"),
        ("student\nCON\n", "reserved name"),
        ("student\nGrades.csv\n", "is the name of a file"),
        ("student\na\x1bb\n", "control character"),
        (f"student\n{'a' * 101}\n", "more than 100 characters"),
        ("student\nada,bob\n", "line 2: 2 cells under 1 columns"),
        ('student\n"ada\n', "line 2"),
        (b"student\nad\xe9\n", "line 2: byte 0xe9 is no UTF-8"),
        ("", "is empty"),
        ("student\n", "no student"),
    ],
)
def test_a_bad_roster_is_refused_with_the_line(
    tmp_path: Path, data: bytes | str, message: str
) -> None:
    with pytest.raises(InputError) as refused:
        read_roster(write_roster(tmp_path, data))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def new_class(tmp_path: Path, *flags: str) -> int:
    roster = write_roster(tmp_path, "student\nada\nbob\n")
    words = ["learn", "class", "new", "--exercises", "rms_norm,silu", "--students", str(roster)]
    return main([*words, "--out", str(tmp_path / "class"), *flags])


def test_the_handout_has_start_files_and_no_seed(tmp_path: Path) -> None:
    assert new_class(tmp_path, "--seed", "987654321") == 0
    handout = tmp_path / "class" / "handout"
    assert {path.name for path in handout.iterdir()} == {"README.md", "rms_norm.py", "silu.py"}
    assert "def rms_norm(x, gain, eps=1e-5):" in (handout / "rms_norm.py").read_text("utf-8")
    assert not any("987654321" in path.read_text("utf-8") for path in handout.iterdir())
    course = load_class(tmp_path / "class")
    assert course == Class(("silu", "rms_norm"), ("ada", "bob"), 987654321)


def test_a_class_is_never_overwritten_and_its_seed_is_drawn(tmp_path: Path) -> None:
    assert new_class(tmp_path) == 0
    seed = load_class(tmp_path / "class").seed
    assert new_class(tmp_path) == 2
    assert load_class(tmp_path / "class").seed == seed > 1000


@pytest.mark.parametrize("names", ["rms", "silu,silu", ","])
def test_bad_names_of_exercises_are_refused(tmp_path: Path, names: str) -> None:
    roster = write_roster(tmp_path, "student\nada\n")
    out = tmp_path / "class"
    words = ["learn", "class", "new", "--exercises", names, "--students", str(roster)]
    assert main([*words, "--out", str(out)]) == 2
    assert not out.exists()


def test_a_changed_class_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "class.json"
    path.write_text(json.dumps({"exercises": ["silu"], "students": ["../x"], "seed": 1}))
    with pytest.raises(DamagedError):
        load_class(path)


def test_seeds_differ_by_student_and_are_the_same_elsewhere() -> None:
    course = Class(("silu", "rms_norm"), (), 1)
    seeds = {
        (student, exercise): course.student_seed(student, exercise)
        for student in ("ada", "bob", "Zoë")
        for exercise in course.exercises
    }
    assert len(set(seeds.values())) == len(seeds)
    program = (
        "from glasslm.course.grading.class_folder import Class;"
        "print(Class((), (), 1).student_seed('Zo\\xeb', 'silu'))"
    )
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", program]
        answer = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        assert int(answer) == seeds["Zoë", "silu"]


def test_students_get_different_cases() -> None:
    exercise, course = load_exercise("rms_norm"), Class((), (), 1)
    drawn = [
        exercise.draw_cases(exercise.sizes.distinct, course.student_seed(student, "rms_norm"), 1)
        for student in ("ada", "bob", "ada")
    ]
    values = [cases[0].inputs["x"].tolist() for cases in drawn]
    assert values[0] != values[1]
    assert values[0] == values[2]


def make_zip(entries: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return data.getvalue()


def collect(folder: Path, student: str = "ada") -> submissions.Submission:
    return collect_submissions(folder, [student], ["silu"])[student, "silu"]


def test_folders_single_files_and_zip_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "ada" / "week 1").mkdir(parents=True)
    (tmp_path / "ada" / "week 1" / "silu.py").write_text(SILU)
    (tmp_path / "bob_silu.py").write_bytes(b"\xef\xbb\xbf" + SILU.encode())
    (tmp_path / "Zoe\u0308.zip").write_bytes(
        make_zip({"homework/silu.py": SILU, "__MACOSX/._silu.py": "\0"})
    )
    (tmp_path / "eve.ZIP").write_bytes(
        make_zip({"homework\\silu.py": SILU, "__MACOSX\\._silu.py": "\0", "b\\rope.py": "\0"})
    )
    for student in ("ada", "bob", "Zoë", "eve"):
        found = collect(tmp_path, student)
        assert (found.source, found.problem) == (SILU, ""), student
    assert collect(tmp_path, "eve").origin == "eve.ZIP: homework/silu.py"
    assert find_students(tmp_path, ["silu"]) == ["Zoë", "ada", "bob", "eve"]
    assert find_exercises(tmp_path) == ["silu", "rope"]
    assert find_unread_files(tmp_path) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"../silu.py": SILU}, "leads out of the folder"),
        ({"/tmp/silu.py": SILU}, "leads out of the folder"),
        ({"a\\..\\..\\silu.py": SILU}, "leads out of the folder"),
        ({"silu.py": "#" * (3 << 20)}, "more than 1,048,576 bytes"),
        ({f"{n}.txt": "" for n in range(1001)}, "more than 1000 entries"),
        ({"a/silu.py": SILU, "b/silu.py": SILU + "#"}, "2 files silu.py"),
        ({"Silu (1).py": SILU}, "is it ada.zip: Silu (1).py?"),
    ],
)
def test_a_bad_zip_file_is_refused(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    folder = tmp_path / "submissions"
    folder.mkdir()
    (folder / "ada.zip").write_bytes(make_zip(entries))
    found = collect(folder)
    assert message in found.problem
    assert found.source == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["submissions", "ada.zip"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no zip", "no zip file"),
        (make_zip({"silu.py": SILU * 50})[:-30], "no zip file"),
    ],
)
def test_a_damaged_zip_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "ada.zip").write_bytes(data)
    assert message in collect(tmp_path).problem


def test_other_encodings_and_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ada").mkdir()
    path = tmp_path / "ada" / "silu.py"
    path.write_bytes(b"# first\n# caf\xe9\n")
    assert collect(tmp_path).problem == "line 2: byte 0xe9 is no UTF-8"
    if hasattr(os, "symlink") and os.name == "posix":
        path.unlink()
        secret = tmp_path.parent / "secret.py"
        secret.write_text(SILU)
        path.symlink_to(secret)
        assert "is a link" in collect(tmp_path).problem


def test_what_is_not_graded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "submissions"
    (folder / "ada").mkdir(parents=True)
    names = ("silu.py", "eve_silu.py", "mallory.zip", "bob.rar", "notes.txt", ".hidden", "__MACOSX")
    for name in names:
        (folder / name).write_text(SILU)
    assert new_class(tmp_path) == 0
    capsys.readouterr()
    words = ["learn", "class", "grade", str(folder), "--out", str(tmp_path / "grades")]
    assert main([*words, "--class-file", str(tmp_path / "class")]) == 0
    message = capsys.readouterr().err
    assert "not a folder, a .py file or a .zip file: bob.rar, notes.txt: unpack it" in message
    assert "not graded, because it is not in the roster: eve, mallory, silu.py: rename" in message
    assert main([*words[:-1], str(tmp_path / "again")]) == 0
    assert "it is not a student's id: silu.py: rename" in capsys.readouterr().err


def test_ids_of_people_are_allowed() -> None:
    for student in ("ada", "o'neill", "李雷", "a.b@school.edu", "12345", "José María", "x_y-z"):
        assert find_id_problem(student) == ""
