"""A comparison lists only what differs, and warns where numbers cannot be compared."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from glasslm import cli
from glasslm.errors import InputError
from glasslm.lab.diagnosis.curve_comparison import compare_curves
from glasslm.lab.diagnosis.curve_files import read_curve
from glasslm.lab.verification import comparison
from glasslm.lab.verification.compared_run import ComparedRun, with_total_time
from glasslm.report import figures
from glasslm.runs.metrics import elapsed_s
from glasslm.runs.run_folder import Run
from small_runs import train, write_text

FEW: dict[str, Any] = {"max_steps": 10, "sample_interval": 0, "checkpoint_interval": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one text, of which each changes one thing, and one of another text."""
    path = tmp_path_factory.mktemp("compared")
    text, other = write_text(path / "text.txt"), write_text(path / "other.txt", sentences=170)
    train(text, path / "plain", **FEW)
    train(text, path / "seed", seed=7, **FEW)
    train(text, path / "rate", lr=1e-3, **FEW)
    train(text, path / "bytes", tokenizer="byte", **FEW)
    train(other, path / "text", **FEW)
    return path


def compared(folder: Path, *names: str) -> list[ComparedRun]:
    return comparison.label_runs([Run(folder / name) for name in names])


def test_only_what_differs_is_listed(folder: Path) -> None:
    assert comparison.differences(compared(folder, "plain", "plain")) == []
    assert comparison.differences(compared(folder, "plain", "rate")) == [
        ("optimizer.lr", ["0.01", "0.001"])
    ]
    three = dict(comparison.differences(compared(folder, "plain", "seed", "rate")))
    assert set(three) == {"optimizer.lr", "train.seed"}
    assert three["optimizer.lr"] == ["0.01", "0.01", "0.001"]
    assert three["train.seed"][1] == "7"
    tokens = {name for name, _ in comparison.differences(compared(folder, "plain", "bytes"))}
    assert {"data.tokenizer", "tokenizer", "parameters: total", "FLOPs per token"} <= tokens
    assert "text" not in tokens  # it is the same text
    assert {"text", "data.text_file"} <= {
        name for name, _ in comparison.differences(compared(folder, "plain", "text"))
    }


def test_circumstances_are_compared_like_settings(folder: Path) -> None:
    first, second = compared(folder, "plain", "plain")
    changed = json.loads(json.dumps(second.run.record)) | {"engine": "torch"}
    changed["versions"]["numpy"] = "0.0"
    second.run.__dict__["record"] = changed
    assert {name for name, _ in comparison.differences([first, second])} == {
        "engine",
        "versions: numpy",
    }


def test_results_are_those_of_the_log(folder: Path) -> None:
    side = compared(folder, "plain", "rate")[0]
    lines = list(Run(folder / "plain").metrics())
    evals = [line for line in lines if line["kind"] == "eval"]
    best = min(evals, key=lambda line: line["loss"])
    assert side.results["best validation loss"] == best["loss"]
    assert side.results["best bits per byte"] == best["bpb"]
    assert side.results["at step"] == best["step"]
    assert side.results["last validation loss"] == evals[-1]["loss"]
    assert (side.results["steps"], side.results["tokens"]) == (10, 10 * 8 * 32)
    assert side.results["FLOPs"] == 10 * 8 * 32 * side.run.record["flops_per_token"]
    assert side.results["status"] == "finished"


def test_the_clock_goes_on_over_a_resume() -> None:
    def line(kind: str, elapsed: float | None = None) -> dict[str, Any]:
        return {"kind": kind, "step": 1} | (
            {} if elapsed is None else {"timing": {"elapsed_s": elapsed}}
        )

    lines = [
        line("step", 3),
        line("eval", 5),
        line("resume"),
        line("step", 1),
        line("step", 4),
        line("end"),
    ]
    assert elapsed_s(lines) == 9
    timed = [line for line in with_total_time(lines) if "timing" in line]
    assert [line["timing"]["elapsed_s"] for line in timed] == [3, 5, 6, 9]


def test_other_tokens_are_compared_by_bits_per_byte(folder: Path) -> None:
    sides = compared(folder, "plain", "bytes")
    assert comparison.needs_bits_per_byte(sides)
    text = " ".join(comparison.remarks(sides))
    assert "cannot be compared" in text
    assert "lowest best bits per byte" in text
    assert "validation texts differ" not in text
    values = [side.results["best bits per byte"] for side in sides]
    assert f"{abs(values[0] - values[1]):.4f} below" in text
    _, bits = sides[1].curve(sides[1].steps, "step", in_bits_per_byte=True)
    nats = [line["loss"] for line in sides[1].steps]
    np.testing.assert_allclose(bits, np.array(nats) / math.log(2))  # a byte a token


def test_other_text_and_one_seed_are_said(folder: Path) -> None:
    assert "validation texts differ" in " ".join(
        comparison.remarks(compared(folder, "plain", "text"))
    )
    plain = " ".join(comparison.remarks(compared(folder, "plain", "rate")))
    assert "validation texts differ" not in plain
    assert "no proof" in plain
    seeds = " ".join(comparison.remarks(compared(folder, "plain", "seed")))
    assert "the effect of the seed" in seeds
    assert "no proof" not in seeds
    assert "the same best validation loss" in " ".join(
        comparison.remarks(compared(folder, "plain", "plain"))
    )


def doctored(
    folder: Path,
    path: Path,
    seed: int,
    loss: float | None,
    recorded: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Path:
    """A copy of a run with another seed and loss; None: it diverged."""
    copy_run(folder / "plain", path)
    record = json.loads((path / "run.json").read_text(encoding="utf-8")) | dict(recorded)
    record["config"]["train"]["seed"] = record["seed"] = seed
    record["config"]["model"].update(more)
    (path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line["loss"] = loss
        if line["kind"] == "end":
            line |= {"best_loss": loss, "status": "finished" if loss is not None else "diverged"}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    return path


def copy_run(source: Path, path: Path) -> None:
    path.mkdir()
    for name in ("run.json", "tokenizer.json", "metrics.jsonl"):
        (path / name).write_bytes((source / name).read_bytes())


BASE = [2.00, 2.05, 1.96]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("others", "seeds", "words", "how"),
    [
        ([1.90, 1.951, 1.859], (0, 1, 2), "better by 0.1 nats", "paired by 3 seeds"),
        ([2.01, 2.03, 1.97], (0, 1, 2), "not distinguishable", "paired by 3 seeds"),
        ([1.50, 1.55, 1.46], (5, 6, 7), "better by 0.5 nats", "seeds differ"),
        ([1.99, 2.03, 1.97], (0, 1, 7), "not distinguishable", "seeds differ"),
        ([2.0, None, 1.9], (0, 1, 2), "not tested: the baseline diverged in 1 of 3", "paired"),
    ],
)
def test_runs_that_differ_in_the_seed_alone_are_judged_as_groups(
    others: list[float | None],
    seeds: tuple[int, ...],
    words: str,
    how: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    paths = [doctored(folder, tmp_path / f"a{i}", i, loss) for i, loss in enumerate(BASE)]
    paths += [
        doctored(folder, tmp_path / f"b{seed}", seed, loss, dropout=0.1)
        for seed, loss in zip(seeds, others)
    ]
    sides = comparison.label_runs([Run(path) for path in paths])
    first, second = comparison.groups_of(sides)
    assert (first.name, second.name) == ("A, B, C", "D, E, F")
    assert first.mean == pytest.approx(sum(BASE) / 3)
    assert first.interval is not None
    assert first.interval[0] < sum(BASE) / 3 < first.interval[1]
    text = " ".join(comparison.remarks(sides))
    assert words in text
    assert how in text
    assert "lowest" not in text
    page = comparison.write(sides, tmp_path / "page").with_suffix(".md").read_text("utf-8")
    assert "| A, B, C | 3 |" in page


def test_a_tie_of_two_copies_hides_no_verdict_on_groups(folder: Path, tmp_path: Path) -> None:
    paths = [doctored(folder, tmp_path / f"a{i}", i, loss) for i, loss in enumerate(BASE)]
    paths += [doctored(folder, tmp_path / "copy", 2, BASE[2])]
    paths += [doctored(folder, tmp_path / f"b{i}", i, BASE[i] + 0.1, dropout=0.1) for i in range(3)]
    text = " ".join(comparison.remarks(comparison.label_runs([Run(path) for path in paths])))
    assert "A, B, C against E, F, G:" in text
    assert "have the same" not in text
    assert "as copies: D;" in text


def test_a_second_run_of_a_seed_is_no_further_evidence(folder: Path, tmp_path: Path) -> None:
    losses = [2.0, 3.0, 2.5, 3.5]
    paths = [doctored(folder, tmp_path / f"a{i}", i % 2, loss) for i, loss in enumerate(losses)]
    sides = comparison.label_runs([Run(path) for path in paths])
    (group,) = comparison.groups_of(sides)
    assert group.losses == {0: 2.0, 1: 3.0}
    text = " ".join(comparison.remarks(sides))
    assert "Left out of the groups as copies: C, D;" in text
    assert "A has the lowest best validation loss, 1.0000 below B: only the seed differs" in text


@pytest.mark.parametrize(
    "recorded",
    [
        {"precision": "fp16"},
        {"engine": "torch"},
        {"device": "cuda"},
        {"compiled": True},
        {"git": {"commit": "1", "dirty": False}},
        {"glasslm": "0.0"},
    ],
)
def test_runs_of_other_arithmetic_or_code_are_another_group(
    recorded: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    paths = [
        doctored(folder, tmp_path / f"{i}", seed, loss, recorded if i >= 2 else {})
        for i, (seed, loss) in enumerate([(1, 1.50), (2, 1.52), (1, 1.40), (2, 1.41)])
    ]
    sides = comparison.label_runs([Run(path) for path in paths])
    assert [group.name for group in comparison.groups_of(sides)] == ["A, B", "C, D"]
    text = " ".join(comparison.remarks(sides))
    assert "C, D against A, B:" in text
    assert "only the seed differs" not in text
    assert "copies" not in text


def test_runs_on_other_texts_are_not_ranked(folder: Path) -> None:
    text = " ".join(comparison.remarks(compared(folder, "plain", "text")))
    assert "No run is called better" in text
    assert "lowest" not in text


def with_config(folder: Path, path: Path, part: str, **fields: Any) -> Path:
    """A copy of a run with other fields in one part of its config."""
    copy_run(folder / "plain", path)
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    record["config"][part] = record["config"].get(part, {}) | fields
    (path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return path


def test_losses_of_different_units_are_not_ranked(folder: Path, tmp_path: Path) -> None:
    """Nats per token, nats per pair, 1 - reward and nats per token of answers are no rivals."""
    pairs = {"preferences": "pairs.jsonl", "preferences_sha256": "1"}
    paths = [
        folder / "seed",
        with_config(folder, tmp_path / "pairs", "preference", **pairs),
        with_config(folder, tmp_path / "reward", "preference", reward="addition"),
        with_config(folder, tmp_path / "chat", "data", chat="chat.jsonl", text_file=[]),
    ]
    sides = comparison.label_runs([Run(path) for path in paths])
    units = ["nats per token", "nats per pair", "1 - reward", "nats per token of an answer"]
    assert dict(comparison.results(sides))["losses in"] == units
    curves = [read_curve(path / "metrics.jsonl") for path in paths]
    assert [curve.train_unit for curve in curves] == units
    assert [curve.validation_unit for curve in curves] == units
    assert [curve.vocab_size is None for curve in curves] == [False, True, True, False]
    assert "losses taken as nats per pair;" in curves[1].messages[0]
    with pytest.raises(InputError, match="the losses have different units"):
        compare_curves(curves[:1], curves[1:2])
    for other in sides[1:]:
        text = " ".join(comparison.remarks([sides[0], other]))
        assert f"A in nats per token, {other.letter} in {other.loss_unit}" in text
        assert "No winner is named" in text
        assert "lowest" not in text
    other_pairs = with_config(
        folder, tmp_path / "other", "preference", **pairs | {"preferences_sha256": "2"}
    )
    text = " ".join(comparison.remarks(comparison.label_runs([Run(paths[1]), Run(other_pairs)])))
    assert "different pairs or rewards" in text
    assert "No winner is named" in text


def test_a_lossy_tokenizer_has_no_winner_in_bits_per_byte(folder: Path, tmp_path: Path) -> None:
    for name in ("plain", "bytes"):
        copy_run(folder / name, tmp_path / name)
    path = tmp_path / "bytes" / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["tokenizer"] |= {"lossless": False, "lossy_reason": "it folds letters"}
    path.write_text(json.dumps(record), encoding="utf-8")
    sides = comparison.label_runs([Run(tmp_path / name) for name in ("plain", "bytes")])
    text = " ".join(comparison.remarks(sides))
    assert "B: the tokenizer loses text (it folds letters): there are no bits per byte." in text
    assert "No winner is named" in text
    assert "lowest" not in text


@pytest.mark.usefixtures("no_figures")
def test_more_runs_than_letters(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = compared(folder, *(["plain", "rate"] * 15))
    assert [side.letter for side in sides][24:] == ["Y", "Z", "AA", "AB", "AC", "AD"]
    assert [comparison.run_label(index) for index in (701, 702)] == ["ZZ", "AAA"]
    names = [str(folder / name) for name in ("plain", "rate") * 15]
    assert cli.main(["compare", *names, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out[30:])) < 250  # a row for each run
    table = out[out.index("difference  optimizer.lr") :]
    assert [line.split() for line in table[27:31]] == [
        ["AA", "0.01"], ["AB", "0.001"], ["AC", "0.01"], ["AD", "0.001"]
    ]  # fmt: skip


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_cannot_be_read_is_named_and_left_out(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, rate = str(folder / "plain"), str(folder / "rate")
    for name, text in (("torn", b"{"), ("list", b"[]"), ("empty", b"")):
        copy_run(folder / "plain", tmp_path / name)
        (tmp_path / name / "run.json").write_bytes(text)
        assert cli.main(["compare", plain, name, rate, "--out", f"out-{name}"]) == 0
        captured = capsys.readouterr()
        assert f"warning: {name} is left out: " in captured.err
        assert "optimizer.lr  0.01  0.001" in captured.out
        assert cli.main(["compare", plain, name]) == 4
        assert "1 of 2 runs can be read" in capsys.readouterr().err
    copy_run(folder / "plain", tmp_path / "log")
    (tmp_path / "log" / "metrics.jsonl").write_bytes(b'{"kind": 1}\nnonsense\n{}\n')
    assert cli.main(["compare", plain, "log", rate, "missing", "--json", "--out", "out"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["left_out"]) == {"log", "missing"}
    assert [run["letter"] for run in facts["runs"]] == ["A", "B"]
    assert cli.main(["compare", plain, "missing"]) == 2


@pytest.mark.usefixtures("no_figures")
def test_a_run_under_way_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cut"
    copy.mkdir()
    for name in ("run.json", "tokenizer.json"):
        (copy / name).write_bytes((folder / "plain" / name).read_bytes())
    text = " ".join(
        comparison.remarks(comparison.label_runs([Run(folder / "plain"), Run(copy)]))
    )  # it has logged nothing
    assert "B is not finished" in text
    assert "nothing to compare" in text
    lines = (folder / "plain" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join(lines[:6]))
    sides = comparison.label_runs([Run(folder / "plain"), Run(copy)])
    assert sides[1].results["status"] == "not ended"
    assert comparison.write(sides, tmp_path / "out").is_file()


def test_the_curves_lie_over_steps_tokens_and_time(folder: Path) -> None:
    sides = compared(folder, "plain", "rate", "seed", "plain", "rate")
    drawn = comparison.draw_losses(sides, figures.PRINT_PALETTE)
    assert len(drawn.axes) == 3
    for axes in drawn.axes:
        bold = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
        assert [line.get_label() for line in bold] == ["A", "B", "C", "D", "E"]
        styles = {(line.get_color(), line.get_linestyle()) for line in bold}
        assert len(styles) == 5
        assert min(line.get_linewidth() for line in bold) > max(
            line.get_linewidth() for line in axes.lines if line not in bold
        )
    over_tokens = drawn.axes[1].lines[0]
    assert np.asarray(over_tokens.get_xdata()).tolist() == [
        line["tokens"] for line in sides[0].steps
    ]


def test_the_command_prints_a_table_and_writes_a_page(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", str(folder / "plain"), str(folder / "rate")]) == 0
    out = capsys.readouterr().out
    assert "optimizer.lr  0.01  0.001" in out
    page = tmp_path / "comparisons" / "plain-rate" / "comparison.html"
    assert "optimizer.lr" in page.read_text(encoding="utf-8")
    assert page.with_suffix(".md").is_file()
    assert (page.parent / "figures" / "comparison.png").is_file()
    assert (
        cli.main(
            ["compare", str(folder / "plain"), str(folder / "rate"), "--out", "there", "--json"]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["differences"] == {"optimizer.lr": ["0.01", "0.001"]}
    assert [run["letter"] for run in facts["runs"]] == ["A", "B"]
    assert "cross" not in facts
    assert (tmp_path / "there" / "comparison.html").is_file()


def test_one_run_is_too_few(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(folder / "plain")]) == 2
    assert "two or more" in capsys.readouterr().err
    with pytest.raises(InputError):
        compared(folder, "plain")
