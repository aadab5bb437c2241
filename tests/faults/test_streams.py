"""Standard streams that are closed, full or without a reader, and names that the system refuses.

This file is also the program that runs the commands: `python test_streams.py FOLDER`.
"""

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forked_commands import load_commands, run_forked, run_script
from glasslm import cli
from glasslm.runs import run_folder
from small_runs import (
    comparable_results,
    logged_lines,
    shorten_runs,
    train,
    train_command,
    without_report,
    write_text,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL or resource limits")

Ready = Callable[[], None]
TINY = {"max_steps": 2, "eval_interval": 1, "sample_interval": 0}


def closed(*numbers: int) -> Callable[[Ready], None]:
    """As `<&-`, `>&-` and `2>&-` start a program."""

    def prepare(ready: Ready) -> None:
        for number in numbers:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)

    return prepare


def redirected(opened: Callable[[], int], *numbers: int) -> Callable[[Ready], None]:
    """Streams that lead to a descriptor."""

    def prepare(ready: Ready) -> None:
        for number in numbers:
            os.dup2(opened(), number)

    return prepare


def open_full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def open_pipe_without_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def deleted_folder(ready: Ready) -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    Path("../gone").resolve().rmdir()


def commands(folder: Path) -> dict[str, list[str]]:
    """A short command of each kind."""
    base = str(folder / "base")
    return {
        "--help": ["--help"],
        "--version": ["--version"],
        "no command": ["trian"],
        "help of a command": ["train", "--help"],
        "generate": ["generate", base, "--prompt", "the", "--max-new-tokens", "3"],
        "evaluate": ["evaluate", base],
        "corpus": ["corpus", "list"],
        "verify": ["verify", base],
        "unknown flag": ["merge", "--no-such-flag"],
    }


def every_command(folder: Path, kind: str) -> dict[str, list[str]]:
    """Each command of `glasslm --help` with little work; --help where a command takes long."""
    base, out = str(folder / "base"), str(folder / f"out {kind}")
    text = ["--text-file", str(folder / "text.txt")]
    log = folder / "log.csv"
    log.write_text("step,loss\n" + "".join(f"{i},{3 - i / 99}\n" for i in range(99)))
    return {name: [name, "--help"] for name in cli.COMMANDS} | {
        "train": ["train", *text, "--run-dir", base],  # it exists: refused in words
        "finetune": ["finetune", base, *text, "--run-dir", f"{out}, tuned", "--max-steps", "1",
                     "--sample-interval", "0"],
        "merge": ["merge", base, "--run-dir", f"{out}, merged"],
        "resume": ["resume", base],
        "generate": ["generate", base, "--prompt", "the", "--max-new-tokens", "3"],
        "evaluate": ["evaluate", base],
        "corpus": ["corpus", "inspect", *text],
        "report": ["report", base],
        "diagnose": ["diagnose", "--curve", str(log), "--out", f"{out}, diagnosis"],
        "compare": ["compare", base, base],
        "verify": ["verify", base],
        "scale": ["scale", "--plan", "1e18"],
        "learn": ["learn", "list"],
        "export": ["export", base, "--to", "hf", "--out", f"{out}, hf"],
        "import": ["import", base, "--run-dir", f"{out}, imported"],
    }  # fmt: skip


def run_commands(folder: Path) -> dict[str, Any]:
    load_commands()
    sys.modules["transformers"] = None  # type: ignore[assignment]  # an export compares with it
    os.environ["GLASSLM_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    text = write_text(folder / "text.txt")
    train(text, folder / "base", **TINY)
    kinds = {
        "closed": closed(0, 1, 2),
        "full": redirected(open_full, 1, 2),
        "no reader": redirected(open_pipe_without_reader, 1),
    }
    results: dict[str, Any] = {}
    for kind, prepare in kinds.items():
        for name, argv in commands(folder).items():
            results[f"{name}, {kind}"] = run_forked(argv, prepare, place=folder)._asdict()
        argv = train_command(text, folder / kind, **TINY)
        with without_report():  # it takes longer than all others together
            results[f"train, {kind}"] = run_forked(argv, prepare, place=folder)._asdict()
    with without_report():
        for kind in kinds if "slow" in sys.argv else ["full"]:
            for name, argv in every_command(folder, kind).items():
                result = run_forked(argv, kinds[kind], place=folder)
                results[f"every {name}, {kind}"] = result._asdict()
    for number in (1, 2):
        only = redirected(open_full, number)
        argv = ["evaluate", str(folder / "base")]
        results[f"evaluate, {number} full"] = run_forked(argv, only, place=folder)._asdict()
    long, odd = str(folder / ("n" * 300)), os.fsdecode(os.fsencode(folder) + b"/caf\xe9")
    base = str(folder / "base")
    for kind, name in {"long": long, "not UTF-8": odd, "with NUL": f"{folder}/a\0b"}.items():
        argvs = [
            train_command(text, Path(name), **TINY),
            ["evaluate", name],
            ["export", base, "--to", "hf", "--out", name],
            ["train", "--text-file", name],
            ["report", name],
            ["resume", name],
            ["verify", name],
            ["evaluate", base, "--text-file", name],
            ["import", name],
            ["merge", base, "--run-dir", name],
            ["diagnose", "--curve", name],
            ["compare", base, name],
            ["train", "--text-file", str(text), "--tokenizer", name],
        ]
        for argv in argvs if kind == "long" else argvs[:3]:
            key = f"{' '.join(word for word in argv if word != name)[-40:]}, {kind} name"
            results[key] = run_forked(argv, place=folder)._asdict()
    results["report, deleted folder"] = run_forked(
        ["report", base], deleted_folder, place=folder
    )._asdict()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_script(__file__, folder)


def test_no_command_ends_with_a_traceback(results: dict[str, Any]) -> None:
    for name, result in results.items():
        assert result["code"] in (0, 1, 2, 4, 6), (name, result)
        assert "Traceback" not in result["err"] + result["out"], (name, result)


def test_a_full_standard_output_is_an_error_and_a_closed_one_is_none(
    results: dict[str, Any],
) -> None:
    for name in ("--help", "--version", "help of a command", "generate", "evaluate", "corpus"):
        assert results[f"{name}, full"]["code"] == 6, name
        assert results[f"{name}, closed"]["code"] == 0, name
        assert results[f"{name}, no reader"]["code"] == 0, name
        assert results[f"{name}, no reader"]["err"].count("\n") <= 2, name
    assert results["evaluate, 1 full"]["code"] == 6
    assert "No space left on device" in results["evaluate, 1 full"]["err"]
    assert results["evaluate, 2 full"]["code"] == 0
    assert "bits per byte" in results["evaluate, 2 full"]["out"]


def check_every_command(results: dict[str, Any], kind: str) -> None:
    for name in cli.COMMANDS:
        result = results[f"every {name}, {kind}"]
        assert "Traceback" not in result["err"] + result["out"], (name, kind, result)
        assert result["code"] in ((0, 1, 2, 6) if kind == "full" else (0, 1, 2)), (name, result)


def test_every_command_ends_in_words_on_a_full_device(results: dict[str, Any]) -> None:
    check_every_command(results, "full")
    for name in ("generate", "evaluate", "corpus", "report", "compare", "scale", "learn", "export"):
        assert results[f"every {name}, full"]["code"] == 6, name


@pytest.mark.slow
def test_every_command_ends_in_words_without_its_streams(tmp_path: Path) -> None:
    results = run_script(__file__, tmp_path, "slow")
    for kind in ("closed", "no reader"):
        check_every_command(results, kind)


def test_training_goes_on_without_its_streams(folder: Path, results: dict[str, Any]) -> None:
    for kind in ("closed", "full", "no reader"):
        assert results[f"train, {kind}"]["code"] == 0, results[f"train, {kind}"]
        assert logged_lines(folder / kind, "end")[0]["status"] == "finished"
        assert comparable_results(folder / kind, 2) == comparable_results(folder / "base", 2)


def test_a_name_that_the_system_refuses_is_an_error_in_one_line(results: dict[str, Any]) -> None:
    names = {name: result for name, result in results.items() if name.endswith(" name")}
    assert len(names) == 19
    for name, result in names.items():
        assert result["code"] in (2, 4), (name, result)
        assert result["err"].count("\n") <= 2, (name, result)


def test_a_deleted_working_folder_is_named_with_a_cure(results: dict[str, Any]) -> None:
    result = results["report, deleted folder"]
    assert (result["code"], result["err"].count("\n")) == (2, 1)
    assert "change to another one with cd" in result["err"]


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (errno.EACCES, 2, "{reason}: check run␛[2J.json"),
        (errno.EIO, 2, "{reason}: check run␛[2J.json"),
        (errno.ELOOP, 2, "{reason}: check run␛[2J.json"),
        (errno.ENOSPC, 6, "no room to write run␛[2J.json ({reason}): free some space"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_the_name(
    number: int,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unreadable files are among it; root reads them all."""

    def refuse(name: str) -> None:
        raise OSError(number, os.strerror(number), "run\x1b[2J.json")

    monkeypatch.setattr(run_folder, "find_run", refuse)
    assert cli.main(["report", "run"]) == code
    expected = message.format(reason=os.strerror(number))
    assert capsys.readouterr().err == f"glasslm report: {expected}\n"


def test_a_display_whose_stream_breaks_under_way_stops_alone() -> None:
    """Full, hung up or closed: the run does not notice."""
    from glasslm.training.display import Display

    class Broken(io.StringIO):
        def __init__(self, error: Exception) -> None:
            super().__init__()
            self.error = error

        def write(self, text: str) -> int:
            raise self.error

    for error in (OSError(errno.ENOSPC, ""), OSError(errno.EIO, ""), ValueError("closed file")):
        with Display(10, "run", stream=Broken(error)) as display:
            display.show({"kind": "warning", "step": 1, "code": "spike", "message": "a"})
            display.tick(2)


def test_a_display_needs_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has None there where it was closed before the start."""
    from glasslm.training.display import Display

    monkeypatch.setattr(sys, "stderr", None)
    with Display(10, "run") as display:
        display.show({"kind": "warning", "step": 1, "code": "spike", "message": "a"})


if __name__ == "__main__":
    shorten_runs(pytest.MonkeyPatch())
    print(json.dumps(run_commands(Path(sys.argv[1]))))
