"""Losses by seed of any program get the statistics of an ablation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from glasslm import cli
from glasslm.errors import InputError
from glasslm.lab.studies.losses_table import judge_table

GELU = [2.001, 2.003, 1.998, 2.0]
SWIGLU = [1.95, 1.953, 1.947, 1.951]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def long_table(seeds: tuple[int, int, int, int] = (0, 1, 2, 3)) -> str:
    rows = ["config,seed,final loss"]
    rows += [f"gelu,{seed},{loss}" for seed, loss in enumerate(GELU)]
    rows += [f"swiglu,{seed},{loss}" for seed, loss in zip(seeds, SWIGLU)]
    return "\n".join(rows)


def wide_table() -> str:
    rows = [f"{i};{a};{b}".replace(".", ",") for i, (a, b) in enumerate(zip(GELU, SWIGLU))]
    return "\n".join(["seed;gelu;swiglu", *rows])


@pytest.mark.parametrize(
    ("text", "swiglu"),
    [(long_table(), SWIGLU), (long_table((3, 2, 1, 0)), SWIGLU[::-1]), (wide_table(), SWIGLU)],
)
def test_pairs_are_judged_as_scipy_does(tmp_path: Path, text: str, swiglu: list[float]) -> None:
    study = judge_table(write(tmp_path / "losses.csv", text))
    base, other = study.variants
    assert base.name == "gelu"
    expected = stats.ttest_rel(swiglu, GELU)
    assert other.comparison is not None
    assert other.comparison.p == pytest.approx(expected.pvalue)
    assert other.verdict is not None
    assert other.verdict.words == "better by 0.0502 nats"
    assert "8 losses of 2 variants; baseline: gelu" in study.messages[0]


def test_without_common_seeds_the_test_is_welchs(tmp_path: Path) -> None:
    study = judge_table(write(tmp_path / "losses.csv", long_table((4, 5, 6, 7))))
    expected = stats.ttest_ind(SWIGLU, GELU, equal_var=False)
    comparison = study.variants[1].comparison
    assert comparison is not None
    assert comparison.p == pytest.approx(expected.pvalue)
    assert "fewer than two seeds in common: Welch's test, not pairs" in study.messages[1]


def test_a_run_that_diverged_counts_and_one_that_is_missing_does_not(tmp_path: Path) -> None:
    text = "seed,baseline,a,b\n1,2,nan,\n2,2.1,2,2.05\n3,2.2,2,2.15\n"
    study = judge_table(write(tmp_path / "losses.csv", text))
    a, b = study.variants[1:]
    assert a.verdict is not None
    assert a.verdict.kind == "diverged"
    assert "none: 1 diverged" in study.text()
    assert "2.0000" not in study.text()
    assert b.comparison is not None
    assert b.comparison.n == 2
    assert "b: 2 seeds in common with the baseline are compared, of 2 and 3" in study.messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variant,seed,loss\na,1,2\na,1,3\n", "variant a has seed 1 twice"),
        ("seed,base,new\n1,2,3\n2,2.5,3\n1,4,5\n", "line 4 .* variant base has seed 1 twice"),
        ("variant,seed,loss\na,1,2\na,2,3\n", "one variant, a: expected a baseline"),
        ("who,what\na,b\nc,d\n", "expected|no line with named"),
        ("variant,s1,s2\na,1,2\nb,1,2\na,3,4\n", "line 4 .* variant a has seed s1 twice"),
        ("step,base,wide\n10,3,2.9\n20,2,1.9\n", "of `step`.* --curve A.log --against B.log"),
        ("epoch,base,wide\n1,3,2.9\n2,2,1.9\n", "several values of `epoch`"),
        ("model,tokens,loss\na,1e6,3\na,2e6,2\nb,1e6,3\nb,2e6,2.1\n", "values of `tokens`"),
        ("seed,train_loss,val_loss\n1,2.1,3\n2,2.2,3.1\n", "losses of the same runs"),
        ("seed,base bpb,wide loss\n1,1,3\n2,1.1,3.1\n", "bits per byte and nats per token"),
        ("seed,base,perplexity filter\n1,3.1,2.9\n2,3,2.8\n", "logarithms of .* rename a column"),
        ("variant,split,loss\na,train,2\na,val,3\nb,train,2\nb,val,3\n", "keep the rows of one"),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge_table(write(tmp_path / "losses.csv", text))


def test_columns_that_are_no_losses_are_left_out_and_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "seed,a,b,steps\n1,3.2,3.1,1000\n2,3.3,3.15,1000\n")
    study = judge_table(path)
    assert [variant.name for variant in study.variants] == ["a", "b"]
    assert "without steps, no losses by their names or numbers" in study.messages[0]


def test_settings_are_no_variants(tmp_path: Path) -> None:
    text = "seed,base,8 bits,epochs,lr,layers\n1,3.2,3.1,3,0.1,8\n2,3.3,3.15,3,0.1,8\n"
    study = judge_table(write(tmp_path / "a.csv", text))
    assert [variant.name for variant in study.variants] == ["base", "8 bits"]
    assert "without epochs, lr, layers, no losses" in study.messages[0]
    assert study.variants[1].losses == [3.1, 3.15]  # weights of 8 bits, not a loss in bits


def test_equal_steps_of_all_runs_of_a_variant_are_accepted(tmp_path: Path) -> None:
    text = "variant,steps,loss\na,10,3\na,10,3.1\na,,3.2\nb,20,2\nb,20,2.1\nb,20,2.2\n"
    assert judge_table(write(tmp_path / "a.csv", text)).variants[1].losses == [2, 2.1, 2.2]


@pytest.mark.parametrize(
    ("header", "counter", "named"),
    [
        ("", "012", "the column without a name"),
        ("Unnamed: 0", "012", "Unnamed: 0"),
        ("index", "579", "index"),
        ("run", "421", "run"),
        ("Step", "888", "Step"),
        ("fold", "123", "fold"),
    ],
)
def test_a_column_that_counts_is_no_variant(
    tmp_path: Path, header: str, counter: str, named: str
) -> None:
    rows = [f"{i},{a},{b}" for i, a, b in zip(counter, GELU, SWIGLU)]
    text = "\n".join([f"{header},基,gelu", *rows])
    study = judge_table(write(tmp_path / "losses.csv", text))
    assert [variant.name for variant in study.variants] == ["基", "gelu"]
    assert f"without {named}, no losses by their names or numbers" in study.messages[0]
    assert study.variants[0].losses == GELU[:3]


def test_a_missing_loss_shifts_no_pairs(tmp_path: Path) -> None:
    text = "variant,loss\nbase,1\nbase,2\nbase,3\nnew,\nnew,2.1\nnew,3.1\n"
    study = judge_table(write(tmp_path / "losses.csv", text))
    comparison = study.variants[1].comparison
    assert comparison is not None
    assert comparison.n == 2
    assert comparison.delta == pytest.approx(0.1)


def test_a_verdict_has_the_unit_of_the_losses(tmp_path: Path) -> None:
    text = long_table().replace("final loss", "val loss (bits/byte)")
    study = judge_table(write(tmp_path / "losses.csv", text))
    assert study.variants[1].verdict is not None
    assert study.variants[1].verdict.words == "better by 0.0502 bits per byte"
    wide = wide_table().replace(";gelu;swiglu", ";gelu bpb;swiglu bpb")
    study = judge_table(write(tmp_path / "wide.csv", wide))
    assert study.variants[1].verdict is not None
    assert study.variants[1].verdict.words == "better by 0.0502 bits per byte"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "losses.csv", long_table()))
    assert cli.main(["ablate", "--fit", path, "--baseline", "swiglu", "--json"]) == 0
    variants = json.loads(capsys.readouterr().out)["variants"]
    assert [variant["kind"] for variant in variants] == ["baseline", "worse"]
    assert cli.main(["ablate", "--fit", path]) == 0
    assert "better by 0.0502 nats" in capsys.readouterr().out
    assert cli.main(["ablate", "--fit", path, "--baseline", "x"]) == 2
    assert cli.main(["ablate", "--baseline", "x"]) == 2
    capsys.readouterr()
    assert cli.main(["ablate", "--fit", path, "--out", "study", "--margin", "1"]) == 2
    assert "--fit does not read --out: leave one of them out" in capsys.readouterr().err


WAYS = {
    "seeds in names": "run,loss\n{a}-s1,4.5\n{a}-s2,4.53\n{b}-s1,4.4\n{b}-s2,4.42\n",
    "names of runs beside groups": (
        "name,group,seed,loss\nr1,{a},1,4.5\nr2,{a},2,4.53\nr3,{b},1,4.4\nr4,{b},2,4.42\n"
    ),
    "a column for each seed": "variant,seed 1,seed 2\n{a},4.5,4.53\n{b},4.4,4.42\n",
    "a column for each seed, by pandas": ",variant,s1,s2\n0,{a},4.5,4.53\n1,{b},4.4,4.42\n",
    "settings": "lr,seed,loss\n1,1,4.5\n1,2,4.53\n2,1,4.4\n2,2,4.42\n",
    "several settings": ("norm,act,seed,loss\nx,y,1,4.5\nx,y,2,4.53\nx,z,1,4.4\nx,z,2,4.42\n"),
}


@pytest.mark.parametrize("way", WAYS)
def test_variants_and_seeds_in_other_ways(tmp_path: Path, way: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(WAYS[way].format(a="base", b="new"), encoding="utf-8")
    study = judge_table(path)
    expected = {"settings": ["lr=1", "lr=2"], "several settings": ["act=y", "act=z"]}
    assert [variant.name for variant in study.variants] == expected.get(way, ["base", "new"])
    assert study.variants[1].paired
    comparison = study.variants[1].comparison
    assert comparison is not None
    assert comparison.delta == pytest.approx(-0.105)


def test_the_s_of_a_plural_is_no_seed(tmp_path: Path) -> None:
    text = "config,loss\nlayers4,4.5\nlayers4,4.6\nlayers8,4.4\nlayers8,4.3\n"
    study = judge_table(write(tmp_path / "losses.csv", text))
    assert [variant.name for variant in study.variants] == ["layers4", "layers8"]


def test_a_word_for_a_diverged_run_and_means_with_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("variant,seed,loss\na,1,4\na,2,4\nb,1,diverged\nb,2,4\n", encoding="utf-8")
    assert judge_table(path).variants[1].losses == [None, 4]
    path.write_text("seed,a,b\n1,4,diverged\n2,4.1,4\n", encoding="utf-8")
    assert judge_table(path).variants[1].losses == [None, 4]
    path.write_text(
        "variant,seed,loss,status\na,1,4,finished\na,2,4,finished\nb,1,5,running\nb,2,4,done\n"
        "b,3,9,diverged\n",
        encoding="utf-8",
    )
    study = judge_table(path)
    assert study.variants[1].losses == [4, None]
    assert "; line 4 left out: its status is 'running'" in study.messages[0]
    path.write_text("variant,loss\na,4.5 ± 0.1\nb,4.4 ± 0.1\n", encoding="utf-8")
    with pytest.raises(InputError, match="a mean with its error: expected the loss of each run"):
        judge_table(path)
