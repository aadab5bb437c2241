"""Cross evaluation: each number is the model's own, on a text that its whole column can read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import cli
from glasslm.errors import InputError
from glasslm.inference import trained_model
from glasslm.lab.verification import comparison, cross_evaluation
from glasslm.lab.verification.compared_run import ComparedRun
from glasslm.report import figures
from glasslm.runs.run_folder import Run
from glasslm.training import launch
from small_runs import COMPUTE, ignore_message, small_config, train, without_report, write_text

FEW: dict[str, Any] = {
    "max_steps": 2,
    "sample_interval": 0,
    "checkpoint_interval": 2,
    "eval_interval": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a text by characters and by bytes, of one with digits in some lines, and in Greek."""
    path = tmp_path_factory.mktemp("crossed")
    plain = write_text(path / "plain.txt", 300)
    lines = plain.read_text(encoding="utf-8").splitlines()
    with_digits = [
        f"{line} 7" if i % 16 == 5 else line.replace("cat", "act") for i, line in enumerate(lines)
    ]
    (path / "counted.txt").write_text("\n".join(with_digits) + "\n", encoding="utf-8", newline="\n")
    greek = "".join(f"\u1f45 {line.translate({97: 945, 101: 949})}\n" for line in lines)
    (path / "greek.txt").write_text(greek, encoding="utf-8", newline="\n")
    train(plain, path / "plain", **FEW)
    train(plain, path / "bytes", tokenizer="byte", **FEW)
    train(path / "counted.txt", path / "counted", **FEW)
    train(path / "greek.txt", path / "greek", **FEW)
    return path


def sides(folder: Path, *names: str) -> list[ComparedRun]:
    return comparison.label_runs([Run(folder / name) for name in names])


@pytest.fixture(scope="module")
def matrix(folder: Path) -> cross_evaluation.CrossEvaluation:
    return cross_evaluation.evaluate_runs(
        sides(folder, "plain", "bytes", "counted", "greek"), ignore_message
    )


def bits_per_byte(run: Path, text: str) -> float:
    """By the model's own losses, and the bytes of all but the first token."""
    model = trained_model.load_model(run)
    first = len(model.tokenizer.token_bytes[model.tokenizer.encode(text)[0]])
    return float(np.sum(model.losses(text)) / math.log(2) / (len(text.encode()) - first))


def test_each_number_is_the_models_own(
    folder: Path, matrix: cross_evaluation.CrossEvaluation
) -> None:
    assert [column.owners for column in matrix.columns] == ["A, B", "C", "D"]
    names = dict(zip("ABCD", ("plain", "bytes", "counted", "greek")))
    measured = 0
    for column in matrix.columns:
        for letter, bpb in column.bpb.items():
            assert bpb == pytest.approx(
                bits_per_byte(folder / names[letter], column.text), rel=1e-6
            )
            measured += 1
    assert measured == 3 + 3 + 2


def test_on_its_own_text_a_run_has_what_evaluate_says(
    folder: Path, matrix: cross_evaluation.CrossEvaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, letter, column in (("plain", "A", 0), ("bytes", "B", 0), ("greek", "D", 2)):
        assert cli.main(["evaluate", str(folder / name), "--json"]) == 0
        expected = json.loads(capsys.readouterr().out)["bpb"]
        assert matrix.columns[column].bpb[letter] == pytest.approx(expected, rel=1e-9)


def test_lines_that_one_cannot_read_are_left_out_for_all(
    folder: Path, matrix: cross_evaluation.CrossEvaluation
) -> None:
    data = (folder / "counted.txt").read_bytes()
    val = data[int(0.9 * len(data)) :].decode()
    column = matrix.columns[1]
    assert "7" in val
    assert column.text == "".join(line for line in val.splitlines(keepends=True) if "7" not in line)
    assert set(column.bpb) == {"A", "B", "C"}
    text = " ".join(matrix.remarks)
    left_out = 1 - len(column.text) / len(val)
    assert f"Of the text of C, {left_out:.1%} is left out for all" in text
    assert "'7'" in text


def test_who_cannot_read_a_text_has_no_number_there(
    matrix: cross_evaluation.CrossEvaluation,
) -> None:
    column = matrix.columns[2]
    assert set(column.bpb) == {"B", "D"}
    assert "\u1f45" in column.text
    assert "A cannot read the text of D: 100% of it" in " ".join(matrix.remarks)
    assert dict(matrix.rows)["A"][2] == "-"
    assert matrix.facts["bpb"]["A"][2] is None
    assert matrix.facts["bpb"]["B"][2] == column.bpb["B"]


@pytest.mark.parametrize("split", [{"val_fraction": 0.2}, {"test_fraction": 0.1}])
def test_a_text_that_another_run_was_trained_on_is_named(
    split: dict[str, float], folder: Path, tmp_path: Path, matrix: cross_evaluation.CrossEvaluation
) -> None:
    assert not any("training text" in remark for remark in matrix.remarks)
    train(folder / "plain.txt", tmp_path / "other", **FEW, **split)
    runs = comparison.label_runs([Run(folder / "plain"), Run(tmp_path / "other")])
    remarks = cross_evaluation.evaluate_runs(runs, ignore_message).remarks
    (remark,) = [remark for remark in remarks if "training text" in remark]
    assert remark.startswith("The training text of A may contain a part of the text of B:")


def test_a_run_that_learned_answers_alone_is_not_scored(folder: Path, tmp_path: Path) -> None:
    config = small_config(Path("none"), **FEW, text_file=(), corpus="task:sort", task_examples=100)
    with without_report():
        launch.train(config, COMPUTE, tmp_path / "task", notify=ignore_message)
    runs = comparison.label_runs([Run(folder / "plain"), Run(tmp_path / "task")])
    matrix = cross_evaluation.evaluate_runs(runs, ignore_message)
    assert [column.owners for column in matrix.columns] == ["A"]
    assert dict(matrix.rows)["B"] == ["-"]
    assert any(remark.startswith("B learned the answers") for remark in matrix.remarks)
    with pytest.raises(InputError, match="no run learned a text"):
        cross_evaluation.evaluate_runs(runs[1:], ignore_message)


def test_of_a_large_text_whole_lines_are_taken_evenly(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_evaluation, "MAX_TEXT_BYTES", 400)
    monkeypatch.setattr(cross_evaluation, "EXCERPTS", 4)
    matrix = cross_evaluation.evaluate_runs(sides(folder, "bytes", "plain"), ignore_message)
    column = matrix.columns[0]
    data = (folder / "plain.txt").read_bytes()
    val = data[int(0.9 * len(data)) :].decode()
    assert 150 < column.bytes <= 400 < column.total == len(val)
    lines = val.splitlines()
    places, start = [], 0
    for line in column.text.splitlines():  # each is a whole line, in order
        start = lines.index(line, start)
        places.append(start)
        start += 1
    assert min(places) < len(lines) / 4
    assert max(places) > len(lines) * 0.7
    assert (
        f"Of the text of A, B, {column.bytes / len(val):.1%} is scored, evenly spaced."
        in matrix.remarks
    )


def test_what_is_gone_leaves_a_gap_and_a_word(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "gone.txt", 200)
    train(text, tmp_path / "gone", **FEW)
    for checkpoint in (tmp_path / "gone" / "checkpoints").glob("*/model.safetensors"):
        checkpoint.write_bytes(b"")
    matrix = cross_evaluation.evaluate_runs(
        [*sides(folder, "plain", "counted"), ComparedRun("C", Run(tmp_path / "gone"))],
        ignore_message,
    )
    assert matrix.columns[2].bpb["C"] is None
    assert matrix.columns[2].bpb["A"] is not None
    assert "C could not be scored" in " ".join(matrix.remarks)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "empty"))
    text.unlink()
    matrix = cross_evaluation.evaluate_runs(
        [*sides(folder, "plain", "counted"), ComparedRun("C", Run(tmp_path / "gone"))],
        ignore_message,
    )
    assert matrix.columns[2].bpb == {}
    assert "The text of C could not be loaded" in " ".join(matrix.remarks)
    assert dict(matrix.rows)["A"][2] == "-"


def test_where_all_lines_are_left_out_there_is_nothing_to_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_evaluation, "MIN_READABLE_SHARE", 0.0)
    matrix = cross_evaluation.evaluate_runs(sides(folder, "plain", "greek"), ignore_message)
    assert [column.bpb for column in matrix.columns] == [{}, {}]
    assert "Of the text of B, 100.0% is left out for all" in " ".join(matrix.remarks)


def test_tokens_that_forget_what_they_read_have_no_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a tokenizer that makes all letters small."""
    real = trained_model.load_model

    def forgetful(run: Path) -> trained_model.Model:
        model = real(run)
        if run.name == "bytes":
            decode = model.tokenizer.decode
            monkeypatch.setattr(model.tokenizer, "decode", lambda ids: decode(ids).upper())
        return model

    monkeypatch.setattr(trained_model, "load_model", forgetful)
    matrix = cross_evaluation.evaluate_runs(sides(folder, "plain", "bytes"), ignore_message)
    assert matrix.columns[0].bpb["B"] is None
    assert matrix.columns[0].bpb["A"] is not None
    assert "B: its tokens do not decode to the text of A, B." in matrix.remarks


def test_the_map_shows_every_number_and_is_darkest_where_it_is_worst(
    matrix: cross_evaluation.CrossEvaluation,
) -> None:
    axes = cross_evaluation.draw_matrix(matrix, figures.PRINT_PALETTE).axes[0]
    written = [text.get_text() for text in axes.texts]
    assert sorted(written) == sorted(
        value for letter, values in matrix.rows if letter in "ABCD" for value in values
    )
    cells = {
        (round(patch.get_x() + 0.5), round(patch.get_y() + 0.5)): patch.get_alpha()
        for patch in axes.patches
    }
    assert len(cells) == 8
    for x, column in enumerate(matrix.columns):
        by_shade = sorted(column.bpb, key=lambda letter: cells[x, "ABCD".index(letter)])
        assert by_shade == sorted(column.bpb, key=lambda letter: column.bpb[letter] or 0)


def test_the_command_shows_the_matrix(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(folder / "plain"), str(folder / "greek"), "--cross", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "bits per byte  text of A  text of B" in captured.err
    facts = json.loads(captured.out)["cross"]
    assert f"{facts['bpb']['B'][1]:.3f}" in captured.err
    assert facts["bpb"]["A"][1] is None
    assert facts["texts"][0]["of"] == ["A"]
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "Each run on each text" in page
    assert (tmp_path / "out" / "figures" / "cross.png").is_file()


def test_a_text_with_special_tokens_is_said_to_be_read_without_them(
    folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "documents.txt"
    text.write_text((folder / "plain.txt").read_text(encoding="utf-8").replace(".\n", ".<e>"))
    train(text, tmp_path / "documents", special_tokens=("<e>",), **FEW)
    compared = comparison.label_runs([Run(folder / "plain"), Run(tmp_path / "documents")])
    evaluation = cross_evaluation.evaluate_runs(compared, ignore_message)
    said = [remark for remark in evaluation.remarks if "without its special tokens (<e>)" in remark]
    assert len(said) == 1
    assert said[0].startswith("The text of B ")
    assert "<e>" not in evaluation.columns[1].text
