"""Approaches 1 and 2, and L(N): against laws whose frontier is known, and SciPy's regressions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from glasslm.errors import InputError
from glasslm.lab.scaling import isoflop
from glasslm.lab.scaling.isoflop import Frontier, TrainingCurve
from glasslm.lab.scaling.law import Interval, Law, Observation
from glasslm.lab.scaling.parabolas import fit_parabolas
from glasslm.lab.scaling.uncertainty import bootstrap

LAW = Law(alpha=0.34, beta=0.28, A=60, B=40, E=1.2)


def grid(sizes: int, tokens: int, noise: float = 0, seed: int = 0) -> list[Observation]:
    rng = np.random.default_rng(seed)
    return [
        Observation(N, D, LAW.loss(N, D) * math.exp(noise * float(rng.standard_normal())))
        for N in np.geomspace(1e5, 1e7, sizes) for D in np.geomspace(2e5, 2e7, tokens)
    ]  # fmt: skip


def at_equal_compute(
    computes: Sequence[float], centre: float = 1, drift: float = 0, law: Law = LAW
) -> list[Observation]:
    """Five sizes a budget around off times the optimum, which drifts away with compute."""
    observations = []
    for C in computes:
        for ratio in np.geomspace(0.2, 5, 5):
            N = law.N_opt(C) * centre * (C / computes[0]) ** drift * ratio
            observations.append(Observation(N, C / 6 / N, law.loss(N, C / 6 / N)))
    return observations


def curves(sizes: int, points: int = 60) -> list[TrainingCurve]:
    D = np.geomspace(2e5, 2e8, points)
    return [
        TrainingCurve(N, list(6 * N * D), [LAW.loss(N, float(d)) for d in D])
        for N in np.geomspace(1e5, 1e7, sizes)
    ]


# -- approach 1 ------------------------------------------------------------------------------------


def test_the_envelope_finds_the_frontier_of_its_law() -> None:
    """A line through the staircase itself would be (1 - 1/k^2) of this for k steps."""
    frontier = isoflop.envelope_frontier(curves(7))
    assert frontier.a.value == pytest.approx(LAW.a, abs=0.01)
    assert frontier.a.ci_high - frontier.a.ci_low < 0.05
    for C, N in frontier.points:
        assert pytest.approx(LAW.N_opt(C), rel=0.05) == N
    assert frontier.N_opt(1e14) == pytest.approx(LAW.N_opt(1e14), rel=0.05)


def test_the_envelope_bears_noise() -> None:
    rng = np.random.default_rng(0)
    noisy = [
        TrainingCurve(
            curve.N, curve.C, list(np.array(curve.loss) * np.exp(0.002 * rng.standard_normal(60)))
        )
        for curve in curves(7)
    ]
    assert isoflop.envelope_frontier(noisy).a.value == pytest.approx(LAW.a, abs=0.04)


def test_a_size_whose_curve_ends_too_soon_is_no_optimum() -> None:
    """A larger size that takes over only because the smaller curve ends is no optimum."""
    short = curves(7)
    short[3] = TrainingCurve(short[3].N, short[3].C[:20], short[3].loss[:20])
    full, cut = isoflop.envelope_frontier(curves(7)), isoflop.envelope_frontier(short)
    passage = math.sqrt(short[3].N * short[4].N)
    assert cut.points == tuple(point for point in full.points if point[1] != passage)
    assert len(cut.points) == len(full.points) - 1
    assert "N = 1e+06 and 2.15e+06 do not cross" in cut.warnings[1]


def test_several_runs_of_one_size_are_one_curve() -> None:
    doubled = [
        *curves(7),
        *(TrainingCurve(c.N, c.C, list(np.array(c.loss) * 1.1)) for c in curves(7)[::2]),
    ]
    assert isoflop.envelope_frontier(doubled) == isoflop.envelope_frontier(curves(7))


def test_too_few_optima_are_refused() -> None:
    with pytest.raises(InputError, match="envelope found 1 optima"):
        isoflop.envelope_frontier(curves(3))
    with pytest.raises(InputError, match="number of curves"):
        isoflop.envelope_frontier([])


@pytest.mark.parametrize(("C", "loss"), [
    ([1.0], [2.0]), ([1.0, 2.0], [2.0]), ([2.0, 1.0], [2.0, 1.0]), ([0.0, 1.0], [2.0, 1.0]),
    ([1.0, 2.0], [2.0, math.nan]),
])  # fmt: skip
def test_a_curve_that_is_none_is_refused(C: list[float], loss: list[float]) -> None:
    with pytest.raises(InputError, match="the curve of N = 10"):
        TrainingCurve(10, C, loss)


def test_finished_runs_make_curves() -> None:
    runs = [
        Observation(10, 4, 2.0),
        Observation(10, 8, 1.0),
        Observation(10, 8, 1.5, seed=1),
        Observation(20, 4, 2.0),
    ]
    assert isoflop.training_curves(runs) == [TrainingCurve(10, [240, 480], [2.0, 1.25])]


# -- approach 2 ------------------------------------------------------------------------------------


def test_centred_sizes_give_the_exponent_without_bias() -> None:
    """At constant ratios to the optimum, L - E has the same shape at each compute."""
    parabolas = fit_parabolas(at_equal_compute([1e12, 1e13, 1e14, 1e15]))
    assert [p.verdict for p in parabolas] == ["centred"] * 4
    frontier = isoflop.isoflop_frontier(parabolas)
    assert frontier.a.value == pytest.approx(LAW.a, abs=1e-4)
    assert frontier.N_opt(1e13) == pytest.approx(LAW.N_opt(1e13), rel=0.1)
    assert not frontier.warnings
    assert all(
        p.curvature > 0 and p.lowest == pytest.approx(LAW.optimal_loss(p.C), rel=0.01)
        for p in parabolas
    )


def test_sizes_that_drift_off_the_optimum_bias_the_exponent_and_are_warned_of() -> None:
    """Without any noise; Czech, arXiv:2603.22339.

    The more, the less the two exponents are alike.
    """
    law = Law(alpha=0.6, beta=0.2, A=3000, B=20, E=1.2)
    runs = at_equal_compute([1e12, 1e13, 1e14, 1e15], drift=0.2, law=law)
    frontier = isoflop.isoflop_frontier(fit_parabolas(runs))
    assert abs(frontier.a.value - law.a) > 0.01
    assert "off the centre" in frontier.warnings[0]


def test_a_parabola_is_itself() -> None:
    """With three points, seeds, and a minimum off the centre."""
    runs = [
        Observation(N, 1e14 / 6 / N, 2 * math.exp(0.03 * math.log(N / 3e6) ** 2 + shift))
        for N in (1e6, 2e6, 4e6) for shift in (-0.01, 0.01)
    ]  # fmt: skip
    (parabola,) = fit_parabolas(runs)
    assert pytest.approx(3e6) == parabola.N_opt
    assert pytest.approx(1e14) == parabola.C
    assert (parabola.lowest, parabola.curvature) == pytest.approx((2, 0.06))
    assert parabola.verdict == "off-centre"


def test_a_parabola_is_local() -> None:
    """Sizes over three decades; one parabola through all of them is far from the optimum."""
    law, C = Law(alpha=0.6, beta=0.2, A=3000, B=20, E=1.2), 1e14
    sizes = law.N_opt(C) * 1.1 * np.geomspace(1 / 30, 30, 15)
    runs = [Observation(N, C / 6 / N, law.loss(N, C / 6 / N)) for N in sizes]
    (parabola,) = fit_parabolas(runs)
    assert len(parabola.sizes) == 5
    assert pytest.approx(law.N_opt(C), rel=0.08) == parabola.N_opt
    x = np.log(sizes)
    c2, c1, _ = np.polyfit(x, np.log([run.loss for run in runs]), 2)
    assert abs(-c1 / (2 * c2) - math.log(law.N_opt(C))) > 0.2  # one parabola is 20% off


def test_a_parabola_takes_more_sizes_only_with_a_reason() -> None:
    sizes = np.geomspace(1e6, 1e8, 9)
    logs = 0.02 * np.log(sizes / 1e7) ** 2
    logs[3:6] = -0.01  # a flat bottom with a bump: the five lowest sizes have no minimum
    logs[4] = 0.0
    logs[2] = logs[6] = -0.011
    runs = [Observation(N, 1e14 / 6 / N, 2 * math.exp(y)) for N, y in zip(sizes, logs)]
    (parabola,) = fit_parabolas(runs)
    if len(parabola.sizes) > 5:
        assert "around the lowest loss" in parabola.widened


def test_many_close_sizes_do_not_drown_the_curvature_in_noise() -> None:
    """Two neighbours of 40 sizes in two decades span a factor of 1.3: noise alone."""
    rng = np.random.default_rng(0)
    noisy = [
        replace(run, loss=run.loss * math.exp(0.003 * float(rng.standard_normal())))
        for C in (1e13, 4e13, 1.6e14, 6.4e14)
        for N in LAW.N_opt(C) * np.geomspace(0.1, 10, 40)
        for run in [Observation(N, C / 6 / N, LAW.loss(N, C / 6 / N))]
    ]
    fitted = fit_parabolas(noisy)
    assert all(parabola.sizes[-1] / parabola.sizes[0] > 3.9 for parabola in fitted)
    assert "span less than a factor of 2 on a side" in fitted[0].widened
    frontier = isoflop.isoflop_frontier(fitted)
    assert frontier.a.value == pytest.approx(LAW.a, abs=0.05)
    assert LAW.a in frontier.a


def test_losses_are_not_interpolated_over_wide_gaps() -> None:
    """Over a factor of 40 in tokens, an interpolated loss is 3% too high."""
    close = [Observation(N, D, LAW.loss(N, D)) for N in (1e5, 1e6, 1e7) for D in (2e6, 6e6)]
    wide = [Observation(3e6, D, LAW.loss(3e6, D)) for D in (5e5, 2e7)]
    at_equal = isoflop.interpolate_equal_tokens([*close, *wide])
    assert [run.N for run in at_equal] == [1e5, 1e6, 1e7]
    for run in at_equal:
        assert run.loss == pytest.approx(LAW.loss(run.N, run.D), rel=1e-9)


def test_optima_with_errors_weigh_the_line() -> None:
    """One compute with a scatter of its own moves the line less than it does without weights."""
    rng = np.random.default_rng(0)
    runs = [
        replace(run, loss=run.loss * math.exp(0.0005 * float(rng.standard_normal())))
        for run in at_equal_compute([1e12, 1e13, 1e14, 1e15])
    ]
    parabolas = fit_parabolas(runs)
    assert all(0 < parabola.error < 0.5 for parabola in parabolas)
    moved = [*parabolas[:3], replace(parabolas[3], N_opt=2 * parabolas[3].N_opt, error=5.0)]
    weighted = isoflop.isoflop_frontier(moved).a.value
    plain = isoflop.isoflop_frontier([replace(p, error=math.nan) for p in moved]).a.value
    assert abs(weighted - LAW.a) < abs(plain - LAW.a) / 3


def test_minima_outside_the_sizes_are_left_out() -> None:
    computes = [1e12, 1e13, 1e14]
    outside = fit_parabolas(at_equal_compute([1e15], centre=9))
    assert [p.verdict for p in outside] == ["outside the grid"]
    upside_down = fit_parabolas(
        [Observation(N, 1e16 / 6 / N, 3 - math.log(N / 2e6) ** 2) for N in (1e6, 2e6, 4e6)]
    )
    assert [p.verdict for p in upside_down] == ["no minimum"]
    good = fit_parabolas(at_equal_compute(computes))
    frontier = isoflop.isoflop_frontier([*good, *outside, *upside_down])
    assert frontier.points == isoflop.isoflop_frontier(good).points
    assert len(frontier.warnings) == 2
    assert all("left out" in warning for warning in frontier.warnings)
    with pytest.raises(InputError, match="IsoFLOP found 2 optima"):
        isoflop.isoflop_frontier(good[:2])


def test_two_sizes_are_no_parabola() -> None:
    assert fit_parabolas([Observation(N, 1e14 / 6 / N, 2.0) for N in (1e6, 2e6)]) == []


def test_a_grid_of_runs_gives_isoflop_data() -> None:
    cut = isoflop.slices(isoflop.training_curves(grid(9, 6)))
    for o in cut:
        assert o.loss == pytest.approx(LAW.loss(o.N, o.D), rel=0.005)
    assert isoflop.isoflop_frontier(fit_parabolas(cut)).a.value == pytest.approx(LAW.a, abs=0.01)
    with pytest.raises(InputError, match="no compute is reached"):
        isoflop.slices(curves(3))


# -- side by side ----------------------------------------------------------------------------------


def test_the_three_approaches_agree_on_a_law() -> None:
    runs = grid(9, 6, noise=0.001)
    three = [
        isoflop.envelope_frontier(isoflop.training_curves(runs)),
        isoflop.isoflop_frontier(fit_parabolas(isoflop.slices(isoflop.training_curves(runs)))),
        isoflop.parametric_frontier(bootstrap(runs)),
    ]
    assert [frontier.a.value for frontier in three] == pytest.approx([LAW.a] * 3, abs=0.03)
    assert three[2].N_opt(1e15) == pytest.approx(LAW.N_opt(1e15), rel=0.1)
    assert "all intervals meet" in isoflop.disagreement(three)


def test_a_disagreement_is_named() -> None:
    first, second, third = (
        Frontier(name, Interval(a, a - 0.02, a + 0.02), 1.0, ())
        for name, a in (("one", 0.45), ("two", 0.48), ("three", 0.6))
    )
    sentence = isoflop.disagreement([first, second, third])
    assert "0.450 to 0.600" in sentence
    assert "one and three, two and three do not meet" in sentence
    assert "three and two, three and one do not meet" in isoflop.disagreement(
        [third, second, first]
    )
    assert "nothing to compare" in isoflop.disagreement([first])


# -- size alone ------------------------------------------------------------------------------------


def test_kaplans_law_of_size_is_recovered() -> None:
    """L(N) = (8.8e13 / N)^.076; Kaplan et al. 2020, arXiv:2001.08361, equation 1.1."""
    runs = [
        Observation(N, 1e9, (8.8e13 / N) ** isoflop.KAPLAN_EXPONENT)
        for N in np.geomspace(1e3, 1e9, 7)
    ]
    law = isoflop.size_law(runs)
    assert law.alpha.value == pytest.approx(0.076)
    assert law.k ** (1 / law.alpha.value) == pytest.approx(8.8e13)
    assert law.r2 == pytest.approx(1)
    assert law.loss(1e6) == pytest.approx((8.8e13 / 1e6) ** 0.076)


def test_the_slope_s_interval_is_that_of_the_regression() -> None:
    from scipy.stats import linregress, t

    rng = np.random.default_rng(0)
    N = np.geomspace(1e5, 1e7, 6)
    L = 8 * N**-0.1 * np.exp(0.01 * rng.standard_normal(6))
    law = isoflop.size_law([Observation(n, 1e7, loss) for n, loss in zip(N, L, strict=True)])
    coefficients, covariance = np.polyfit(np.log(N), np.log(L), 1, cov=True)
    half = t.ppf(0.975, 4) * math.sqrt(covariance[0, 0])
    assert law.alpha.value == pytest.approx(-coefficients[0])
    assert (law.alpha.ci_low, law.alpha.ci_high) == pytest.approx(
        (-coefficients[0] - half, -coefficients[0] + half)
    )
    assert law.r2 == pytest.approx(linregress(np.log(N), np.log(L)).rvalue ** 2)


def test_a_floor_is_found_and_its_neglect_flattens_the_slope() -> None:
    runs = [Observation(N, 2e7, LAW.loss(N, 2e7)) for N in np.geomspace(1e5, 1e7, 6)]
    with_floor, without = isoflop.size_law(runs, floor=True), isoflop.size_law(runs)
    assert with_floor.alpha.value == pytest.approx(LAW.alpha, rel=1e-6)
    assert pytest.approx(LAW.loss(1e99, 2e7), rel=1e-6) == with_floor.E
    assert without.alpha.value < with_floor.alpha.value / 2
    assert without.r2 < with_floor.r2


def test_a_floor_s_interval_is_that_of_scipy_s_curve_fit() -> None:
    from scipy.optimize import curve_fit
    from scipy.stats import t

    rng = np.random.default_rng(1)
    N = np.geomspace(1e5, 1e7, 12)
    L = (1.2 + 60 * N**-0.34) * np.exp(0.003 * rng.standard_normal(12))
    law = isoflop.size_law(
        [Observation(n, 1e7, loss) for n, loss in zip(N, L, strict=True)], floor=True
    )
    best, covariance = curve_fit(
        lambda n, e, k, alpha: np.log(e + k * (n / 1e6) ** -alpha), N, np.log(L), p0=(1, 0.5, 0.3)
    )
    half = t.ppf(0.975, 9) * math.sqrt(covariance[2, 2])
    assert law.alpha.value == pytest.approx(best[2], rel=1e-4)
    assert law.alpha.ci_high - law.alpha.value == pytest.approx(half, rel=1e-3)


def test_size_alone_wants_sizes_and_one_number_of_tokens() -> None:
    runs = [Observation(N, 1e6 * N**0.3, 2.0 - i / 10) for i, N in enumerate((1e5, 1e6, 1e7))]
    assert "D runs from" in isoflop.size_law(runs).warnings[0]
    with pytest.raises(InputError, match="sizes is 3: expected at least 4"):
        isoflop.size_law(runs, floor=True)
