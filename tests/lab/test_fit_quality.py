"""The verdict on a fit: what is bad is called bad, and what is good is not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from law_runs import SMALL, runs

from glasslm import cli
from glasslm.errors import InputError
from glasslm.lab.scaling import fit_report
from glasslm.lab.scaling.analysis import Analysis, analyse_runs
from glasslm.lab.scaling.fixed_law import compare_law, compare_tie, parse_law
from glasslm.lab.scaling.law import Observation, fit, merge_sizes

CELLS = [(N, D) for N in np.geomspace(1e5, 1e7, 6) for D in np.geomspace(1e6, 1e8, 5)]


def analyse(observations: list[Observation]) -> Analysis:
    return analyse_runs(observations)


@pytest.mark.parametrize("seed", range(2))
def test_noise_is_worthless(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = [Observation(N, D, 3 * math.exp(0.05 * float(rng.standard_normal()))) for N, D in CELLS]
    quality = analyse(noise).quality
    assert quality.verdict == "worthless"
    assert quality.sentence.startswith("The fit is worthless: the law explains")


@pytest.mark.parametrize("seed", range(2))
def test_a_law_with_little_noise_is_good(seed: int) -> None:
    quality = analyse(runs(SMALL, CELLS, noise=0.002, seed=seed)).quality
    assert quality.verdict in ("good", "usable"), quality.sentence
    assert quality.r2 > 0.99
    assert quality.residual_percent == pytest.approx(0.2, rel=0.4)


def test_each_fault_lowers_the_verdict() -> None:
    good = runs(SMALL, CELLS, noise=0.002)
    largest = max(run.C for run in good)
    bent = [replace(run, loss=run.loss * 1.05) if largest / 3 < run.C else run for run in good]
    outlier = [replace(good[7], loss=good[7].loss * 1.2), *good[:7], *good[8:]]
    loud = runs(SMALL, CELLS, noise=0.08)
    for changed, words in (
        (bent, ("near the largest compute", "predicted with a mean", "far from the law")),
        (loud, ("left over", "residuals above")),
    ):
        quality = analyse(changed).quality
        assert quality.verdict in ("usable", "doubtful", "worthless")
        assert any(part in quality.sentence for part in words), quality.sentence
    quality = analyse(outlier).quality
    assert [o.run.loss for o in quality.outliers] == [outlier[0].loss]
    assert "1 run far from the law: N = " in quality.sentence


def test_lack_of_fit_is_told_from_noise() -> None:
    """A ripple in N is no noise: two runs of a cell agree far better than with the law."""
    twice = [run for seed in (0, 1) for run in runs(SMALL, CELLS, noise=0.0005, seed=seed)]
    rippled = [
        replace(run, loss=run.loss * (1 + 0.01 * math.sin(2 * math.log(run.N)))) for run in twice
    ]
    p = [analyse(table).quality.lack_of_fit_p for table in (twice, rippled)]
    assert p[0] is not None
    assert p[1] is not None
    assert p[0] > 0.01 > 1e-6 > p[1]


def test_sizes_read_off_a_plot_are_one_size() -> None:
    observations = runs(SMALL, CELLS)
    inexact = [replace(run, N=run.N * (1 + 1e-3 * (i % 3))) for i, run in enumerate(observations)]
    merged, sentence = merge_sizes(inexact)
    assert len({run.N for run in merged}) == 6
    assert "18 sizes are taken as 6" in sentence
    assert merge_sizes(observations) == (observations, "")


def test_one_exponent_for_both() -> None:
    law = replace(SMALL, alpha=0.3, beta=0.3)
    assert fit(runs(law, CELLS), equal_exponents=True).alpha == pytest.approx(0.3, rel=1e-4)
    tied = fit(runs(SMALL, CELLS, noise=0.002), equal_exponents=True)
    assert tied.alpha == tied.beta
    assert tied.objective >= fit(runs(SMALL, CELLS, noise=0.002)).objective
    assert tied.method.endswith("; alpha and beta are equal")
    C, M = 1e16, 30.0  # the form in compute and tokens per parameter is the same law
    a, b = tied.A * 6**tied.eta, tied.B * 6**tied.eta
    N = math.sqrt(C / (6 * M))
    form = tied.E + (a * M**tied.eta + b * M**-tied.eta) * C**-tied.eta
    assert form == pytest.approx(tied.loss(N, M * N))


def test_equal_exponents_are_accepted_where_they_hold() -> None:
    equal, unequal = replace(SMALL, alpha=0.3, beta=0.3), replace(SMALL, alpha=0.5, beta=0.25)
    tests = [compare_tie(runs(equal, CELLS, noise=0.003, seed=seed)) for seed in range(20)]
    assert sum(test.accepted for test in tests) >= 16
    rejected = compare_tie(runs(unequal, CELLS, noise=0.003))
    assert not rejected.accepted
    assert rejected.sentence.startswith("The runs reject alpha = beta (F test against two")


def test_a_known_law_is_accepted_and_a_wrong_one_rejected() -> None:
    right = ",".join(str(getattr(SMALL, name)) for name in ("A", "B", "E", "alpha", "beta"))
    accepted = 0
    for seed in range(20):
        observations = runs(SMALL, CELLS, noise=0.005, seed=seed)
        accepted += compare_law(parse_law(right), observations).accepted
        wrong = compare_law(replace(SMALL, alpha=SMALL.alpha * 1.1), observations)
        assert not wrong.accepted
        assert "reject" in wrong.sentence
    assert accepted >= 16  # of 20 at 5%: fewer has a probability of 3e-4
    for text in ("1,2,3", "a,b,c,d,e", "1,2,3,-4,5", "nan,1,1,1,1"):
        with pytest.raises(InputError, match="--law"):
            parse_law(text)


def test_the_command_says_the_verdict_first_and_exits_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []  # the pages have a test of their own
    monkeypatch.setattr(
        fit_report, "write", lambda folder, *_: folders.append(folder.name) or folder
    )

    def write(name: str, observations: list[Observation]) -> str:
        lines = [f"{run.N:.6g},{run.D:.6g},{run.loss:.6g}" for run in observations]
        (tmp_path / name).write_text("\n".join(["N,D,loss", *lines]), encoding="utf-8")
        return str(tmp_path / name)

    good = write("good.csv", runs(SMALL, CELLS, noise=0.001))
    assert cli.main(["scale", "--fit", good, "--predict", "1M,20M", "--delta", "inf"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("The fit is good: ")
    assert "Fitted by least squares on the log loss, summed over 30 runs" in output
    assert "N = 1e+06, D = 2e+07: a loss of " in output
    rng = np.random.default_rng(0)
    noise = [Observation(N, D, 3 + 0.1 * float(rng.standard_normal())) for N, D in CELLS]
    argv = ["scale", "--fit", write("noise.csv", noise), "--json", "--tie", "eta"]
    assert cli.main(argv) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"] == "worthless"
    assert facts["r2"] < 0.5
    assert "alpha and beta are equal" in facts["method"]
    assert facts["eta"]["value"] == pytest.approx(facts["alpha"]["value"] / 2)
    assert facts["tie"].keys() == {"accepted", "p"}
    assert facts["columns"] == {"N": "N", "D": "D", "loss": "loss"}
    assert facts["measured"] == "validation loss, nats per token"
    assert folders == ["scaling-good-csv", "scaling-noise-csv"]
    for words in (["--predict", "1,x"], ["--predict", "5"], ["--law", "1,2"]):
        assert cli.main(["scale", "--fit", good, *words]) == 2
    assert cli.main(["scale", "--plan", "1e15", "--law", "1,2,3,4,5"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "1m", "--plan", "0"], "--plan is 0.0: expected FLOPs above 0"),
        (["--budget", "1m", "--delta", "inf"], "--delta is for --fit TABLE: give both"),
        (["--fit", "runs.csv", "--workers=2"], "--fit does not read --workers"),
        (["--fit", "runs.csv", "--no-bias"], "--fit does not read --no-bias"),
        (["--plan", "1e15", "--out", "study"], "--plan does not read --out"),
    ],
)
def test_flags_that_would_be_refused_or_ignored_later_are_refused_first(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["scale", *words]) == 2
    assert message in capsys.readouterr().err
