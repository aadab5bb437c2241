"""compare takes logs of any program, beside runs: what can be compared is, the rest is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glasslm import cli
from small_runs import train, write_text


def write_log(path: Path, end: float, column: str = "val loss", steps: int = 300) -> Path:
    lines = [f"step {s}: train loss {end + 3 / s:.4f}, {column} {end + 4 / s:.4f}"
             for s in range(10, steps + 1, 10)]  # fmt: skip
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_beside_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(write_text(tmp_path / "t.txt"), tmp_path / "runs" / "mine", sample_interval=0)
    log = write_log(tmp_path / "theirs.log", 2.0)
    assert cli.main(["compare", "mine", str(log), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    kinds = [(side["letter"], side["kind"]) for side in facts["runs"]]
    assert kinds == [("A", "run"), ("B", "log")]
    mine, theirs = (side["results"] for side in facts["runs"])
    assert run.best is not None
    assert mine["best validation loss"] == pytest.approx(run.best["loss"])
    assert theirs["best validation loss"] == pytest.approx(2 + 4 / 300, abs=1e-4)
    assert theirs["at"] == "step 300"
    said = " ".join(facts["remarks"])
    assert "B: a log does not tell settings, text, tokenizer, time and FLOPs" in said
    assert "Validation loss up to step 20, the last that all have" in said
    assert "with one run each that is no proof" in said
    page = Path(facts["page"])
    assert page == Path("comparisons/mine-theirs-log/comparison.html")
    assert "a text log: steps from" in page.read_text(encoding="utf-8")


def test_what_cannot_be_compared_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nats, bpb = write_log(tmp_path / "a.log", 2.0), write_log(tmp_path / "b.log", 1.0, "val bpb")
    epochs = tmp_path / "c.csv"
    epochs.write_text("epoch,loss\n1,4\n2,3\n", encoding="utf-8")
    for other, words in (
        (bpb, "No loss is compared at equal steps: the losses have different units"),
        (epochs, "No loss is compared at equal steps: the curves have different steps, steps"),
    ):
        assert cli.main(["compare", str(nats), str(other)]) == 0
        assert words in " ".join(capsys.readouterr().out.split())
    assert cli.main(["compare", str(nats), str(epochs)]) == 0
    assert "No validation loss: B." in capsys.readouterr().out


def test_a_log_of_validation_losses_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("val_loss", "loss"):
        Path(f"{name}.csv").write_text(f"step,{name}\n1,3\n2,2\n", encoding="utf-8")
    assert cli.main(["compare", "val_loss.csv", "loss.csv", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    validation, training = (side["results"] for side in facts["runs"])
    assert (validation["best validation loss"], validation["last training loss"]) == (2, None)
    assert (training["best validation loss"], training["last training loss"]) == (None, 2)
    said = " ".join(facts["remarks"])
    assert "No validation loss: B." in said
    assert "val_loss.csv has only a validation loss, and loss.csv has none" in said


def test_one_lower_log_of_three_and_one_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [str(write_log(tmp_path / f"{i}.log", 2 - i / 10)) for i in range(3)]
    assert cli.main(["compare", *logs, "nowhere"]) == 0
    printed = capsys.readouterr()
    assert "C has the lowest, 0.1000 below B" in printed.out
    assert "warning: nowhere is left out: there is no run" in printed.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["a.log", "nowhere"], "1 of 2 logs can be read, expected two (nowhere:"),
        (["a.log", "a.log", "--cross"], "--cross scores models on texts"),
        (["x", "y", "--columns", "loss=z"], "--columns is for logs of other programs"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "a.log", 2.0)
    assert cli.main(["compare", *flags]) == 2
    assert words in capsys.readouterr().err


def test_columns_are_those_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        text = f"step,total\n1,{ord(name)}e-2\n2,{ord(name)}e-3\n"
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    assert cli.main(["compare", "a.csv", "b.csv", "--columns", "loss=total", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [side["results"]["last training loss"] for side in facts["runs"]] == [0.097, 0.098]
