"""Each kind of sick loss curve raises its own signal, and healthy curves raise none."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from glasslm.lab.diagnosis import curves
from glasslm.lab.diagnosis.curve_figure import draw_curve
from glasslm.lab.diagnosis.curve_files import Curve, read_curve
from glasslm.lab.diagnosis.curve_table import Array, Series
from glasslm.lab.diagnosis.smoothed_curve import find_spikes, fit_non_increasing
from glasslm.report import figures
from glasslm.training import guard
from small_runs import train, write_text

LENGTHS = (50, 200, 1000, 5000)
SEEDS = range(5)
Illness = Callable[[Curve, np.random.Generator], Curve]


def healthy(seed: int, N: int, noise: float = 0.05, power: float = 0.5) -> Curve:
    """A noisy power law, a validation loss a little above, a falling, noisy gradient norm."""
    draw, steps = np.random.default_rng(seed), np.arange(1.0, N + 1)
    at = steps[:: max(1, N // 20)]
    validation = 1.55 + 2.7 * at**-power + noise / 5 * draw.standard_normal(len(at))
    norm = (0.5 + 2 * steps**-0.3) * np.exp(0.2 * draw.standard_normal(N))
    loss = 1.5 + 2.7 * steps**-power + noise * draw.standard_normal(N)
    return Curve("synthetic", Series(steps, loss), Series(at, validation), Series(steps, norm))


def raised_signals(curve: Curve) -> dict[str, str]:
    return {
        finding.signal: finding.verdict
        for finding in curves.judge_curve(curve)
        if finding.verdict != "ok"
    }


def with_loss(curve: Curve, change: Callable[[Array], Array]) -> Curve:
    values = change(curve.train.values.copy())
    return replace(curve, train=Series(curve.train.steps, values), validation=Series())


def progress(curve: Curve) -> Array:
    """The share of the run that is over at each step."""
    return curve.train.steps / curve.train.steps[-1]


def explodes(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(curve, lambda x: x + np.maximum(0, progress(curve) - 0.7) * 14)


def jumps(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(
        curve, lambda x: np.where(progress(curve) > 0.6, 6 + 0.3 * draw.standard_normal(len(x)), x)
    )


def explodes_at_the_end(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(curve, lambda x: np.where(progress(curve) > 0.95, 10 * x, x))


def explodes_at_the_start(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(
        curve, lambda x: np.where(progress(curve) > 0.01, 9 + 0.3 * draw.standard_normal(len(x)), x)
    )


def learns_nothing(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(curve, lambda x: math.log(65) + 0.03 * draw.standard_normal(len(x)))


def spikes_twice(curve: Curve, draw: np.random.Generator) -> Curve:
    def change(x: Array) -> Array:
        x[[len(x) // 2, len(x) * 4 // 5]] += 3
        return x

    return with_loss(curve, change)


def overflows(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(curve, lambda x: np.where(progress(curve) > 0.7, np.nan, x))


def is_noisy(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(curve, lambda x: x + 1.2 * draw.standard_normal(len(x)))


def flips(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(curve, lambda x: x + 0.3 * (-1.0) ** np.arange(len(x)))


def stops_early(curve: Curve, draw: np.random.Generator) -> Curve:
    return with_loss(
        curve, lambda x: 4.2 - 2 * progress(curve) + 0.02 * draw.standard_normal(len(x))
    )


def overfits(curve: Curve, draw: np.random.Generator) -> Curve:
    at = curve.validation.steps
    rise = 0.8 * np.maximum(0, at / curve.train.steps[-1] - 0.4)
    values = 1.7 + 2.5 * at**-0.5 + rise + 0.01 * draw.standard_normal(len(at))
    return replace(curve, validation=Series(at, values))


def has_an_easy_validation(curve: Curve, draw: np.random.Generator) -> Curve:
    return replace(curve, validation=Series(curve.validation.steps, curve.validation.values - 0.9))


def vanishes(curve: Curve, draw: np.random.Generator) -> Curve:
    stuck = with_loss(
        curve,
        lambda x: 3.3 + 0.9 * np.exp(-20 * progress(curve)) + 0.03 * draw.standard_normal(len(x)),
    )
    return replace(
        stuck,
        grad_norm=Series(curve.train.steps, curve.grad_norm.values * np.exp(-12 * progress(curve))),
    )


def has_growing_gradients(curve: Curve, draw: np.random.Generator) -> Curve:
    return replace(
        curve,
        grad_norm=Series(curve.train.steps, curve.grad_norm.values * np.exp(6 * progress(curve))),
    )


ILLNESSES: dict[Illness, tuple[str, str]] = {
    explodes: ("divergence", "bad"),
    jumps: ("divergence", "bad"),
    explodes_at_the_end: ("divergence", "bad"),
    explodes_at_the_start: ("divergence", "bad"),
    learns_nothing: ("plateau", "bad"),
    spikes_twice: ("spikes", "watch"),
    overflows: ("non-finite values", "bad"),
    is_noisy: ("oscillation", "watch"),
    flips: ("oscillation", "watch"),
    stops_early: ("final slope", "watch"),
    overfits: ("overfitting", "bad"),
    has_an_easy_validation: ("generalization gap", "watch"),
    vanishes: ("vanishing gradients", "bad"),
    has_growing_gradients: ("exploding gradients", "bad"),
}


@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("illness", ILLNESSES, ids=lambda illness: illness.__name__)
def test_each_illness_raises_its_own_signal(illness: Illness, N: int) -> None:
    """In at least four of five seeds. The gap to validation is part of overfitting."""
    signal, verdict = ILLNESSES[illness]
    N = (
        max(N, 150) if illness is is_noisy else N
    )  # so much noise on fewer points hides whether anything was learned
    N = max(N, 200) if illness is explodes_at_the_start else N  # or nothing comes before it
    raised = [
        raised_signals(illness(healthy(seed, N), np.random.default_rng(1000 + seed)))
        for seed in SEEDS
    ]
    assert sum(signals.get(signal) == verdict for signals in raised) >= 4, raised
    if illness in (
        learns_nothing,
        overflows,
        overfits,
        has_an_easy_validation,
        has_growing_gradients,
        explodes,
        explodes_at_the_start,
    ):
        companions = {signal} | ({"generalization gap"} if illness is overfits else set())
        assert set().union(*raised) <= companions


@pytest.mark.parametrize("noise", [0.005, 0.03, 0.1])
@pytest.mark.parametrize(("N", "seeds"), [(50, 50), (200, 50), (1000, 30), (5000, 5)])
def test_a_healthy_curve_raises_no_signal(N: int, seeds: int, noise: float) -> None:
    for power in (0.3, 0.5):
        raised = [raised_signals(healthy(seed, N, noise, power)) for seed in range(seeds)]
        assert sum(map(bool, raised)) <= seeds // 50, raised  # of fifty one may look ill by chance


def test_a_curve_that_converged_early_is_a_plateau_and_one_that_ended_low_is_not() -> None:
    steps, draw = np.arange(1.0, 2001), np.random.default_rng(0)
    noise = 0.02 * draw.standard_normal(2000)
    stuck = Curve("x", Series(steps, 2.8 + 1.4 * np.exp(-steps / 100) + noise))
    assert raised_signals(stuck) == {"plateau": "watch"}
    learned = Curve("x", Series(steps, 0.05 + 4.1 * np.exp(-steps / 100) + noise / 10))
    assert raised_signals(learned) == {}


def test_a_curve_with_all_columns_has_the_signals_that_the_pages_promise() -> None:
    curve = healthy(0, 200)
    assert len(curves.judge_curve(curve)) == 11
    count = len(curves.judge_curve(replace(curve, vocab_size=65)))
    for page in ("README.md", "docs/features.md", "docs/cookbook.md", "docs/course.md"):
        text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
        assert f"up to {count} " in text, page


def test_the_size_of_the_vocabulary_says_what_guessing_would_cost() -> None:
    guessing = replace(learns_nothing(healthy(0, 300), np.random.default_rng(0)), vocab_size=65)
    plateau = next(
        finding for finding in curves.judge_curve(guessing) if finding.signal == "plateau"
    )
    assert "guesses uniformly" in plateau.meaning
    assert "ln 65 = 4.174" in plateau.evidence
    too_large = replace(
        with_loss(healthy(0, 300), lambda x: x + 4 * np.exp(-np.arange(300) / 5)), vocab_size=65
    )
    assert raised_signals(too_large)["initial loss"] == "bad"


def test_the_numbers_are_those_of_the_curve() -> None:
    spiky = spikes_twice(healthy(3, 400), np.random.default_rng(0))
    assert find_spikes(spiky.train) == [200, 320]
    texts = {finding.signal: finding.evidence for finding in curves.judge_curve(spiky)}
    assert "step 201" in texts["spikes"]
    lost = overflows(healthy(3, 400), np.random.default_rng(0))
    texts = {finding.signal: finding.evidence for finding in curves.judge_curve(lost)}
    assert "120 of 400 values of the loss, the first at step 281" in texts["non-finite values"]
    ill = overfits(healthy(3, 1000), np.random.default_rng(0))
    best = int(ill.validation.steps[ill.validation.values.argmin()])
    texts = {finding.signal: finding.evidence for finding in curves.judge_curve(ill)}
    assert f"at step {best:,}" in texts["overfitting"]


def test_a_spike_is_six_deviations_above_the_128_values_before() -> None:
    """By the guard's own rule, so that a run and its curve have the same spikes."""
    for swing in (0.1, 0.001):  # where the loss stands still the least deviation is .1% of the mean
        x = np.tile([2 - swing, 2 + swing], 100)
        limit = guard.spike_limit(x[22:150])
        assert limit == pytest.approx(2 + 6 * max(swing * math.sqrt(128 / 127), 0.002))
        for height, expected in ((limit - 1e-9, []), (limit + 1e-9, [150])):
            x[150] = height
            assert find_spikes(Series(np.arange(200.0), x)) == expected
    x[150:] = 5  # stays there: that is no spike
    assert find_spikes(Series(np.arange(200.0), x)) == []


def test_weights_that_know_their_text_have_little_left_to_learn() -> None:
    """A constant loss is a fault from initial weights, and may be right from trained ones."""
    curve = with_loss(
        healthy(0, 300), lambda x: 0.9 + 0.02 * np.random.default_rng(0).standard_normal(len(x))
    )
    results = [curves.judge_curve(curve, fine_tuned) for fine_tuned in (False, True)]
    verdicts = [
        [finding.verdict for finding in findings if finding.verdict != "ok"] for findings in results
    ]
    assert verdicts == [["bad"], ["watch"]]


def test_falling_is_the_closest_sequence_that_never_rises() -> None:
    x = np.random.default_rng(0).standard_normal(200)
    y = fit_non_increasing(x)
    assert (np.diff(y) <= 1e-12).all()
    for other in (np.full(200, x.mean()), np.sort(x)[::-1], y + 0.01 * np.linspace(1, -1, 200)):
        assert ((x - y) ** 2).sum() <= ((x - other) ** 2).sum()


@pytest.mark.parametrize("N", [1, 2, 9, 10, 11, 15])
def test_few_points_are_no_reason_to_fail(N: int) -> None:
    for illness in ILLNESSES:
        curve = healthy(0, N)
        assert curves.judge_curve(curve)
        assert curves.judge_curve(illness(curve, np.random.default_rng(0)))
    assert (raised_signals(healthy(0, N)).get("length") == "watch") == (N < 10)


def test_values_beyond_reason_are_no_reason_to_fail() -> None:
    for values in (
        [np.nan] * 50,
        [1e308, -1e308] * 25,
        [0.0] * 50,
        [np.inf, 2.0] * 25,
        [-1.0] * 50,
    ):
        curve = Curve("x", Series(np.arange(50.0), np.array(values)))
        with np.errstate(over="ignore", invalid="ignore"):
            assert curves.judge_curve(curve)


def test_the_figure_marks_what_was_found() -> None:
    curve = overfits(healthy(1, 300), np.random.default_rng(0))
    values = spikes_twice(curve, np.random.default_rng(0)).train.values
    values[100:104] = np.nan
    curve = replace(curve, train=Series(curve.train.steps, values))
    drawn = draw_curve(curve, figures.PRINT_PALETTE)
    lines = {str(line.get_label()): line for line in drawn.axes[0].lines}
    assert np.asarray(lines["spike"].get_xdata()).tolist() == [151.0, 241.0]
    assert np.asarray(lines["not finite"].get_xdata()).tolist() == [101.0, 102.0, 103.0, 104.0]
    assert len(drawn.axes) == 2
    assert figures.png(drawn).startswith(b"\x89PNG")


def test_a_real_run_is_healthy(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", sentences=600)
    train(
        text,
        tmp_path / "run",
        max_steps=150,
        eval_interval=15,
        sample_interval=0,
        checkpoint_interval=75,
    )
    for path in (tmp_path / "run", tmp_path / "run" / "metrics.jsonl"):
        curve = read_curve(path)
        assert len(curve.train) == 150
        assert curve.validation.steps[0] == 0
        assert len(curve.clipped) == 150
        assert curve.vocab_size is not None
        assert raised_signals(curve) == {}


def test_spikes_of_the_gradient_norm_are_peaks_above_its_usual_size() -> None:
    rng = np.random.default_rng(0)
    norms = np.exp(0.2 * rng.standard_normal(400))
    steps = np.arange(1.0, 401)
    assert curves.find_norm_spikes(Series(steps, norms)) == []
    norms[[200, 201, 202]] = [8.0, 20.0, 9.0]  # one spike of three steps
    norms[300] = 2.5  # unusual, but no spike
    assert curves.find_norm_spikes(Series(steps, norms)) == [201]
    train = Series(steps, 2 + np.exp(-steps / 50))
    facts = curves.curve_facts(Curve("x", train, grad_norm=Series(steps, norms)))
    assert facts["spikes"] == {"loss": [], "grad_norm": [202.0]}
