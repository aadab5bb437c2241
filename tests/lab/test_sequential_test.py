"""The sequential test holds its error however often it is looked at, and finds what is there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from glasslm.lab.tries.sequential_test import (
    SPREAD,
    alpha_of_try,
    critical_t,
    e_value,
    look,
    pairs_needed,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
NOISES: dict[str, Draw] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "heavy tails": lambda rng, size: rng.standard_t(4, size),
    "uniform": lambda rng, size: rng.uniform(-1, 1, size),
}


def first_verdict(differences: np.ndarray, alpha: float) -> tuple[str, int]:
    """The verdict of a try that looks after each pair from the third, and the pairs it took."""
    for n in range(3, len(differences) + 1):
        found = look(differences[:n].tolist(), alpha)
        if found.e_value >= 1 / (2 * alpha):
            return ("better" if found.delta < 0 else "worse"), n
    return "not clear", len(differences)


@pytest.mark.parametrize("noise", NOISES)
def test_a_change_that_is_worth_nothing_is_rarely_accepted(noise: str) -> None:
    """Of 600 made-up changes without an effect, looked at 18 times, at most 5% are accepted."""
    rng = np.random.default_rng(0)
    table = NOISES[noise](rng, (600, 20))
    verdicts = [first_verdict(row, 0.05)[0] for row in table]
    assert verdicts.count("better") <= 0.05 * len(table)
    naive = sum(
        any(stats.ttest_1samp(row[:n], 0, alternative="less").pvalue < 0.05 for n in range(3, 21))
        for row in table[:150]
    )
    assert naive > 0.1 * 150  # the fixed t test, looked at as often, is not honest


def test_the_interval_holds_at_all_looks_together() -> None:
    rng = np.random.default_rng(1)
    missed = 0
    for row in 0.3 + rng.standard_normal((400, 20)):
        looks = [look(row[:n].tolist(), 0.05) for n in range(2, 21)]
        missed += any(not found.ci_low <= 0.3 <= found.ci_high for found in looks)
    assert missed <= 0.1 * 400


def test_the_planned_pairs_have_the_power_that_they_promise() -> None:
    rng = np.random.default_rng(2)
    for effect in (1.0, 2.0):
        n = pairs_needed(0.01, 0.01 / effect, 0.025)
        assert n is not None
        rows = -0.01 + 0.01 / effect * rng.standard_normal((300, n))
        verdicts = [first_verdict(row, 0.025) for row in rows]
        accepted = [length for verdict, length in verdicts if verdict == "better"]
        assert len(accepted) >= 0.77 * 300  # 0.8 less 1.3 standard errors
        assert np.mean(accepted) < n  # most tries end earlier
    assert pairs_needed(0.001, 1.0, 0.025) is None


def test_the_e_value_is_the_ratio_of_the_likelihoods_of_t() -> None:
    """Against numerical integration over the effect: noncentral t densities."""
    for t, n in ((2.5, 5), (-4.0, 8), (0.3, 3)):
        effects = np.linspace(-12, 12, 4001)
        densities = stats.nct.pdf(t, n - 1, effects * math.sqrt(n))
        mixture = np.trapezoid(densities * stats.norm.pdf(effects, 0, SPREAD), effects)
        assert e_value(t, n) == pytest.approx(mixture / stats.t.pdf(t, n - 1), rel=1e-4)
        critical = critical_t(n, 0.05)
        if critical < math.inf:
            assert e_value(critical, n) == pytest.approx(10)


def test_few_or_equal_differences_decide_nothing() -> None:
    for differences in ([], [0.1], [0.0] * 5, [-0.2] * 5):
        found = look(differences, 0.05)
        assert (found.e_value, found.ci_low) == (1.0, -math.inf)


def test_the_shares_of_all_tries_add_up() -> None:
    assert sum(alpha_of_try(number, 0.05) for number in range(1, 10_000)) <= 0.05
    assert alpha_of_try(1, 0.05) == 0.025
