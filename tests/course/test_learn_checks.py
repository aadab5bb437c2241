"""glasslm learn check: files that are wrong in every other way end in one line and in time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import glasslm
from glasslm import cli
from glasslm.course.learn import check, check_file
from glasslm.course.learn.exercises import load_exercise
from glasslm.course.learn.starter import derivation_text, solution_source, starter_text
from glasslm.errors import InputError

RIGHT = """import numpy as np


def silu(x):
    s = (1 + np.tanh(x / 2)) / 2
    return x * s, lambda dy: dy * (s + x * s * (1 - s))
"""
WRONG = RIGHT.replace("s + x * s * (1 - s)", "s * (1 - s)")
BUSY_SECONDS = 30  # with other tests on the machine


@pytest.fixture(autouse=True)
def _own_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is kept in a folder of the test, on each system."""
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "data"))


def learn(*words: str) -> int:
    return cli.main(["learn", *words])


def write(folder: Path, text: str | bytes, name: str = "silu.py") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- files that cannot be read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def silu(x)\n    return x\n", r"line 1: expected ':'"),
        ("import numpy\n\nx = (\n", r"line 3"),
        (b"# caf\xe9\n", r"line 1: byte 0xe9 is no UTF-8"),
        ("", r"is empty"),
        ("def SiLU(x):\n    return x\n", r"line 1 has 'SiLU': rename it to silu"),
        ("def f(x):\n    return x\n", r"no function silu: it defines f"),
        ("x = 1\0\n", r"null bytes"),
    ],
)
def test_unreadable_files_are_one_line_with_the_learners_line(
    text: str | bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=expected):
        check_file(path)
    assert learn("check", str(path), "--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "exception"
    assert "Traceback" not in err


def test_a_folder_and_an_absent_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        check_file(tmp_path / "absent.py")


def test_a_name_without_underscore_is_understood(tmp_path: Path) -> None:
    path = write(tmp_path, "def rmsnorm(x, gain):\n    pass\n", "homework.py")
    with pytest.raises(InputError, match="line 1 has 'rmsnorm': rename it to rms_norm"):
        check_file(path)


def test_a_file_runs_as_a_module(tmp_path: Path) -> None:
    text = """from __future__ import annotations
from dataclasses import dataclass
import numpy as np


@dataclass
class Saved:
    x: np.ndarray


def silu(x):
    saved = Saved(x)
    s = (1 + np.tanh(saved.x / 2)) / 2
    return x * s, lambda dy: dy * (s + x * s * (1 - s))
"""
    (verdict,) = check_file(write(tmp_path, text))
    assert verdict.verdict == "right", verdict.sentence


# -- code that misbehaves --------------------------------------------------------------------------

MISBEHAVIOUR = {
    "endless loop": ("while True: pass", "line 2: no end after"),
    "loop that catches": (
        "while True:\n        try:\n            while True: pass\n        except: pass",
        "no end after",
    ),
    "sleep": ("import time; time.sleep(1000)", "line 2: no end after"),
    "print flood": ("while True: print('x' * 9999)", "no end after"),
    "memory": ("a = []\n    while True: a.append(bytes(1 << 26))", "MemoryError"),  # not touched
    "exit": ("import os; os._exit(0)", "ended its process"),
    "sys.exit": ("import sys; sys.exit(0)", "line 2: SystemExit"),
    "recursion": ("return silu(x)", "line 2: RecursionError"),
    "import": ("import no_such_module", "line 2: ModuleNotFoundError"),
    "input": ("input()", "line 2: EOFError"),
    "generator": ("yield x", "expected a plain function"),
}


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_misbehaving_code_is_one_line_in_bounded_time(name: str, tmp_path: Path) -> None:
    body, expected = MISBEHAVIOUR[name]
    path = write(tmp_path, f"def silu(x):\n    {body}\n")
    begin = time.monotonic()
    (verdict,) = check_file(path)
    assert time.monotonic() - begin < BUSY_SECONDS
    assert verdict.verdict == "exception"
    assert expected in verdict.sentence
    assert "\n" not in verdict.sentence


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_copies_of_the_process_end_at_once(tmp_path: Path) -> None:
    text = RIGHT.replace("    s = (", "    import os\n\n    os.fork()\n    s = (")
    begin = time.monotonic()
    (verdict,) = check_file(write(tmp_path, text))
    assert verdict.verdict == "right"
    assert time.monotonic() - begin < BUSY_SECONDS


def test_code_that_dies_does_not_take_the_other_exercises_with_it(tmp_path: Path) -> None:
    other = "\n\ndef relu(x):\n    import os\n    os._exit(3)\n\n\ndef gelu(x):\n    pass\n"
    verdicts = check_file(write(tmp_path, RIGHT + other, "homework.py"))
    assert [(v.exercise, v.verdict) for v in verdicts] == [
        ("silu", "right"),
        ("relu", "exception"),
        ("gelu", "not_implemented"),
    ]


def test_a_function_with_the_allocator_of_an_ops_file_is_checked(tmp_path: Path) -> None:
    text = RIGHT.replace("silu(x)", "silu(x, new)").replace("x * s, lambda", "y, lambda")
    allocated = text.replace(
        "    return", "    y = np.multiply(x, s, out=new(x.shape))\n    return"
    )
    (verdict,) = check_file(write(tmp_path, allocated))
    assert verdict.is_right
    added = text.replace("    return", "    y = new(x.shape)\n    y += x * s\n    return")
    (verdict,) = check_file(write(tmp_path, added))
    assert verdict.forward == "wrong"


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("x", "gain is missing"),
        ("", "x, gain are missing"),
        ("x, *, gain", "gain must not be keyword-only"),
        ("x, gain, bias", "bias has no default"),
    ],
)
def test_a_wrong_signature_is_named(signature: str, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"\n\ndef rms_norm({signature}):\n    pass\n", "rms_norm.py")
    (verdict,) = check_file(path)
    assert expected in verdict.sentence
    assert verdict.sentence.startswith("line 3: ")


# -- the commands ----------------------------------------------------------------------------------


def test_the_check_leaves_the_file_and_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "homework"
    folder.mkdir()
    path = write(folder, "import helper\n" + RIGHT)
    write(folder, "x = 1\n", "helper.py")
    write(folder, "raise ValueError\n", "random.py")
    monkeypatch.chdir(folder)
    before = path.read_bytes()
    assert learn("check", str(path)) == 0
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["helper.py", "random.py", "silu.py"]


def test_json_has_the_fields_of_the_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learn("check", str(write(tmp_path, WRONG)), "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == [
        "exercise", "forward", "backward", "verdict", "sentence", "where", "also", "example",
    ]  # fmt: skip
    assert (answer["forward"], answer["backward"]) == ("right", "wrong")
    assert answer["verdict"] == "missing_term"
    assert answer["example"]["got"] != answer["example"]["wanted"]


def test_a_wrong_forward_has_its_own_mark_for_backward(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def relu(x):\n    return 2 * x * (x > 0), lambda dy: 2 * dy * (x > 0)\n",
        "relu.py",
    )
    (verdict,) = check_file(path)
    assert (verdict.forward, verdict.backward) == ("wrong", "right")


def test_a_course_from_start_to_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert learn("start", "silu") == 0
    assert learn("start", "silu") == 2  # never overwritten
    assert learn("check", "silu.py") == 1
    write(tmp_path, WRONG)
    assert learn("check", "silu.py", "--picture", "difference.png") == 1
    assert (tmp_path / "difference.png").read_bytes().startswith(b"\x89PNG")
    for command in ("check", "train"):  # said at once, not after a minute of training
        capsys.readouterr()
        assert learn(command, "silu.py", "--picture", "nowhere/curves.png") == 2
        assert "a folder that exists" in capsys.readouterr().err
    for _ in load_exercise("silu").hints:
        assert learn("hint", "silu") == 0
    assert "4/4" in capsys.readouterr().out
    assert learn("solution", "silu") == 0
    assert "def silu(" in capsys.readouterr().out
    write(tmp_path, RIGHT)
    assert learn("check", "silu.py") == 0
    capsys.readouterr()
    assert learn("status") == 0
    out = capsys.readouterr().out
    assert "1 of " in out
    assert "solution seen" in out
    assert learn("list") == 0
    assert "solved" in capsys.readouterr().out


def test_damaged_progress_is_said_and_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from glasslm.course.learn.progress import progress_path

    for text in ("{", '{"format": 9}', '{"format": 1, "exercises": {"silu": {"hints": "x"}}}'):
        progress_path().parent.mkdir(parents=True, exist_ok=True)
        progress_path().write_text(text, encoding="utf-8")
        assert learn("status") == 0
        assert "progress starts anew" in capsys.readouterr().err


def test_unknown_names_are_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert learn("start", "rmsnorm") == 2
    assert "rms_norm" in capsys.readouterr().err
    assert learn("chek", "x.py") == 2
    assert "check" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL or resource limits")
def test_a_check_is_fast_and_its_first_line_faster(tmp_path: Path) -> None:
    """CPU seconds, which other work on the machine does not change much."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "glasslm", "learn", "check", str(write(tmp_path, RIGHT))],
        capture_output=True, text=True, check=True, timeout=BUSY_SECONDS,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2
    assert done.stderr.startswith("checking")


# -- Python and notebooks --------------------------------------------------------------------------


def test_check_from_python_renders_in_a_notebook() -> None:
    namespace: dict[str, object] = {}
    exec(WRONG, namespace)
    verdict = glasslm.learn.check(namespace["silu"])
    assert verdict.verdict == "missing_term"
    assert "<pre" in verdict._repr_html_()
    assert "right dx" in str(verdict)
    with pytest.raises(InputError, match="softmax"):
        check(namespace["silu"], "sofmax")


@pytest.mark.parametrize("name", glasslm.learn.exercises.COURSE)
def test_every_exercise_has_a_start_a_solution_and_hints(name: str, tmp_path: Path) -> None:
    exercise = load_exercise(name)
    assert len(exercise.hints) >= 2
    assert solution_source(exercise).strip()
    if exercise.derivation:
        assert derivation_text(exercise).startswith("#")
    text = starter_text(exercise)
    assert all(len(line) <= 100 for line in text.splitlines())
    compile(text, f"{name}.py", "exec")
    if exercise.gradients:
        assert all(gradient in text for gradient in exercise.gradients)
    namespace: dict[str, object] = {}
    exec(text, namespace)
    assert check(namespace[name], name).verdict == "not_implemented"
    assert set(exercise.needs) <= set(glasslm.learn.exercises.COURSE)


def test_a_helper_with_the_name_of_an_exercise_is_not_checked(tmp_path: Path) -> None:
    helper = (
        "\n\ndef relu(x):\n    return np.maximum(x, 0)\n\n\ndef helped(x):\n    return relu(x)\n"
    )
    verdicts = check_file(write(tmp_path, RIGHT + helper, "homework.py"))
    assert [verdict.exercise for verdict in verdicts] == ["silu"]
    (verdict,) = check_file(tmp_path / "homework.py", exercise="relu")
    assert verdict.verdict == "not_implemented"
