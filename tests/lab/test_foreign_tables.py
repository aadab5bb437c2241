"""Tables of runs as papers and trackers have them, with made-up numbers; and their numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from glasslm.errors import InputError
from glasslm.lab.scaling.table import read_runs
from glasslm.lab.studies.losses_table import judge_table
from glasslm.lab.tables.numbers import parse_number

RUNS = [(7e7, 1e9, 3.6), (7e7, 4e9, 3.4), (1.6e8, 1e9, 3.3)]


def rows(header: str, form: str) -> str:
    """A table of RUNS; `form` formats N, D, the loss x, and what follows from them."""
    lines = [
        form.format(
            N=N, D=D, x=x, C=6 * N * D, m=N / 1e6, bn=N / 1e9, b=D / 1e9, ratio=D / N,
            ppl=math.exp(x), bits=x / math.log(2), days=6 * N * D / 8.64e19,
        )
        for N, D, x in RUNS
    ]  # fmt: skip
    return "\n".join([header, *lines]) + "\n"


# The content of a table, and words of its messages.
TABLES = {
    "longer names": (
        rows("No. of non-embedding params,Tokens processed,Test loss", "{N:g},{D:g},{x}"),
        "N from `No. of non-embedding params`, D from `Tokens processed`, loss from `Test loss`",
    ),
    "names of texts": (
        rows("params,tokens,c4_en-validation/CrossEntropyLoss,ppl", "{N:g},{D:g},{x},9"),
        "loss from `c4_en-validation/CrossEntropyLoss`",
    ),
    "two losses": (
        rows("params,tokens,c4_loss,pile_loss", "{N:g},{D:g},{x},2"),
        "the loss could also be `pile_loss` (--columns 'loss=pile_loss')",
    ),
    "sizes in names": (
        rows("Model,Tokens,Loss", "tiny-{m:.0f}m,{b:.0f}B,{x}"),
        "N is the size in the names of `Model`: it is rounded",
    ),
    "sizes in names before a bracket": (
        rows("model,tokens (B),val loss", "{m:.0f}M (small),{b:.0f},{x}"),
        "D from `tokens (B)` times 1e+09",
    ),
    "tokens per parameter": (
        rows("params,tokens_per_param,loss", "{N:g},{ratio:.17g},{x}"),
        "D = N times the ratio",
    ),
    "a multiplier beside the tokens": (
        rows("params,tokens,token_multiplier,loss", "{N:g},{D:g},1,{x}"),
        "D from `tokens`",
    ),
    "petaflop days": (
        rows("params,PF-days,loss", "{N:g},{days:.17g},{x}"),
        "C from `PF-days` times 8.64e+19",
    ),
    "perplexity": (
        rows("Params (M),Tokens (B),Val PPL", "{m},{b},{ppl:.17g}"),
        "loss from the logarithm of `Val PPL`; losses taken as nats per token",
    ),
    "logarithm of a perplexity": (
        rows("Params (M),Tokens (B),log_ppl", "{m},{b},{x}"),
        "loss from `log_ppl`; losses taken as nats per token",
    ),
    "binary logarithm of a perplexity": (
        rows("Params (M),Tokens (B),Log2 Perplexity", "{m},{b},{bits:.17g}"),
        "loss from `Log2 Perplexity` times 0.693147",
    ),
    "bits": (
        rows("N,D,bits_per_token", "{N:g},{D:g},{bits:.17g}"),
        "losses taken as bits per token, converted to nats per token",
    ),
    "bits of a byte": (
        rows("N,D,val loss (bits/byte)", "{N:g},{D:g},{x}"),
        "losses taken as bits per byte",
    ),
    "bits of a character": (
        rows("N,D,val loss bits/char", "{N:g},{D:g},{x}"),
        "losses taken as bits per character",
    ),
    "layers as L, and a training loss": (
        rows("N,D,L,train_loss", "{N:g},{D:g},12,{x}"),
        "loss from `train_loss`",
    ),
    "layers as L, and a loss of a text": (
        rows("N,D,L,c4 loss", "{N:g},{D:g},12,{x}"),
        "the loss could also be `L` (--columns 'loss=L')",
    ),
    "layers as L, and a perplexity": (
        rows("N,D,L,Val PPL", "{N:g},{D:g},12,{ppl:.17g}"),
        "loss from the logarithm of `Val PPL`",
    ),
    "L alone": (rows("N,D,L", "{N:g},{D:g},{x}"), "loss from `L`"),
    "seeds that are not finite": (
        rows("N,D,seed,loss", "{N:g},{D:g},nan,{x}").replace("nan", "inf", 1),
        "seed from `seed`",
    ),
    "billions as bn": (rows("Size,Tokens,Loss", "{bn}bn,{b:.0f} billion,{x}"), "3 runs"),
    "spaces between thousands": (
        rows("N;D;loss", "{m:.0f} 000 000;{b:.0f}\u202f000\u2009000\u00a0000;{x}"),
        "3 runs",
    ),
    "apostrophes between thousands": (
        rows("N,D,loss", "{m:.0f}'000'000,{b:.0f}'000'000'000,{x}"),
        "3 runs",
    ),
    "errors and marks": (rows("N,D,loss", "~{m:.0f}M†,≈{b:.0f}B,{x} ± 0.1*"), "after ± in `loss`"),
    "LaTeX": (
        "\\toprule\nParams & Tokens & Loss \\\\ \\midrule\n"
        + rows("", "${m:.0f}\\times 10^{{6}}$ & {b:.0f}B & \\textbf{{{x}}} $\\pm$ 1 \\\\"),
        "a LaTeX table",
    ),
    "printed by pandas": (
        rows("          N            D  loss", "0  {N:.1f}  {D:.1f}  {x}"),
        "a table printed by pandas",
    ),
    "a frame of reST": (
        "=====  =====  ====\n" + rows("N      D      loss\n====  =====  ===", "{N:g}  {D:g}  {x}"),
        "a table with blanks",
    ),
    "objects by name": (
        json.dumps({f"run{i}": {"params": N, "tokens": D, "loss": x}
                    for i, (N, D, x) in enumerate(RUNS)}),
        "JSON",
    ),
    "equal signs in a cell": (
        rows("model,params,tokens,loss", "d=96_l=8,{N:g},{D:g},{x}"),
        "N from `params`",
    ),
    "runs that failed": (
        rows("N,D,loss", "{N:g},{D:g},{x}") + "1e9,1e9,diverged\n1e9,4e9,OOM\n",
        "line 5: the loss is 'diverged', so the run is left out",
    ),
    "runs that failed by their status": (
        rows("N,D,loss,State", "{N:g},{D:g},{x},done") + "1e9,1e9,9,crashed\n1e9,4e9,2,running\n",
        "line 6: the status is 'running', so the run is left out",
    ),
    "other lists in JSON": (
        json.dumps({"runs": [{"params": N, "tokens": D, "loss": x} for N, D, x in RUNS],
                    "old": [{"params": 1e9, "tokens": 1e9, "loss": 9}]}),
        "JSON without old, other lists of records: N from",
    ),
    "unique data": (
        rows("params,data,unique_data,loss", "{N:g},{D:g},1e8,{x}"),
        "times over the 100,000,000 tokens of the text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_any_program(tmp_path: Path, kind: str) -> None:
    text, words = TABLES[kind]
    (tmp_path / "runs.txt").write_text(text, encoding="utf-8")
    table = read_runs(tmp_path / "runs.txt")
    expected = [pytest.approx(run) for run in RUNS]
    assert [(run.N, run.D, run.loss) for run in table.runs] == expected
    assert words in "\n".join(table.messages)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (rows("Model,D,loss", "small,{D:g},{x}"), "has the columns Model, D, loss"),
        (rows("logN,D,loss", "18,{D:g},{x}"), "has the columns logN"),
        (rows("N,D,loss", "{N:g},{D:g},inf"), "no run that can be used: line 2: the loss is not"),
        (rows("N,GPU hours,loss", "{N:g},9,{x}"), "expected N"),
        (
            json.dumps(
                {
                    "train": [{"N": 1e8, "D": 1e9, "loss": 3}],
                    "test": [{"N": 1e9, "D": 1e9, "loss": 3}],
                }
            ),
            "keep the rows of one split alone",
        ),
        ("- params: 1e8\n  tokens: 1e9\n  loss: 3.1\n", "no run that can be used"),
        (rows("N,D,loss", "{N:g},{D:g},{x}") + "mean,,3.2\n", "line 5 .*'mean' is not a number"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "runs.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_runs(tmp_path / "runs.txt")


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("0.5bn", 5e8), ("1.3 billion", 1.3e9), ("70 mn", 7e7), ("2T", 2e12), ("4.52 ± 0.01", 4.52),
        ("4.52+-0.01", 4.52), ("4.52(1)", 4.52), ("3.6*", 3.6), ("70M†", 7e7), ("3.6¹", 3.6),
        ("1.2×10²⁰", 1.2e20), ("6 × 10^-3", 6e-3), ("7,00,00,000", 7e7), ("70 000 000", 7e7),
        ("1’000.5", 1000.5), ("−4", -4), ("$3", 3), ("50%", 0.5), ("No log", None), ("–", None),
        ("1e+9", 1e9), ("1E9", 1e9), ("12", 12), ("nan", math.nan), ("-inf", -math.inf),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(cell: str, number: float | None) -> None:
    assert parse_number(cell) == pytest.approx(number, nan_ok=True)


@pytest.mark.parametrize("cell", ["12 3", "3,5", "1.2.3", "four", "4x", "1-2", "10¹"])
def test_what_is_no_number(cell: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(cell)


def test_losses_by_seed_in_other_units(tmp_path: Path) -> None:
    text = "".join(f"{v},{s},{math.exp(3 + s / 100 + (v == 'b') / 10)}\n" for v in "ab"
                   for s in range(4))  # fmt: skip
    (tmp_path / "a.csv").write_text(f"variant,seed,val_ppl\n{text}", encoding="utf-8")
    study = judge_table(tmp_path / "a.csv")
    assert study.variants[1].losses == pytest.approx([3.1, 3.11, 3.12, 3.13])
    assert "losses from the logarithm of `val_ppl` taken as nats per token" in study.messages[0]
