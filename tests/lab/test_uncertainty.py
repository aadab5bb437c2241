"""Intervals, sensitivity and backtest of a fitted law, against laws that are known."""

from __future__ import annotations

import math
from dataclasses import astuple, replace

import numpy as np
import pytest
from law_runs import SMALL, runs

from glasslm.errors import InputError
from glasslm.lab.scaling.law import Law, Observation, fit
from glasslm.lab.scaling.uncertainty import Backtest, backtests, bootstrap, sensitivity

# -- intervals -------------------------------------------------------------------------------------


def coverage(studies: int, noise: float = 0.005) -> dict[str, float]:
    """The share of simulated studies in which each interval contains the truth or a new run."""
    rng = np.random.default_rng(1)
    inside = dict.fromkeys(("alpha", "beta", "A", "B", "E", "a", "expected", "run"), 0)
    big = 4e7, 8e7  # 16 times the largest compute
    for study in range(studies):
        boot = bootstrap(runs(SMALL, noise=noise, seed=study), refits=200)
        for name, interval in boot.parameters().items():
            inside[name] += getattr(SMALL, name) in interval
        inside["expected"] += SMALL.loss(*big) in boot.expected_loss(*big)
        inside["run"] += SMALL.loss(*big) * math.exp(
            noise * float(rng.standard_normal())
        ) in boot.prediction(*big)
    return {name: count / studies for name, count in inside.items()}


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    shares = coverage(100)
    assert min(shares.values()) >= 0.89, shares  # .95 less 2.7 standard errors
    assert np.mean(list(shares.values())) <= 0.99, shares


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say_in_many_noisy_studies() -> None:
    shares = coverage(400, noise=0.02)
    assert min(shares.values()) >= 0.92, shares
    assert max(shares.values()) <= 0.995, shares


def test_intervals_shrink_with_the_noise_and_hold_their_value() -> None:
    wide, narrow = (bootstrap(runs(SMALL, noise=noise)).parameters() for noise in (0.01, 0.001))
    for name in wide:
        assert wide[name].ci_low < wide[name].value < wide[name].ci_high
        ratio = (wide[name].ci_high - wide[name].ci_low) / (
            narrow[name].ci_high - narrow[name].ci_low
        )
        assert 3 < ratio < 30
    exact = bootstrap(runs(SMALL))
    assert (
        exact.interval(lambda law: law.a).ci_high - exact.interval(lambda law: law.a).ci_low < 1e-6
    )


def test_seeds_of_one_cell_are_drawn_together() -> None:
    """The same runs twice are no new evidence; drawing runs instead of cells would count them."""
    once = runs(SMALL, noise=0.01)
    first, twice = bootstrap(once), bootstrap(once + [replace(o, seed=1) for o in once])
    for name, interval in first.parameters().items():
        assert astuple(twice.parameters()[name]) == pytest.approx(astuple(interval), rel=1e-4)


def test_a_prediction_adds_the_noise_of_runs_and_doubts_more_with_distance() -> None:
    boot = bootstrap(runs(SMALL, noise=0.005))
    widths = []
    for N, D in ((1e6, 2e6), (1e7, 2e7), (1e9, 2e9)):
        law, run = boot.expected_loss(N, D), boot.prediction(N, D)
        assert run.ci_low < law.ci_low < law.value == run.value < law.ci_high < run.ci_high
        widths.append(math.log(law.ci_high / law.ci_low))
        noise = math.log(run.ci_high / run.value) ** 2 - math.log(law.ci_high / law.value) ** 2
        assert math.sqrt(noise) == pytest.approx(boot.t_quantile * boot.fit.residual_sd)
    assert widths == sorted(widths)
    assert boot.t_quantile == pytest.approx(
        2.131, abs=1e-3
    )  # the table's, for 15 degrees of degrees_of_freedom


# -- sensitivity and backtest ----------------------------------------------------------------------


def test_sensitivity_is_the_fit_without_each_part() -> None:
    observations = runs(SMALL, noise=0.01)
    table = sensitivity(observations)
    assert [row.change for row in table[:4]] == [
        "delta 0.0001",
        "delta 0.001",
        "delta 0.01",
        "least squares",
    ]
    assert len(table) == 4 + 5 + 4
    assert_same_law(table[1].law, fit(observations))
    assert table[4].change == "without N = 1e+05"
    assert_same_law(table[4].law, fit([o for o in observations if o.N > 1.1e5]))
    assert table[-1].change == "without D = 2e+07"
    assert_same_law(table[-1].law, fit([o for o in observations if o.D < 1.9e7]))


def assert_same_law(law: Law | None, expected: Law) -> None:
    """The search from the whole fit and the one from a grid end in the same minimum."""
    assert law is not None
    assert astuple(law)[:5] == pytest.approx(astuple(expected)[:5], rel=1e-4)


def test_sensitivity_keeps_equal_exponents() -> None:
    table = sensitivity(runs(SMALL, noise=0.002), equal_exponents=True)
    laws = [variation.law for variation in table if variation.law]
    assert laws
    assert all(law.alpha == law.beta for law in laws)


def test_sensitivity_says_where_too_little_is_left() -> None:
    table = sensitivity(runs(SMALL, [(N, D) for N in (1e5, 1e6, 1e7) for D in (1e6, 4e6, 2e7)]))
    assert [row.law is None for row in table] == [False] * 4 + [True] * 6
    assert "2 sizes" in table[4].reason


def held_out(observations: list[Observation]) -> Backtest:
    """The backtest of the largest compute."""
    return backtests(observations, fit(observations))[0]


def test_backtest_predicts_the_largest_from_the_others_alone() -> None:
    observations = runs(SMALL, noise=0.003)
    largest = max(observations, key=lambda o: o.C)
    tested = held_out(observations)
    assert [forecast.run for forecast in tested.forecasts] == [largest]
    assert tested.fit.n == 19
    assert tested.factor == pytest.approx(math.sqrt(10))
    assert tested.error < 0.02
    other = [replace(o, loss=o.loss * 1.2) if o is largest else o for o in observations]
    missed = held_out(other)
    assert missed.forecasts[0].predicted == tested.forecasts[0].predicted
    assert (tested.inside_count, missed.inside_count) == (1, 0)
    assert missed.forecasts[0].relative_error == pytest.approx(
        (1 + tested.forecasts[0].relative_error) / 1.2 - 1
    )
    assert missed.error == pytest.approx(-missed.forecasts[0].relative_error)


def test_backtest_of_an_exact_law_is_exact_and_of_a_small_design_refused() -> None:
    assert held_out(runs(SMALL)).error < 1e-9
    small = runs(SMALL, [(N, D) for N in (1e5, 1e6, 1e7) for D in (1e6, 4e6, 2e7)])
    whole = fit(small)
    with pytest.raises(InputError, match=r"without its largest compute, 1.2e\+15 FLOPs: 6 cells"):
        backtests(small[2:], whole)


def test_backtests_reach_as_far_as_the_table_allows() -> None:
    cells = [(N, D) for N in np.geomspace(1e5, 1e7, 7) for D in np.geomspace(1e6, 1e8, 7)]
    observations = runs(SMALL, cells, noise=0.003)
    tests = backtests(observations, fit(observations))
    assert len(tests) >= 4
    assert tests[-1].factor > 15
    assert [test.factor for test in tests] == sorted(test.factor for test in tests)
    for test in tests:
        assert test.fit.largest_C < min(forecast.run.C for forecast in test.forecasts)
        assert test.error < 0.02
        assert 0 < test.width < 0.2


def test_rounded_computes_are_one_level_of_a_backtest() -> None:
    """A level at a quarter of the largest compute, give or take its rounding, is one level."""
    observations = [
        Observation(N, D, SMALL.loss(N, D), 6 * N * D * (1 + 1e-5 * (-1) ** i))
        for C in 1e12 * 4.0 ** np.arange(6)
        for i, N in enumerate(SMALL.N_opt(C) * np.geomspace(0.3, 3, 5))
        for D in [C / (6 * N)]
    ]
    factors = [test.factor for test in backtests(observations, fit(observations))]
    assert factors == pytest.approx([4, 16, 64], rel=1e-3)
