"""Tables of runs as people have them: what was taken is said, what cannot be is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from glasslm import cli
from glasslm.errors import InputError
from glasslm.lab.scaling.table import read_runs

RUNS = [(1e7, 2e9, 3.5), (1e7, 4e9, 3.4), (3e7, 2e9, 3.2), (3e7, 4e9, 3.1)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def rows(header: str, form: str) -> str:
    """A table of RUNS; `form` formats N, D, loss and C = 6 N D."""
    lines = [
        form.format(N=N, D=D, loss=loss, C=6 * N * D, m=N / 1e6, b=D / 1e9) for N, D, loss in RUNS
    ]
    return "\n".join([header, *lines]) + "\n"


TABLES = {
    "params": rows("n_params,train_tokens,val/loss", "{N:.0f},{D:.0f},{loss}"),
    "words": rows("Model Size\tTraining Tokens\tFinal Loss", "{m:.0f}M\t{b:.0f}B\t{loss}"),
    "units": rows("params (M),tokens_b,eval_loss", "{m:.0f},{b:.0f},{loss}"),
    "compute": rows("Model Size,Training FLOP,val/loss", "{N:.0f},{C:g},{loss}"),
    "quoted thousands": rows("N,D,loss", '"{N:,.0f}","{D:,.0f}",{loss}'),
    "blanks": rows("N   D   loss", "{N:g}   {D:g}   {loss}"),
    "markdown": rows("| N | D | loss |", "| {N:g} | {D:g} | {loss} |"),
    "comments": "# runs of May\n" + rows("N,D,loss,note", "{N:g},{D:g},{loss},good, but slow"),
    "decimal commas": rows("N;D;loss", "{N:.0f};{D:.0f};{loss}").replace(".", ","),
    "thousands points": rows("N;D;loss", "{N:,.0f};{D:,.0f};{loss}")
    .replace(".", "p")
    .replace(",", ".")
    .replace("p", ","),
    "units in names and cells": rows("params (M),tokens_b,loss", "{m:.0f}M,{b:.0f}B,{loss}"),
    "units in words": rows("params in millions,tokens in billions,loss", "{m:.0f},{b:.0f},{loss}"),
    "unit of the loss": rows("Parameters,Tokens,Loss (nats)", "{N:.0f},{D:.0f},{loss}"),
    "Markdown with a rule": rows("| N | D | loss |\n|---:|:--:|---|", "| {N:g} | {D:g} | {loss} |"),
    "powers": rows("N,D,loss", "{m:.0f}x10^6,{b:.0f}×10^9,{loss}"),
    "BOM and CRLF": "\ufeff" + rows("N,D,loss", "{N:g},{D:g},{loss}").replace("\n", "\r\n"),
    "JSON": json.dumps({"runs": [{"n_params": N, "tokens": D, "val_loss": x} for N, D, x in RUNS]}),
    "JSON lines": "".join(
        json.dumps({"config": {"params": N, "train_tokens": D}, "val": {"loss": x}}) + "\n"
        for N, D, x in RUNS
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_as_people_have_them(tmp_path: Path, kind: str) -> None:
    mapping = ["N=config/params", "D=config/train_tokens"] if kind == "JSON lines" else []
    table = read_runs(write(tmp_path / "runs.txt", TABLES[kind]), mapping)
    assert [(run.N, pytest.approx(run.D), run.loss) for run in table.runs] == RUNS
    assert "; losses taken as nats per token" in table.messages[0]
    assert table.messages[0].endswith("4 runs")


def test_what_was_taken_is_said_first(tmp_path: Path) -> None:
    text = rows("size,tokens_b,val_bpb", "{m:.0f},{b:.0f},{loss}")
    table = read_runs(write(tmp_path / "a.csv", text), ["N=size*1e6"])
    assert table.messages == [
        "CSV: N from `size` times 1e+06, D from `tokens_b` times 1e+09, loss from `val_bpb`; "
        "losses taken as bits per byte; 4 runs"
    ]
    assert table.columns == {"N": "size*1000000", "D": "tokens_b*1000000000", "loss": "val_bpb"}


def test_the_notation_of_a_factor_is_read_back_exactly(tmp_path: Path) -> None:
    text = rows("size,steps,loss", "{N:.0f},{b:.0f},{loss}")
    path = write(tmp_path / "a.csv", text)
    table = read_runs(path, ["N=size", "D=steps*1048577.5"])
    assert table.columns["D"] == "steps*1048577.5"
    again = read_runs(path, [f"{role}={column}" for role, column in table.columns.items()])
    assert again.runs == table.runs


def test_two_columns_that_could_be_N(tmp_path: Path) -> None:
    lines = ["total_params,non_embedding_params,tokens,loss"]
    for N in (1e6, 3e6, 1e7, 3e7):
        for D in (1e8, 3e8, 1e9, 3e9):
            loss = 1.7 + 400 / N**0.34 + 400 / D**0.28
            lines.append(f"{N + 3e6:.0f},{N:.0f},{D:.0f},{loss:.6f}")
    table = read_runs(write(tmp_path / "a.csv", "\n".join(lines)))
    assert "N from `total_params`" in table.messages[0]
    assert (
        "N could also be `non_embedding_params`: the exponent a of N_opt would be 0.452"
        in (table.messages[1])
    )


def test_a_row_with_a_gap_is_left_out_and_the_others_are_not(tmp_path: Path) -> None:
    text = (
        "N,D,C,loss\n1e7,2e9,,3.5\n1e7,,,3.4\n,2e9,,3.3\n3e7,2e9,,\n3e7,2e9,,nan\n3e7,,3.6e17,3\n"
    )
    table = read_runs(write(tmp_path / "a.csv", text))
    assert [(run.N, run.D) for run in table.runs] == [(1e7, 2e9), (3e7, pytest.approx(2e9))]
    said = "\n".join(table.messages)
    for words in (
        "line 3: D is missing, so the run is left out",
        "line 4: N is missing",
        "line 5: the loss is missing",
        "line 6: the loss is not finite",
    ):
        assert words in said


def test_what_should_be_known_is_said(tmp_path: Path) -> None:
    row = "1e7,2e9,1.5e17,3.5,1e8\n"
    text = f"N,D,C,loss,unique_tokens\n{row}{row}3e7,1e9,1.8e17,3,1e8\n"
    table = read_runs(write(tmp_path / "a.csv", text))
    said = "\n".join(table.messages)
    assert len(table.runs) == 2
    assert "1 line equal to an earlier one left out, the first is line 3" in said
    assert "C is 1 to 1.25 times 6 N D" in said
    assert "times over the 100,000,000 tokens of the text, up to 20.0 times" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,D,loss\n10,2e9,3\n70,2e9,3\n", r"is 70 at most, which cannot be para.*'N=N\*1e6'"),
        ("N,D,loss\n1e7,2,3\n", "is 2 at most, which cannot be tokens"),
        ("N,C,loss\n1e7,20,3\n", "is 20 at most, which cannot be FLOPs"),
        ("N,D,loss\n1e7,2e9,33\n1e7,2e9,30\n", "31.5 in the median, which cannot be nats"),
        ("N,D,loss\n1e7,2e9,three\n", "line 2 of .* column loss: 'three' is not a number"),
        ("size,loss\n1e7,3\n", "has the columns size, loss: expected N .*--columns says"),
        ("N,D,loss\n-1e7,2e9,3\n1e7,2e9,3\n", "line 2 of .* above 0"),
        ("", "is empty"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_runs(write(tmp_path / "a.csv", text))


def test_numbers_with_a_unit_of_their_own(tmp_path: Path) -> None:
    text = "model_size,flops (1e18),loss\n0.4B,2.4,3\n1.2G,7.2,2.8\n"
    runs = read_runs(write(tmp_path / "a.csv", text)).runs
    assert [run.N for run in runs] == [4e8, 1.2e9]
    assert pytest.approx(1e9) == runs[0].D
    assert math.isclose(runs[1].C, 7.2e18)


@pytest.mark.parametrize("flags", [["--predict", "1e9"], ["--law", "1,2,3"]])
def test_wrong_questions_are_refused_before_the_fit(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "runs.csv", TABLES["params"])
    assert cli.main(["scale", "--fit", str(path), *flags]) == 2
    error = capsys.readouterr().err
    assert flags[0] in error
    assert "fitting" not in error
