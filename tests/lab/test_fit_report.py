"""`glasslm scale --fit` and `--plan`: anybody's table in, a law with its doubts out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from glasslm import cli
from glasslm.lab.scaling import fit_figures
from glasslm.lab.scaling.analysis import analyse_runs
from glasslm.lab.scaling.law import Law
from glasslm.lab.scaling.table import read_runs
from glasslm.report.figures import PRINT_PALETTE

TRUE = Law(alpha=0.35, beta=0.3, A=40.0, B=60.0, E=1.2)
SIZES, TOKENS = (1e5, 3e5, 1e6, 3e6, 1e7), (1e6, 4e6, 1.6e7, 6.4e7)


def table(path: Path, noise: float = 0.0, columns: str = "N,D,loss", seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    rows = []
    for N in SIZES:
        for D in TOKENS:
            values = {
                "N": N,
                "D": D,
                "C": 6 * N * D,
                "loss": TRUE.loss(N, D) * math.exp(rng.normal(0, noise)),
            }
            values |= {"parameters": N, "flops": values["C"], "val_loss": values["loss"]}
            rows.append(",".join(f"{values[name]:.12g}" for name in columns.split(",")))
    path.write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return path


def test_an_exact_law_is_recovered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path / "runs.csv", columns="parameters,flops,val_loss")
    assert cli.main(["scale", "--fit", str(path), "--json"]) == 0
    fit = json.loads(capsys.readouterr().out)
    for name in ("alpha", "beta", "A", "B", "E"):
        assert fit[name]["value"] == pytest.approx(getattr(TRUE, name), rel=1e-4)
        assert fit[name]["ci_low"] <= fit[name]["value"] <= fit[name]["ci_high"]
    assert fit["backtest_error"] < 1e-6
    assert (fit["n"], fit["delta"]) == (20, 1e-3)
    for name in ("fit.json", "scaling_curve.png", "isoflop.png", "report.html", "report.md"):
        assert (tmp_path / "scaling-runs-csv" / name).stat().st_size > 100
    assert (
        json.loads((tmp_path / "scaling-runs-csv" / "fit.json").read_text(encoding="utf-8"))[
            "alpha"
        ]
        == fit["alpha"]
    )


@pytest.mark.usefixtures("no_figures")
def test_the_report_and_the_plan_follow_from_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "runs.csv", noise=0.004)
    assert (
        cli.main(["scale", "--fit", str(path), "--plan", "1e15", "--out", str(tmp_path / "out")])
        == 0
    )
    output = capsys.readouterr().out
    assert "Backtest: from the runs up to" in output
    assert "20 tokens per parameter" in output
    assert "by the fit" in output
    assert "Extrapolation" not in output
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Sensitivity of the fit" in page
    assert "without N = 1e+05" in page
    assert (
        cli.main(["scale", "--fit", str(path), "--plan", "1e18", "--out", str(tmp_path / "out")])
        == 0
    )
    assert "Extrapolation: 1e+18 FLOPs are" in capsys.readouterr().out


def test_a_plan_alone_goes_by_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", "--plan", "1.2e15", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["rule"]["D"] == pytest.approx(20 * plan["rule"]["N"])
    assert 6 * plan["rule"]["N"] * plan["rule"]["D"] == pytest.approx(1.2e15)
    assert "fit" not in plan


def test_a_table_of_too_few_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss\n1e6,1e6,2\n", encoding="utf-8")
    assert cli.main(["scale", "--fit", str(path)]) == 2
    assert "too few" in capsys.readouterr().err
    assert cli.main(["scale"]) == 2
    assert "--plan FLOPS" in capsys.readouterr().err


def test_many_sizes_have_a_colour_bar_and_no_legend_over_the_curves(tmp_path: Path) -> None:
    sizes = np.geomspace(1e5, 1e7, fit_figures.MAX_LEGEND_SIZES + 1)
    rows = [f"{N:.0f},{D:.0f},{TRUE.loss(N, D):.6g}" for N in sizes for D in TOKENS]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(["N,D,loss", *rows]), encoding="utf-8")
    many = analyse_runs(read_runs(path).runs)
    few = dataclasses.replace(many, runs=many.runs[: -len(TOKENS)])
    for analysis, axes_count, n_names in ((many, 2, 0), (few, 1, len(sizes) - 1)):
        figure = fit_figures.draw_scaling_curve(analysis, PRINT_PALETTE)
        assert len(figure.axes) == axes_count
        legend = figure.axes[0].get_legend()
        names = [text.get_text() for text in legend.get_texts()] if legend else []
        assert len([name for name in names if name.startswith("N = ")]) == n_names
