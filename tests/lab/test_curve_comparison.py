"""Curves of two kinds are compared at equal steps; only several runs of each tell a difference."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from glasslm import cli
from glasslm.errors import InputError
from glasslm.lab.diagnosis.curve_comparison import compare_curves, draw_comparison
from glasslm.lab.diagnosis.curve_figure import draw_curve
from glasslm.lab.diagnosis.curve_files import read_curve
from glasslm.report import figures


def write(
    path: Path, end: float, steps: int = 300, column: str = "val_loss", every: int = 10
) -> Path:
    lines = [f"step,tokens,{column}"]
    for step in range(every, steps + 1, every):
        lines.append(f"{step},{64 * step},{end + 4 / step:.6f}")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_difference_is_judged_by_the_spread_of_the_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ends = [2 + 0.01 * rng.standard_normal(4), 2.05 + 0.01 * rng.standard_normal(4)]
    sides = [
        [read_curve(write(tmp_path / f"{side}{i}.csv", end)) for i, end in enumerate(values)]
        for side, values in zip("ab", ends)
    ]
    comparison = compare_curves(*sides)
    assert comparison.step == 300
    assert comparison.is_distinguishable
    expected = stats.ttest_ind(comparison.ends[1], comparison.ends[0], equal_var=False)
    assert comparison.facts["p"] == pytest.approx(expected.pvalue)
    assert comparison.delta == pytest.approx(ends[1].mean() - ends[0].mean(), abs=1e-6)
    same = compare_curves(sides[0][:2], sides[0][2:])
    assert same.is_distinguishable is False
    assert "would be seen in 4 of 5 such comparisons" in same.sentences()[1]


def test_one_run_on_a_side_decides_nothing(tmp_path: Path) -> None:
    a, b = (read_curve(write(tmp_path / f"{end}.csv", end)) for end in (2.0, 3.0))
    comparison = compare_curves([a], [b])
    assert comparison.is_distinguishable is None
    assert "cannot be told: a side has one run" in comparison.sentences()[1]


def test_copies_of_a_run_show_no_noise(tmp_path: Path) -> None:
    a, b = (read_curve(write(tmp_path / f"{end}.csv", end)) for end in (2.0, 3.0))
    c, d = (
        replace(curve, train=replace(curve.train, values=np.r_[9, curve.train.values[1:]]))
        for curve in (a, b)
    )
    for sides in (([a, a], [b, b]), ([a, c], [b, a])):
        with pytest.raises(InputError, match=r"2.0.csv.* equal at every step that both have, as"):
            compare_curves(*sides)
    comparison = compare_curves([a, c], [b, d])  # with equal ends, but not copies
    assert comparison.is_distinguishable is None
    assert comparison.facts["p"] is None
    assert "cannot be told: the runs of each side are equal, as copies" in comparison.sentences()[1]


@pytest.mark.parametrize("steps", [290, 280])
def test_a_cut_copy_is_no_seed(tmp_path: Path, steps: int) -> None:
    a, b, c = (read_curve(write(tmp_path / f"{end}.csv", end)) for end in (2.0, 2.1, 2.2))
    cut = read_curve(write(tmp_path / "cut.csv", 2.0, steps=steps))
    with pytest.raises(InputError, match=r"2.0.csv and cut.csv are equal at every step that both"):
        compare_curves([a, cut], [b, c])
    few = read_curve(write(tmp_path / "few.csv", 2.0, steps=90))
    assert compare_curves([a, few], [b, c]).estimate  # 9 equal losses may be chance


def test_validation_losses_are_compared_with_their_kind(tmp_path: Path) -> None:
    """Also those of a log that has no training losses."""
    only = read_curve(write(tmp_path / "only.csv", 3.0))
    (tmp_path / "both.csv").write_text("step,loss,val_loss\n10,1,3.4\n300,1,3\n", "utf-8")
    both = read_curve(tmp_path / "both.csv")
    comparison = compare_curves([only], [both])
    assert comparison.column == "validation loss"
    assert abs(comparison.delta) < 0.1
    axes = draw_comparison(comparison, figures.PRINT_PALETTE).axes[0]
    assert [line.get_ydata()[-1] > 2.9 for line in axes.lines[:2]] == [True, True]
    assert draw_curve(only, figures.PRINT_PALETTE).axes[0].lines[0].get_label() == "validation"
    train = read_curve(write(tmp_path / "train.csv", 3.0, column="loss"))
    assert compare_curves([train], [both]).column == "training loss"
    with pytest.raises(InputError, match=r"only.csv has only a validation loss, and train.csv has"):
        compare_curves([only, both], [train])
    (tmp_path / "nan.csv").write_text("step,val_loss\n10,nan\n300,nan\n", "utf-8")
    with pytest.raises(InputError, match=r"nan.csv has no finite loss: leave it out"):
        compare_curves([only], [read_curve(tmp_path / "nan.csv")])


@pytest.mark.parametrize(("every", "error"), [((10, 250), 0), ((13, 40), 1e-5), ((13, 250), 1e-3)])
def test_how_often_a_log_evaluates_makes_no_difference(
    tmp_path: Path, every: tuple[int, int], error: float
) -> None:
    """At steps that both have, or else at those of the coarser log, or else at the last one."""
    a, b = (read_curve(write(tmp_path / f"{n}.csv", 2.0, steps=1000, every=n)) for n in every)
    assert abs(compare_curves([a], [b]).delta) <= error


def test_curves_are_compared_where_both_have_steps(tmp_path: Path) -> None:
    long = read_curve(write(tmp_path / "long.csv", 2.0, steps=900))
    short = read_curve(write(tmp_path / "short.csv", 2.0, steps=300, every=30))
    comparison = compare_curves([long], [short])
    assert comparison.step == 300
    assert abs(comparison.delta) < 0.001
    text = "step,val_loss\n1000,2\n2000,2\n"
    (tmp_path / "late.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="no steps in common: one begins at 1,000"):
        compare_curves([short], [read_curve(tmp_path / "late.csv")])


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b, c = (str(write(tmp_path / f"{name}.csv", 2.0)) for name in "abc")
    assert cli.main(["diagnose", "--curve", a, b, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["delta"], facts["distinguishable"]) == (0, None)
    assert Path(facts["page"]) == Path("diagnosis-a-csv-b-csv/comparison.html")
    argv = [
        "diagnose",
        "--curve",
        a,
        b,
        "--against",
        c,
        a,
        "--columns",
        "step=tokens",
        "--out",
        "x",
    ]
    assert cli.main(argv) == 2
    assert "b.csv are equal at every step that both have" in capsys.readouterr().err
    for name in "abc":
        write(tmp_path / f"{name}.csv", 2.0 + 0.01 * ord(name))
    argv[argv.index(c) + 1] = str(write(tmp_path / "d.csv", 3.0))
    assert cli.main(argv) == 0
    assert re.search(r"up to token 19,200, the last", capsys.readouterr().out)
    assert cli.main(["diagnose", "--curve", a, b, c]) == 2
    assert "as --curve A1 A2 --against B1 B2" in capsys.readouterr().err
    assert cli.main(["diagnose", "--against", a]) == 2
