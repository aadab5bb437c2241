"""Statistics against published examples, SciPy's tests and simulated studies."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from glasslm.errors import InputError
from glasslm.lab import statistics
from glasslm.lab.statistics import (
    Comparison,
    adjust_by_holm,
    compare_losses,
    judge_comparison,
    judge_family,
    noncentrality,
    paired_difference,
)

stats = pytest.importorskip("scipy.stats")
integrate = pytest.importorskip("scipy.integrate")

# Hours of sleep gained with two drugs by the same ten patients (Student, Biometrika 6, 1908); R's
# dataset `sleep`.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
# Fifteen p values of a trial of thrombolysis (Benjamini and Hochberg, J. R. Statist. Soc. B 57,
# 1995, section 4.1).
TRIAL = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240]
TRIAL += [0.4262, 0.5719, 0.6528, 0.7590, 1.000]

BASE = [1.50, 1.52, 1.47, 1.55, 1.49]
NOISE = [0.004, -0.003, 0.001, -0.005, 0.002]


def shifted(by: float, noise: float = 1.0) -> list[float]:
    """Runs with the seeds of BASE."""
    return [loss + by + noise * wobble for loss, wobble in zip(BASE, NOISE)]


# -- differences -----------------------------------------------------------------------------------


def test_the_paired_test_of_student() -> None:
    """As R prints it: t.test(extra ~ group, data = sleep, paired = TRUE)."""
    estimate = paired_difference(FIRST, SECOND)
    assert estimate.value / estimate.se == pytest.approx(-4.0621, abs=5e-5)
    assert estimate.df == 9
    assert estimate.p_value() == pytest.approx(0.002833, abs=5e-7)
    assert estimate.confidence_interval() == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)


@pytest.mark.parametrize("margin", [0.5, 1.7, 2.5, 4.0])
def test_sameness_is_two_one_sided_tests(margin: float) -> None:
    """Against SciPy's one-sided tests, and the 90% interval, which must be inside the margin."""
    estimate = paired_difference(FIRST, SECOND)

    def one_sided_p(shift: float, alternative: str) -> float:
        moved = [value + shift for value in FIRST]
        return stats.ttest_rel(moved, SECOND, alternative=alternative).pvalue

    p = max(one_sided_p(margin, "greater"), one_sided_p(-margin, "less"))
    assert estimate.equivalence_p_value(margin) == pytest.approx(p, rel=1e-9)
    low, high = estimate.confidence_interval(0.1)
    assert (p <= 0.05) == (-margin < low and high < margin)


def test_runs_without_spread_are_the_limit_of_a_little() -> None:
    none, little = statistics.Estimate(0.3, 0.0, 2), statistics.Estimate(0.3, 1e-9, 2)
    for margin in (0.2, 0.4):
        expected = pytest.approx(little.equivalence_p_value(margin), abs=1e-9)
        assert none.equivalence_p_value(margin) == expected
    assert none.p_value() == pytest.approx(little.p_value(), abs=1e-9)
    assert statistics.Estimate(0.0, 0.0, 2).p_value() == 1


def test_rounding_is_no_spread() -> None:
    losses = [1.1, 2.3, 4.7]
    assert len({loss + 0.1 - loss for loss in losses}) > 1
    assert paired_difference([loss + 0.1 for loss in losses], losses).se == 0
    assert paired_difference([1.5, 1.5 + 1e-9], [0.0, 0.0]).se > 0  # a small difference remains


@pytest.mark.parametrize("values", [[], [1.5], [1.5, math.nan, 1.6], [1.5, math.inf]])
def test_a_difference_needs_two_pairs_of_numbers(values: list[float]) -> None:
    with pytest.raises(InputError):
        paired_difference(values, values)


@pytest.mark.parametrize(("n", "shift"), [(3, 3.26), (5, 1.68), (8, 1.16)])
def test_the_detectable_differences_of_few_pairs(n: int, shift: float) -> None:
    assert noncentrality(n - 1) / math.sqrt(n) == pytest.approx(shift, abs=0.005)


def test_the_example_of_power_in_r() -> None:
    """power.t.test(n = 20, delta = 1) of two samples prints power = 0.8689528."""
    shift = noncentrality(2 * 20 - 2, power=0.8689528) * math.sqrt(2 / 20)
    assert shift == pytest.approx(1, abs=1e-6)


# -- power -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1, 2, 3.7, 14, 60])
@pytest.mark.parametrize(
    ("power", "alpha"), [(0.8, 0.05), (0.8, 0.05 / 15), (0.5, 0.2), (0.99, 0.01)]
)
def test_power_by_integration(df: float, power: float, alpha: float) -> None:
    """P(Z + shift > t S), averaged over the possible sample standard deviations S."""
    shift, critical = noncentrality(df, power, alpha), stats.t.isf(alpha / 2, df)

    def power_at(probability: float) -> float:
        return stats.norm.sf(critical * math.sqrt(stats.chi2.ppf(probability, df) / df) - shift)

    assert integrate.quad(power_at, 0, 1, epsabs=1e-7, limit=200)[0] == pytest.approx(
        power, abs=1e-6
    )


def test_a_detectable_difference_is_detected_four_times_in_five() -> None:
    random = np.random.default_rng(0)
    truth = 0.02 * noncentrality(2) / math.sqrt(3)
    draws = random.normal(truth, 0.02, (4000, 3))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(3))
    assert np.mean(t > 4.3027) == pytest.approx(0.8, abs=0.02)


def test_the_detectable_difference_is_in_nats() -> None:
    comparison = compare_losses(shifted(0.001), BASE)
    differences = [a - b for a, b in zip(shifted(0.001), BASE)]
    se = np.std(differences, ddof=1) / math.sqrt(5)
    assert comparison.detectable == pytest.approx(noncentrality(4) * se)
    one_of_many = compare_losses(shifted(0.001), BASE, family=15)
    assert one_of_many.detectable == pytest.approx(noncentrality(4, alpha=0.05 / 15) * se)
    assert one_of_many.ci_low == comparison.ci_low


@pytest.mark.parametrize(("power", "alpha"), [(0.05, 0.05), (1, 0.05), (0.8, 0), (math.nan, 0.05)])
def test_power_must_be_possible(power: float, alpha: float) -> None:
    with pytest.raises(InputError, match="power"):
        noncentrality(2, power=power, alpha=alpha)


# -- many tests at once ----------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_by_holm([0.6, 0.7]) == [1, 1]
    assert adjust_by_holm([]) == []
    adjusted = adjust_by_holm(TRIAL)  # with 15 hypotheses, the paper's three rejections
    assert [p is not None and p <= 0.05 for p in adjusted] == [True] * 3 + [False] * 12


def test_adjusted_p_stay_in_their_places() -> None:
    order = np.random.default_rng(1).permutation(len(TRIAL))
    mixed = [TRIAL[index] for index in order]
    straight = adjust_by_holm(TRIAL)
    assert adjust_by_holm(mixed) == [straight[index] for index in order]


def test_a_test_that_could_not_be_made_still_counts() -> None:
    with_ones = adjust_by_holm([0.01, 1.0, 0.02, 1.0])
    assert adjust_by_holm([0.01, None, 0.02, None]) == [with_ones[0], None, with_ones[2], None]
    assert adjust_by_holm([0.01, None, 0.02]) == pytest.approx([0.03, None, 0.04])


@pytest.mark.parametrize("p", [math.nan, -0.1, 1.1])
def test_a_p_value_is_a_probability(p: float) -> None:
    with pytest.raises(InputError, match="p value"):
        adjust_by_holm([0.5, p])


# -- simulated studies -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 8])
def test_intervals_cover_the_truth(n: int) -> None:
    draws = np.random.default_rng(n).normal(1.5, 0.01, (4000, n))
    zeros = [0.0] * n
    intervals = [paired_difference(row, zeros).confidence_interval() for row in draws.tolist()]
    assert np.mean([low <= 1.5 <= high for low, high in intervals]) == pytest.approx(
        0.95, abs=0.012
    )


def test_a_family_of_null_variants_seldom_has_a_winner() -> None:
    """Six variants equal to the baseline, three seeds.

    They are correlated, because all are compared with the same runs.
    """
    random = np.random.default_rng(3)
    false_claims = unadjusted = 0
    studies = 1500
    for _ in range(studies):
        baseline, *variants = random.normal(1.5, 0.01, (7, 3)).tolist()
        p = [paired_difference(variant, baseline).p_value() for variant in variants]
        unadjusted += min(p) <= 0.05
        false_claims += any(value is not None and value <= 0.05 for value in adjust_by_holm(p))
    assert false_claims / studies < 0.05 + 0.012
    assert unadjusted / studies > 0.12


def test_sameness_is_seldom_claimed_at_the_margin() -> None:
    random = np.random.default_rng(4)
    rows = random.normal(0, 0.01, (4000, 2, 8))
    rows[:, 0] += 0.02  # the margin itself: the nearest that is not within it
    claims = np.mean(
        [paired_difference(*row).equivalence_p_value(0.02) <= 0.05 for row in rows.tolist()]
    )
    assert 0.035 < claims < 0.065
    rows[:, 0] -= 0.02
    claims = np.mean(
        [paired_difference(*row).equivalence_p_value(0.02) <= 0.05 for row in rows.tolist()]
    )
    assert claims > 0.8


# -- numbers and words -----------------------------------------------------------------------------


def kind(comparison: Comparison) -> str:
    return judge_family([comparison])[0].kind


def words(comparison: Comparison) -> str:
    return judge_family([comparison])[0].words


def test_less_loss_is_better() -> None:
    better, worse = compare_losses(shifted(-0.02), BASE), compare_losses(shifted(0.02), BASE)
    assert (kind(better), kind(worse)) == ("better", "worse")
    assert words(better) == "better by 0.0202 nats"
    assert better.delta == pytest.approx(-0.0202)
    assert better.p == pytest.approx(stats.ttest_rel(shifted(-0.02), BASE).pvalue)
    assert better.ci_low is not None
    assert better.ci_high is not None
    assert better.ci_low < -0.0202 < better.ci_high < 0


def test_an_undetected_difference_names_the_detectable_one() -> None:
    comparison = compare_losses(shifted(0.001), BASE)
    expected = f"({comparison.detectable:.3g} nats would be seen in 4 of 5 studies with n = 5)"
    assert words(comparison) == f"not distinguishable {expected}"
    among = judge_comparison(compare_losses(shifted(0.001), BASE, family=15), 1.0)
    assert "nats would be seen in 4 of 5 studies with n = 5 among 15 comparisons" in among.words


def test_holm_decides_and_not_the_p_of_one() -> None:
    comparison = compare_losses(shifted(-0.006), BASE)
    assert comparison.p is not None
    assert 0.01 < comparison.p < 0.05
    assert kind(comparison) == "better"
    assert judge_comparison(comparison, 0.051).kind == "not distinguishable"
    null = compare_losses(shifted(0.0005), BASE)
    study = judge_family([comparison, null, null, null])
    assert [verdict.kind for verdict in study] == ["not distinguishable"] * 4
    assert study[0].p_holm == pytest.approx(4 * comparison.p)


def test_same_is_said_only_within_a_margin_that_was_asked_for() -> None:
    near = shifted(0.0005)
    assert kind(compare_losses(near, BASE)) == "not distinguishable"
    assert words(compare_losses(near, BASE, margin=0.01)) == "the same within 0.01 nats"
    assert (
        kind(compare_losses(near, BASE, margin=0.0005)) == "not distinguishable"
    )  # too near to be excluded
    assert kind(compare_losses(shifted(0.02), BASE, margin=0.01)) == "worse"
    assert (
        words(compare_losses(shifted(-0.02), BASE, margin=0.05))
        == "the same within 0.05 nats, if measurably better"
    )
    tight = compare_losses(near, BASE, margin=0.0045)
    assert kind(tight) == "same"
    assert [verdict.kind for verdict in judge_family([tight] * 4)] == ["not distinguishable"] * 4


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_diverged_run_is_an_outcome(bad: float | None) -> None:
    """Four of these five are far better than the baseline."""
    losses: list[float | None] = [*shifted(-0.2)[:4], bad]
    comparison = compare_losses(losses, BASE, margin=1)
    assert (
        comparison.n,
        comparison.diverged,
        comparison.delta,
        comparison.p,
        comparison.p_same,
    ) == (5, 1, None, None, None)
    assert judge_comparison(comparison, None).kind == "diverged"
    assert words(comparison) == "diverged in 1 of 5"
    assert words(compare_losses(losses, losses)) == "diverged in 1 of 5 (the baseline in 1 of 5)"
    against = compare_losses(BASE, losses)
    assert (kind(against), words(against)) == (
        "not tested",
        "not tested: the baseline diverged in 1 of 5",
    )


def test_diverged_runs_are_counted_among_the_runs_of_their_own_side() -> None:
    many, few = [1.5, None, None, None, 1.4], [1.5, None]
    assert words(compare_losses(many, few, paired=False)) == (
        "diverged in 3 of 5 (the baseline in 1 of 2)"
    )
    assert words(compare_losses(many, few[:1] * 2, paired=False)) == "diverged in 3 of 5"


def test_a_diverged_variant_makes_the_others_no_likelier() -> None:
    comparison = compare_losses(shifted(-0.006), BASE)
    lost = compare_losses([None] * 5, BASE)
    assert comparison.p is not None
    assert judge_family([comparison, lost])[0].p_holm == pytest.approx(2 * comparison.p)


def test_one_run_is_no_test() -> None:
    comparison = compare_losses([1.4], [1.5], margin=1)
    assert comparison.delta == pytest.approx(-0.1)
    assert (comparison.p, comparison.p_same, comparison.ci_low, comparison.detectable) == (
        None,
    ) * 4
    assert words(comparison) == f"not tested: {statistics.ONE_RUN}"


def test_identical_pairs_are_the_same_and_copies_are_no_seeds() -> None:
    same = compare_losses(BASE, BASE)
    assert (same.delta, same.p, same.se) == (0, 1, 0)
    assert words(same) == "identical in all 5 pairs"
    assert words(compare_losses(BASE, BASE, margin=0.01)) == "identical in all 5 pairs"
    copies = compare_losses([1.4] * 3, [1.5] * 3)
    assert copies.delta == pytest.approx(-0.1)
    assert words(copies) == f"not tested: {statistics.IDENTICAL_RUNS}"
    assert compare_losses([1.4] * 3, [1.5, 1.6, 1.7]).p is not None


def test_nothing_depends_on_the_unit_or_on_the_order_of_the_seeds() -> None:
    here = compare_losses(shifted(-0.006), BASE, margin=0.01)
    variant, baseline = ([loss * 1024 for loss in losses] for losses in (shifted(-0.006), BASE))
    there = compare_losses(variant, baseline, margin=0.01 * 1024)
    assert (there.p, there.p_same) == pytest.approx((here.p, here.p_same))
    assert here.delta is not None
    assert here.detectable is not None
    assert (there.delta, there.detectable) == pytest.approx(
        (here.delta * 1024, here.detectable * 1024)
    )
    turned = compare_losses(shifted(-0.006)[::-1], BASE[::-1], margin=0.01)
    assert turned.p == pytest.approx(here.p)


@pytest.mark.parametrize(
    ("variant", "baseline", "settings", "says"),
    [
        ([1.5, 1.6], [1.5], {}, "one of each for every seed"),
        ([], [], {}, "at least one"),
        (BASE, BASE, {"margin": 0.0}, "margin"),
        (BASE, BASE, {"margin": math.nan}, "margin"),
    ],
)
def test_what_cannot_be_compared(
    variant: Sequence[float], baseline: Sequence[float], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        compare_losses(variant, baseline, **settings)
