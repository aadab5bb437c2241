"""A run trained again from its record has the same bits, or the first difference is reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli, files
from glasslm.errors import DamagedError, InputError
from glasslm.lab.verification import reproduction
from glasslm.lab.verification.reproduction import Reproduction
from glasslm.runs import checkpoint
from glasslm.runs.blas import format_blas
from glasslm.runs.run_folder import Run
from small_runs import drop_hashes, ignore_message, train, without_report, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reproduced")
    train(write_text(path / "text.txt"), path / "run", dropout=0.1)
    return path


def reproduce(run: Path, again: Path, steps: int | None = None) -> Reproduction:
    with without_report():
        return reproduction.reproduce(Run(run), again, steps, "glasslm reproduce", ignore_message)


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def edit_metrics(run: Path, step: int, **changes: Any) -> None:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["kind"] == "step" and line["step"] == step:
            line |= changes
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def test_the_same_bits_again(folder: Path, tmp_path: Path) -> None:
    result = reproduce(folder / "run", tmp_path / "again")
    assert result.is_identical
    assert result.first_difference is None
    assert (result.steps, result.last_step) == (20, 20)
    assert [pair.step for pair in result.checkpoints] == checkpoint.list_steps(folder / "run")
    assert len(result.checkpoints) >= 5
    assert result.lines == 20 + 5 + 3  # steps, evaluations at 0, 5, ..., samples at 0, 10, 20
    assert result.environment == []


def test_the_first_steps_are_those_of_the_same_schedule(folder: Path, tmp_path: Path) -> None:
    result = reproduce(folder / "run", tmp_path / "again", steps=7)
    assert result.is_identical
    assert (result.steps, result.last_step, result.interrupted_by) == (7, 7, None)
    assert [pair.step for pair in result.checkpoints] == [0, 5]
    assert Run(tmp_path / "again").config.train.max_steps == 20
    assert checkpoint.list_steps(tmp_path / "again")[-1] == 7


def test_an_interrupted_run_is_compared_as_far_as_it_got(folder: Path, tmp_path: Path) -> None:
    first = reproduce(folder / "run", tmp_path / "part", steps=8)
    assert Run(first.new_run).history.status == "interrupted"
    result = reproduce(first.new_run, tmp_path / "again")
    assert result.is_identical
    assert result.steps == 8
    assert [pair.step for pair in result.checkpoints] == [0, 5, 8]


def test_where_they_part_is_told(folder: Path, tmp_path: Path) -> None:
    copied = copy(folder / "run", tmp_path / "run")
    loss = [line["loss"] for line in Run(copied).metrics() if line["kind"] == "step"][11]
    edit_metrics(copied, 12, loss=loss + 0.25)
    edit_metrics(copied, 15, loss=0.0)
    result = reproduction.compare_runs(Run(copied), Run(folder / "run"), 20, whole=True)
    assert not result.is_identical
    assert result.first_difference is not None
    assert (result.first_difference.step, result.first_difference.where) == (12, "step: loss")
    assert result.first_difference.difference == pytest.approx(0.25)
    assert (
        reproduction.compare_runs(
            Run(copied), Run(folder / "run"), 11, whole=False
        ).first_difference
        is None
    )
    edit_metrics(copied, 12, loss=loss, extra="of another version", timing={"elapsed_s": 9})
    edit_metrics(copied, 15, kind="warning", code="", message="")
    missing = reproduction.compare_runs(
        Run(copied), Run(folder / "run"), 20, whole=True
    ).first_difference
    assert missing is not None
    assert missing.step in (15, 16)
    path = copied / "metrics.jsonl"
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"kind":"sample"' in line.replace(" ", ""))
    path.write_text("".join(lines[:last] + lines[last + 1 :]), encoding="utf-8")
    cut = reproduction.compare_runs(
        Run(copied), Run(folder / "run"), 20, whole=True
    ).first_difference
    assert cut is not None
    assert (cut.step, cut.where) == (20, "number of lines")
    assert (
        reproduction.compare_runs(
            Run(copied), Run(folder / "run"), 20, whole=False
        ).first_difference
        is None
    )


def test_checkpoints_are_compared_value_by_value(folder: Path, tmp_path: Path) -> None:
    train(folder / "text.txt", tmp_path / "other", dropout=0.1, seed=8)
    shutil.copyfile(folder / "run" / "metrics.jsonl", tmp_path / "other" / "metrics.jsonl")
    result = reproduction.compare_runs(Run(folder / "run"), Run(tmp_path / "other"), 20, whole=True)
    assert result.first_difference is None
    assert not result.is_identical
    assert all(
        not pair.is_identical and pair.difference > 0 and pair.where for pair in result.checkpoints
    )


def test_a_damaged_checkpoint_is_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    copied = copy(folder / "run", tmp_path / "run")
    weights = copied / "checkpoints" / "000010" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = reproduction.compare_runs(Run(copied), Run(folder / "run"), 20, whole=True)
    assert 10 not in [pair.step for pair in result.checkpoints]
    assert len(result.notes) == 1
    assert "step 10" in result.notes[0]


def test_a_time_limit_has_become_a_number_of_steps(folder: Path, tmp_path: Path) -> None:
    copied = copy(folder / "run", tmp_path / "run")
    record = json.loads((copied / "run.json").read_text(encoding="utf-8"))
    record["config"]["train"]["max_time"] = "1s"
    (copied / "run.json").write_text(json.dumps(record), encoding="utf-8")
    result = reproduce(copied, tmp_path / "again", steps=2)
    assert result.is_identical
    assert Run(result.new_run).config.train.max_steps == 20


def test_other_text_is_refused_with_both_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.txt")
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    train(text, tmp_path / "run", max_steps=2)
    shutil.rmtree(tmp_path / "cache")
    known = files.file_sha256(text)
    text.write_text(text.read_text(encoding="utf-8").upper(), encoding="utf-8")
    assert cli.main(["reproduce", str(tmp_path / "run")]) == 4
    message = capsys.readouterr().err
    assert known in message
    assert files.file_sha256(text) in message
    assert not (tmp_path / "run-reproduced").exists()


def test_text_that_is_gone_comes_from_the_cache(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", sentences=140)
    train(text, tmp_path / "run", max_steps=3)
    text.unlink()
    assert reproduce(tmp_path / "run", tmp_path / "again").is_identical


def test_a_fine_tuned_run_needs_its_base(folder: Path, tmp_path: Path) -> None:
    base = copy(folder / "run", tmp_path / "base")
    train(folder / "text.txt", tmp_path / "tuned", init_from=str(base), dropout=0.1, max_steps=4)
    assert reproduce(tmp_path / "tuned", tmp_path / "again").is_identical
    record = json.loads((tmp_path / "tuned" / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "tuned" / "run.json").write_text(
        json.dumps(record | {"base": record["base"] | {"step": 3}}), encoding="utf-8"
    )
    with pytest.raises(DamagedError, match="its step is"):
        reproduce(tmp_path / "tuned", tmp_path / "third")
    shutil.rmtree(base)
    with pytest.raises(InputError, match="there is no run"):
        reproduce(tmp_path / "tuned", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_the_command_has_a_verdict_and_a_code(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with without_report():
        copied = copy(folder / "run", tmp_path / "run")
        assert cli.main(["reproduce", str(copied), "--steps", "3"]) == 0
        assert "the same, bit for bit" in capsys.readouterr().out
        assert (tmp_path / "run-reproduced" / "run.json").is_file()
        assert cli.main(["reproduce", str(copied), "--steps", "3"]) == 2  # there is one by now
        capsys.readouterr()
        drop_hashes(copied)  # with them an edit is damage
        edit_metrics(copied, 2, loss=1.0)
        again = ["--run-dir", str(tmp_path / "again")]
        assert cli.main(["reproduce", str(copied), "--steps", "3", "--json", *again]) == 1
        facts = json.loads(capsys.readouterr().out)
        assert set(facts) == {
            "same_within_rounding",
            "kernels",
            "run",
            "again",
            "same",
            "steps",
            "reached",
            "lines",
            "trained",
            "parting",
            "checkpoints",
            "circumstances",
            "notes",
            "interrupted_by",
        }
        assert set(facts["parting"]) == {"step", "where", "then", "now"}
        assert set(facts["checkpoints"][0]) == {"step", "same", "difference", "where"}
        assert not facts["same"]
        assert facts["parting"]["step"] == 2
        shutil.rmtree(tmp_path / "again")
        assert cli.main(["reproduce", str(copied), "--steps", "3", *again]) == 1
        out = capsys.readouterr().out
        assert "first difference at step 2 (step: loss)" in out
        assert "Equal bits are guaranteed" in out
        assert cli.main(["reproduce", str(copied), "--steps", "0"]) == 2


@pytest.mark.parametrize(
    ("kernel", "factor", "code"),
    [("Unheardof", 1 + 1e-6, 0), ("Unheardof", 1.05, 1), (None, 1 + 1e-6, 1)],
)
def test_another_blas_kernel_has_a_tolerance_and_both_kernels_are_named(
    kernel: str | None,
    factor: float,
    code: int,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = drop_hashes(copy(folder / "run", tmp_path / "run"))  # with them an edit is damage
    record = json.loads((copied / "run.json").read_text(encoding="utf-8"))
    blas = record["blas"] or {"library": "none", "version": "", "kernel": "", "threads": 1}
    if kernel:
        record["blas"] = blas | {"kernel": kernel}
        (copied / "run.json").write_text(json.dumps(record), encoding="utf-8")
    then = next(
        line for line in Run(copied).metrics() if line["kind"] == "step" and line["step"] == 2
    )
    assert then["kind"] == "step"
    edit_metrics(copied, 2, loss=(then["loss"] or 0.0) * factor)
    with without_report():
        assert cli.main(["reproduce", str(copied), "--steps", "3"]) == code
    out = capsys.readouterr().out
    assert "first difference at step 2 (step: loss)" in out
    if kernel:
        assert f"{kernel}, now by {format_blas(record['blas'] | {'kernel': blas['kernel']})}" in out
        assert ("not the same within rounding" in out) == (code == 1)
    else:
        assert "within rounding" not in out


def test_without_a_step_to_compare_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.txt")
    rarely = {"log_interval": 10, "eval_interval": 10, "checkpoint_interval": 10}
    train(text, tmp_path / "run", max_steps=20, **rarely)
    assert cli.main(["reproduce", str(tmp_path / "run"), "--steps", "5"]) == 2
    assert "give --steps 10 or more" in capsys.readouterr().err
    assert not (tmp_path / "run-reproduced").exists()
    with without_report():
        assert cli.main(["reproduce", str(tmp_path / "run"), "--steps", "10"]) == 0
    capsys.readouterr()
    early = reproduction.compare_runs(
        Run(tmp_path / "run"), Run(tmp_path / "run-reproduced"), 9, whole=False
    )
    assert (early.n_trained_results, early.is_identical) == (0, False)
    train(text, tmp_path / "short", max_steps=20, **rarely | {"checkpoint_interval": 4})
    assert reproduce(tmp_path / "short", tmp_path / "again", steps=5).is_identical
    monkeypatch.setattr(reproduction, "reproduce", lambda *arguments: early)
    assert cli.main(["reproduce", str(tmp_path / "run")]) == 1
    output = capsys.readouterr().out
    assert "no step was compared" in output
    assert "the same" not in output


def test_the_first_field_that_differs_is_the_first_of_the_line() -> None:
    names = [f"field {index}" for index in range(40)]
    line = {"kind": "step", "step": 1}
    parting = reproduction._first_difference(
        [line | dict.fromkeys(names, 1)], [line | dict.fromkeys(names[::-1], 2)], True
    )
    assert parting is not None
    assert parting.where == "step: field 0"
