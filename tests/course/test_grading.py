"""Grading a class: marks, bad submissions, files of results, and calls that continue."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from glasslm.cli import main
from glasslm.course.grading.points import Growth, give_points
from glasslm.course.grading.result_files import format_csv
from glasslm.course.isolation.process_limits import Limits

RIGHT = """
import numpy as np

def silu(x):
    s = 0.5 * (1 + np.tanh(0.5 * x))
    return x * s, lambda dy: dy * (s + x * s * (1 - s))
"""
SUBMISSIONS = {
    "right": RIGHT,
    "wrong_backward": RIGHT.replace("s + x * s", "s - x * s"),
    "overflow": RIGHT.replace("0.5 * (1 + np.tanh(0.5 * x))", "1 / (1 + np.exp(-x))").replace(
        "x * s * (1 - s)", "x * s * s * np.exp(-x)"
    ),
    "loop": RIGHT.replace(
        "s = 0.5 * (1 + np.tanh(0.5 * x))",
        "s = np.array([0.5 * (1 + np.tanh(0.5 * v)) for v in x.ravel()], x.dtype).reshape(x.shape)",
    ),
    "endless": "def silu(x):\n    while True:\n        pass\n",
    "endless_at_import": "while True:\n    pass\n",
    "hog": "def silu(x):\n    return bytearray(1 << 34)\n",
    "flood": RIGHT + "\nfor _ in range(100000):\n    print('x' * 1000)\n",
    "forks": "import os\ndef silu(x):\n    while True:\n        os.fork()\n",
    "writes": "def silu(x):\n    open('/tmp/glasslm-was-here', 'w').write('x')\n",
    "deletes": "import os\ndef silu(x):\n    os.remove(__file__)\n",
    "latin1": "# caf\xe9\n",
    "misspelt": RIGHT.replace("def silu", "def slu"),
    "syntax": "def silu(x:\n    return x\n",
    "exits": "import os\ndef silu(x):\n    os._exit(3)\n",
    "raises_exit": "raise SystemExit\n",
    "imports": "import no_such_module\n",
    "signature": "def silu():\n    return 1\n",
    "recursion": "def silu(x):\n    return silu(x)\n",
    "nothing": "",
    "deep": "(" * 100000,
    "zero_byte": "x = 1\0\n",
}  # fmt: skip
SENTENCES = {
    "endless": "no end within",
    "endless_at_import": "no end within",
    "hog": "emory",
    "forks": "os.fork is refused",
    "writes": "'/tmp/glasslm-was-here' is not opened here",
    "deletes": "",
    "latin1": "line 1: byte 0xe9 is no UTF-8",
    "misspelt": "no function silu: did you mean 'slu'?",
    "syntax": "line 1: SyntaxError",
    "exits": "exit",
    "raises_exit": "SystemExit",
    "imports": "line 1: ModuleNotFoundError: No module named 'no_such_module'",
    "signature": "the signature is silu()",
    "recursion": "RecursionError",
    "nothing": "no function silu",
    "missing": "no file silu.py was handed in",
    "deep": "",
    "zero_byte": "",
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class with every kind of submission, graded with one second of CPU time each."""
    folder = tmp_path_factory.mktemp("class")
    for student, source in SUBMISSIONS.items():
        path = folder / "submissions" / student / "silu.py"
        path.parent.mkdir(parents=True)
        path.write_bytes(source.encode("latin-1"))
    roster = folder / "roster.csv"
    roster.write_text("\n".join(["student", *SUBMISSIONS, "missing"]), encoding="utf-8")
    words = ["learn", "class", "new", "--exercises", "silu", "--students", str(roster)]
    assert main([*words, "--out", str(folder / "class"), "--seed", "1"]) == 0
    (folder / "class" / "class.json").rename(folder / "class.json")
    words = ["learn", "class", "grade", str(folder / "submissions"), "--cpu-limit", "1"]
    assert main([*words, "--out", str(folder / "grades")]) == 0
    return folder


def read_table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def test_every_submission_has_a_sentence(graded: Path) -> None:
    rows = read_table(graded / "grades" / "points.csv")
    assert set(rows) == {*SUBMISSIONS, "missing"}
    for student, part in SENTENCES.items():
        assert rows[student]["sentence"], student
        assert part in rows[student]["sentence"], rows[student]
        assert float(rows[student]["points"]) == 0, student


@pytest.mark.parametrize(
    ("student", "points"),
    [
        ("right", ["4", "4", "1", "1"]),
        ("flood", ["4", "4", "1", "1"]),
        ("wrong_backward", ["4", "0", "0", "0"]),
        ("overflow", ["4", "4", "0", "1"]),
        ("loop", ["4", "4", "1", "0"]),
    ],
)
def test_points_have_four_parts(graded: Path, student: str, points: list[str]) -> None:
    row = read_table(graded / "grades" / "points.csv")[student]
    assert [row[part] for part in ("forward", "backward", "stability", "speed")] == points


def test_the_table_has_the_columns_of_the_contract(graded: Path) -> None:
    path = graded / "grades" / "grades.csv"
    head = path.read_text("utf-8").splitlines()[0]
    assert head == "student,exercise,forward,backward,points,verdict,flags"
    rows = read_table(path)
    assert rows["right"]["verdict"] == "right"
    assert rows["right"]["flags"] == ""
    assert "os.fork" in rows["forks"]["flags"]
    assert rows["wrong_backward"]["forward"] == "right"
    assert rows["wrong_backward"]["backward"] == "wrong"


def test_files_of_students_are_as_they_were(graded: Path) -> None:
    for student, source in SUBMISSIONS.items():
        folder = graded / "submissions" / student
        assert [path.name for path in folder.iterdir()] == ["silu.py"]
        assert (folder / "silu.py").read_bytes() == source.encode("latin-1")
    assert not Path("/tmp/glasslm-was-here").exists()


def test_gradescope_and_otter_get_their_formats(graded: Path) -> None:
    results = json.loads((graded / "grades" / "overflow" / "results.json").read_text("utf-8"))
    assert results["score"] == sum(test["score"] for test in results["tests"]) == 9
    for test in results["tests"]:
        assert 0 <= test["score"] <= test["max_score"]
        assert test["status"] in ("passed", "failed")
        assert {"name", "output", "visibility"} <= test.keys()
    otter = json.loads((graded / "grades" / "overflow" / "otter.json").read_text("utf-8"))
    assert otter["silu"]["score"] == 9
    assert otter["silu"]["possible"] == sum(c["points"] for c in otter["silu"]["test_cases"]) == 10
    fields = {"name", "body", "hidden", "points", "success_message", "failure_message"}
    assert all(case.keys() == fields for case in otter["silu"]["test_cases"])


def test_each_part_says_why_it_lost_points(graded: Path) -> None:
    for student, part, message in (
        ("loop", "speed", "grows like the number of elements to the power"),
        ("wrong_backward", "speed", "counts only where all numbers are right"),
        ("wrong_backward", "backward", "dx"),
        ("overflow", "stability", "large values"),
    ):
        results = json.loads((graded / "grades" / student / "results.json").read_text("utf-8"))
        outputs = {test["name"]: test["output"] for test in results["tests"]}
        assert message in outputs[f"silu: {part}"]
        assert outputs["silu: forward"] == ""


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        *((begin + "1+1", f"'{begin}1+1") for begin in "=+-@\t"),
        ("\r1+1", "' 1+1"),
        ("ValueError\r=1+1", "ValueError =1+1"),
        ("line 1: =1+1", "line 1: =1+1"),
        ("--", "--"),
        ("", ""),
    ],
)
def test_no_text_of_a_student_is_a_formula(text: str, cell: str) -> None:
    data = format_csv([("sentence", "points"), (text, 4)])
    assert list(csv.reader(io.StringIO(data.decode(), newline="")))[1] == [cell, "4"]


def test_students_see_no_flags_and_no_names_of_others(graded: Path) -> None:
    text = (graded / "grades" / "forks" / "results.json").read_text("utf-8")
    assert "flag" not in text


def test_the_same_submission_gets_the_same_marks(graded: Path, tmp_path: Path) -> None:
    words = ["learn", "class", "grade", str(graded / "again"), "--out", str(tmp_path / "grades")]
    for student in ("right", "overflow", "loop", "wrong_backward", "forks"):
        (graded / "again").mkdir(exist_ok=True)
        (graded / "again" / f"{student}_silu.py").write_text(SUBMISSIONS[student])
    assert main([*words, "--class-file", str(graded / "class.json"), "--workers", "1"]) == 0
    first = read_table(graded / "grades" / "points.csv")
    second = read_table(tmp_path / "grades" / "points.csv")
    for student in ("right", "overflow", "loop", "wrong_backward", "forks"):
        assert first[student] == second[student]
        results = [
            (folder / student / "results.json").read_bytes()
            for folder in (graded / "grades", tmp_path / "grades")
        ]
        assert results[0] == results[1]


def test_a_second_call_grades_what_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "submissions"
    for student in ("ada", "bob"):
        (folder / student).mkdir(parents=True)
        (folder / student / "silu.py").write_text(RIGHT)
    words = ["learn", "class", "grade", str(folder), "--out", str(tmp_path / "grades")]
    assert main(words) == 0
    assert "no class.json was found" in capsys.readouterr().err
    (folder / "bob" / "silu.py").write_text(SUBMISSIONS["wrong_backward"])
    assert main(words) == 0
    assert "1 of 2 files are graded already" in capsys.readouterr().err
    rows = read_table(tmp_path / "grades" / "grades.csv")
    assert [rows[student]["points"] for student in ("ada", "bob")] == ["10", "4"]


@pytest.mark.parametrize("words", [[], ["--out", "grades"], ["no_such_folder", "--out", "grades"]])
def test_bad_calls_are_refused(words: list[str]) -> None:
    assert main(["learn", "class", "grade", *words]) == 2


def test_results_inside_the_submissions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ada_silu.py").write_text(RIGHT)
    assert main(["learn", "class", "grade", str(tmp_path), "--out", str(tmp_path / "grades")]) == 2


def list_living(group: int) -> list[str]:
    """The processes of a group that have not ended; a dead one may wait for init."""
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                living.append(path.parent.name)
    return living


def test_ctrl_c_ends_everything_and_the_next_call_continues(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("torchrun and signals as on Linux")
    folder = tmp_path / "submissions"
    folder.mkdir()
    (folder / "ada_silu.py").write_text(RIGHT)
    (folder / "bob_silu.py").write_text("import time\ndef silu(x):\n    time.sleep(60)\n")
    out = tmp_path / "grades"
    command = [sys.executable, "-m", "glasslm", "learn", "class", "grade", str(folder)]
    process = subprocess.Popen(
        [*command, "--out", str(out), "--workers", "1"], start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not (out / "ada" / "marks" / "silu.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    time.sleep(0.2)
    assert list_living(process.pid) == []
    (folder / "bob_silu.py").write_text(RIGHT)
    assert main([*command[3:], "--out", str(out)]) == 0
    assert read_table(out / "grades.csv")["bob"]["points"] == "10"


def test_points_add_up_to_ten() -> None:
    for has_backward in (True, False):
        parts = give_points(
            has_backward=has_backward,
            forward="right",
            backward="right",
            is_stable=True,
            growth=Growth(10, 50, 160, 50),
        )
        assert sum(part.points for part in parts) == sum(part.possible for part in parts) == 10


def test_limits_are_far_from_what_right_solutions_need() -> None:
    assert Limits().cpu_s >= 10
    assert Limits().wall_s >= 3 * Limits().cpu_s
