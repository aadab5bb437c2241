"""The code of a run is recorded, and run only if the user says so."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import glasslm
from glasslm.cli import main
from glasslm.engines import operations
from glasslm.errors import DamagedError, InputError
from small_runs import without_report

SILU = """
import numpy as np

def silu(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, lambda dy: dy * (s + x * s * (1 - s))
"""
SMALL = [
    *("--d-model", "16"),
    *("--n-heads", "2"),
    *("--n-layers", "1"),
    *("--block-size", "16"),
    *("--batch-size", "4"),
    *("--max-steps", "4"),
    *("--sample-interval", "0"),
    *("--tokenizer", "char"),
    *("--engine", "numpy"),
    *("--threads", "1"),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run with an operation of a file, as a process sees it that has not read the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 100)
    (tmp_path / "own.py").write_text(SILU)
    flags = ["--text-file", "text.txt", "--ops", "own.py", "--run-dir", "run"]
    with without_report():
        assert main(["train", *SMALL, *flags]) == 0
        (tmp_path / "run" / "report.html").touch()  # without one, a resume writes it
        monkeypatch.setattr(operations, "_admitted", {})
        yield tmp_path / "run"


def test_the_record_has_the_code_and_a_plain_run_has_none(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["operations"]["text"] == SILU
    assert record["operations"]["names"] == ["silu"]
    assert record["config"]["operations"]["ops_sha256"] == record["operations"]["sha256"]
    assert main(["train", *SMALL, "--text-file", "text.txt", "--run-dir", "plain"]) == 0
    plain = json.loads((run.parent / "plain" / "run.json").read_text())
    assert "operations" not in {*plain, *plain["config"]}
    plain_curve, own_curve = (
        glasslm.train(text_file="text.txt", max_steps=2, d_model=16, n_layers=1, **ops)
        for ops in ({}, {"ops": "own.py"})
    )
    assert own_curve.best_val_loss == pytest.approx(plain_curve.best_val_loss, rel=1e-5)


def test_a_run_computes_with_its_code_only_if_the_user_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["generate", "run", "--prompt", "the"], ["evaluate", "run"], ["resume", "run"]):
        assert main(command) == 2
        assert "not executed unasked" in capsys.readouterr().err
    with pytest.raises(InputError, match="not executed unasked"):
        glasslm.load(run)
    assert not operations._admitted
    for word in ("own.py", "recorded"):
        assert main(["evaluate", "run", "--json", "--ops", word]) == 0
    assert glasslm.load(run, ops="recorded").generate("the", 5)


def test_another_file_is_refused_with_both_hashes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "other.py").write_text(SILU + "\n")
    for command in ("resume", "evaluate"):
        assert main([command, "run", "--ops", "other.py"]) == 2
        message = capsys.readouterr().err
        record = json.loads((run / "run.json").read_text())
        assert record["operations"]["sha256"][:12] in message
        assert "its sha256 is" in message


def test_a_run_is_reproduced_from_its_record_alone(run: Path) -> None:
    (run.parent / "own.py").unlink()
    assert main(["reproduce", "run"]) == 2
    assert main(["reproduce", "run", "--ops", "recorded"]) == 0


def test_code_that_was_changed_in_the_record_is_damage(run: Path) -> None:
    path = run / "run.json"
    path.write_text(path.read_text().replace("np.exp(-x)", "np.exp(-2*x)"))
    with pytest.raises(DamagedError):
        glasslm.load(run, ops="recorded")
    assert not operations._admitted


def test_what_cannot_use_the_code_refuses(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "--to", "hf", "--out", "out"]) == 2
    assert "cannot be exported" in capsys.readouterr().err
    flags = ["--text-file", "text.txt", "--run-dir", "plain"]
    assert main(["train", *SMALL, *flags]) == 0
    Path("plain", "report.html").touch()
    assert main(["resume", "plain", "--ops", "own.py"]) == 2
    assert "was trained without --ops" in capsys.readouterr().err
    assert main(["evaluate", "plain", "--ops", "recorded"]) == 2
    assert main(["train", *SMALL, *flags[:2], "--init-from", "run", "--run-dir", "tuned"]) == 2
    assert "--ops has the sha256" in capsys.readouterr().err


def test_a_file_that_the_model_does_not_use_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--text-file", "text.txt", "--ops", "own.py", "--run-dir", "gelu"]
    assert main(["train", *SMALL, "--feedforward", "gelu", *flags]) == 2
    assert "use --feedforward swiglu" in capsys.readouterr().err
    assert not (run.parent / "gelu").exists()
