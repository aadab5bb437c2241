"""Edits of the files of a run are found; a killed run gets its report, or its place again.

Every edit is one that leaves a file which can be read: a flipped bit, another digit, another word.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli, files, strict_json
from glasslm.cli import resume as resume_command
from glasslm.errors import DamagedError, InputError
from glasslm.lab.verification import comparison, integrity, log_comparison
from glasslm.report import run_report
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.protection import open_run, require_unaltered
from glasslm.runs.run_folder import Run
from glasslm.training import launch
from small_runs import (
    COMPUTE,
    comparable_results,
    drop_hashes,
    ignore_message,
    interrupt_at,
    read_json,
    resume,
    train,
    write_text,
)

EDITS = 100  # of each file; docs/faults.md has it
FLAGS: dict[str, Any] = {"max_steps": 6, "sample_interval": 0, "checkpoint_interval": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", sentences=40)


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(text, tmp_path_factory.mktemp("runs") / "finished", **FLAGS).run_dir


@pytest.fixture(scope="module")
def interrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted at step 4 of 6."""
    path = tmp_path_factory.mktemp("runs") / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(4, patch)
        return train(text, path, **FLAGS).run_dir


def edit(content: bytes, draw: random.Random) -> bytes:
    """`content` with one bit flipped, or with one digit changed to another."""
    digits = [index for index, byte in enumerate(content) if chr(byte).isdigit()]
    changed = bytearray(content)
    if digits and draw.random() < 0.5:
        index = draw.choice(digits)
        changed[index] = draw.choice([digit for digit in b"0123456789" if digit != content[index]])
    else:
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def found_by_verify(run_dir: Path, name: str) -> bool:
    parts = {part.name: part for part in integrity.examine_run(run_dir)}
    return parts[name].verdict == "damaged"


def found_by_resume(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether resume raises DamagedError before it trains."""

    class Trains(Exception):
        pass

    def refuse(*arguments: Any, **options: Any) -> None:
        metrics.MetricsLog(
            run_dir / "metrics.jsonl", *checkpoint.load(run_dir).position.metrics_position
        ).close()
        raise Trains

    monkeypatch.setattr(launch, "_run_loop", refuse)
    monkeypatch.setattr(launch, "make_engine", lambda *_, **__: _NoEngine())
    try:
        launch.resume(run_dir, COMPUTE, ignore_message)
    except DamagedError:
        return True
    except Trains:
        return False
    raise AssertionError("it neither trained nor was refused")


class _NoEngine:
    def load(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("name", ["run.json", "tokenizer.json", "metrics.jsonl"])
def test_any_edit_is_found_by_verify_and_compare(name: str, finished: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    content = (run_dir / name).read_bytes()
    draw = random.Random(1)
    for number in range(EDITS):
        (run_dir / name).write_bytes(edit(content, draw))
        with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
            require_unaltered(Run(run_dir)), list(Run(run_dir).metrics())
        if number % 10 == 0:  # reads all checkpoints
            assert found_by_verify(run_dir, name)
    compared, errors = comparison.read_runs([str(finished), str(finished), str(run_dir)])
    assert (len(compared), list(errors)) == (2, [str(run_dir)])
    logs, errors = log_comparison.read_logs([str(finished), str(finished), str(run_dir)])
    assert (len(logs), list(errors)) == (2, [str(run_dir)])


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_any_edit_is_found_by_resume_or_has_no_effect(
    name: str, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = shutil.copytree(interrupted, tmp_path / "run")
    content = (run_dir / name).read_bytes()
    end = len(content) if name == "run.json" else checkpoint.load(run_dir).position.metrics_bytes
    draw = random.Random(2)
    for _ in range(EDITS // 4):
        changed = edit(content, draw)
        (run_dir / name).write_bytes(changed)
        is_found = found_by_resume(run_dir, monkeypatch)
        assert is_found or changed[:end] == content[:end]  # a resume cuts the rest


def test_a_finished_run_with_an_edited_end_is_damaged(finished: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    path = run_dir / "metrics.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    end = json.loads(last)
    without_hash = {key: value for key, value in end.items() if key != "sha256"}
    for changed in (
        end | {"best_loss": 0.5},
        without_hash,
        without_hash | {"best_loss": 0.5},
        end | {"status": "stopped"},
    ):
        path.write_bytes(b"".join(lines) + strict_json.json_bytes(changed, indent=None))
        with pytest.raises(DamagedError, match=r"sha256 is [0-9a-f]{64}.* says"):
            resume(run_dir)
        assert found_by_verify(run_dir, "metrics.jsonl")
    better = {**without_hash, "best_loss": 0.1}
    for further in (last, strict_json.json_bytes(better, indent=None)):
        path.write_bytes(b"".join(lines) + last + further)
        assert found_by_verify(run_dir, "metrics.jsonl")


def test_another_engine_in_run_json_is_refused_with_both_hashes_and_a_cure(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(interrupted, tmp_path / "run")
    before = Run(run_dir).record_sha256
    record = read_json(run_dir / "run.json") | {"precision": "fp64"}
    files.write_json(run_dir / "run.json", record)
    for command in ("resume", "report", "evaluate"):
        assert cli.main([command, str(run_dir)]) == 4
        message = capsys.readouterr().err
        assert before in message
        assert Run(run_dir).record_sha256 in message
        assert "Restore it from a copy" in message
    assert cli.main(["verify", str(run_dir)]) == 1


READERS: dict[str, list[str]] = {
    "resume": [],
    "report": [],
    "evaluate": [],
    "generate": ["--prompt", "the"],
    "chat": [],
    "check": [],
    "diagnose": [],
    "reproduce": [],
    "merge": [],
    "finetune": ["--text-file", "TEXT"],
    "export": ["--to", "hf", "--out", "OUT"],
}
LOG_READERS = ("resume", "report", "diagnose", "reproduce", "merge", "export")


def run_reader(command: str, run_dir: Path, text: Path) -> int:
    out = str(run_dir.parent / "out")
    words = {"TEXT": str(text), "OUT": out}
    return cli.main([command, str(run_dir), *(words.get(flag, flag) for flag in READERS[command])])


@pytest.mark.parametrize("command", READERS)
def test_every_command_refuses_an_altered_run(
    command: str, finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An edit of run.json, and one of tokenizer.json that leaves the same tokenizer."""
    for name in ("run.json", "tokenizer.json"):
        run_dir = shutil.copytree(finished, tmp_path / name / "run")
        before = files.file_sha256(run_dir / name)
        with open(run_dir / name, "a", encoding="utf-8") as file:
            file.write(" ")
        assert run_reader(command, run_dir, text) == 4
        message = capsys.readouterr().err
        assert name in message
        assert before in message
        assert files.file_sha256(run_dir / name) in message
        assert [path.name for path in run_dir.parent.iterdir()] == ["run"]
    assert f"glasslm {command}: " in message


@pytest.mark.parametrize("command", LOG_READERS)
def test_every_command_that_reads_the_log_refuses_an_altered_or_missing_one(
    command: str, finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    log = run_dir / "metrics.jsonl"
    content = log.read_bytes()
    log.write_bytes(content.replace(b"2", b"3", 1))
    assert run_reader(command, run_dir, text) == 4
    assert str(log) in capsys.readouterr().err
    if command == "diagnose":
        assert cli.main(["diagnose", "--curve", str(run_dir)]) == 4
        assert str(log) in capsys.readouterr().err
    log.unlink()
    assert run_reader(command, run_dir, text) == 4
    assert str(log) in capsys.readouterr().err


def test_a_log_of_an_older_run_may_not_be_missing(finished: Path, tmp_path: Path) -> None:
    run_dir = drop_hashes(shutil.copytree(finished, tmp_path / "run"))
    require_unaltered(Run(run_dir))
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(DamagedError, match=r"metrics\.jsonl is missing"):
        require_unaltered(Run(run_dir))


def test_an_edited_configuration_of_an_older_run_is_found(finished: Path, tmp_path: Path) -> None:
    run_dir = drop_hashes(shutil.copytree(finished, tmp_path / "run"))
    record = read_json(run_dir / "run.json")
    record["config"]["optimizer"]["lr"] = 0.5
    files.write_json(run_dir / "run.json", record)
    with pytest.raises(DamagedError, match="another config"):
        open_run(run_dir)


def test_commands_open_runs_in_one_place() -> None:
    """So that each command compares run.json with its hash."""
    source = Path(cli.__file__).parents[1]
    callers = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if "find_run(" in path.read_text(encoding="utf-8")
    }
    assert callers == {
        "runs/run_folder.py",  # defines it
        "runs/protection.py",  # open_run
        "cli/verify.py",  # names each damage
        "cli/resume.py",  # compares the checkpoint that it continues from
        "serve/served_model.py",  # loads the model of each run, which opens it
    }


def test_an_older_run_has_no_protection_and_is_told_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = drop_hashes(shutil.copytree(finished, tmp_path / "run"))
    assert cli.main(["verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("not protected by a hash: an older glasslm") == 2
    require_unaltered(Run(run_dir))


def test_verify_says_what_it_does_not_check(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(finished)]) == 0
    out = capsys.readouterr().out
    assert out.count("sha256 as in") >= 3
    assert "not verified: report, figures, spikes, diagnosis and lock" in out


# -- killed runs -----------------------------------------------------------------------------------


def test_a_run_that_was_killed_before_its_report_gets_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the report, and before the last line of the log."""

    def write_report(run_dir: Path, time_share: float) -> Path:
        (run_dir / "report.html").write_text("<html></html>")
        return run_dir / "report.html"

    monkeypatch.setattr(run_report, "write", write_report)
    run_dir = shutil.copytree(finished, tmp_path / "run")
    log = run_dir / "metrics.jsonl"
    results, whole = comparable_results(run_dir, 6), log.read_bytes()
    outcome = resume_command._outcome_without_report(run_dir)
    assert outcome is not None
    assert outcome.elapsed_s == metrics.elapsed_s(Run(run_dir).metrics()) > 0  # of the training
    assert cli.main(["resume", str(run_dir)]) == 0
    assert (run_dir / "report.html").exists()
    assert log.read_bytes() == whole
    (run_dir / "report.html").unlink()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert cli.main(["resume", str(run_dir)]) == 0
    assert (run_dir / "report.html").exists()
    assert Run(run_dir).history.status == "finished"
    assert comparable_results(run_dir, 6) == results


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_again(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    assert cli.main(["verify", str(run_dir)]) == 1
    assert "all checkpoints are missing" in capsys.readouterr().out
    with pytest.raises(InputError, match="checkpoints are missing"):
        run_folder.require_new(run_dir)
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:9])
    assert cli.main(["verify", str(run_dir)]) == 0
    assert "starts it again" in capsys.readouterr().out
    with pytest.raises(DamagedError, match=r"before its first checkpoint.*same folder"):
        resume(run_dir)
    assert train(text, run_dir, **FLAGS | {"seed": 3}).status == "finished"
    assert Run(run_dir).record["seed"] == 3
    require_unaltered(Run(run_dir))
