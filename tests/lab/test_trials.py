"""Updates against their definition; the range test against the known limit of a parabola."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from planted import config_of, planted_input

from glasslm.config.schema import OptimizerConfig
from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.engines.protocol import Batch, Losses, Update
from glasslm.lab.diagnosis import coordinate_check, trials
from glasslm.lab.diagnosis.coordinate_check import CoordinateCheck
from glasslm.lab.diagnosis.trials import RangeTest, TrialSetup
from glasslm.model.parameters import parameter_table

ENGINES = ["numpy", "torch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_the_ratio_of_plain_descent_is_rate_times_gradient(
    engine: str, weight_decay: float, folder: Path
) -> None:
    """Without momentum and clipping an update is -lr g, whatever decay does beside it."""
    if engine == "torch":
        pytest.importorskip("torch")
    config = config_of(optimizer="sgd", momentum=0.0, grad_clip=0.0, weight_decay=weight_decay)
    setup = planted_input(folder, config, engine=engine).trial_setup
    machine, batch = setup.new_engine(config), setup.batch(0, 4)
    table = parameter_table(config.model, setup.vocab_size)
    arrays = machine.inspect(batch, [GRADIENT_PREFIX + name for name in table])
    weights = {name: array.copy() for name, array in machine.state() if "/" not in name}
    for update in trials.measure_update_ratios(machine, batch, 0.1, config, setup.vocab_size):
        gradient, weight = arrays[GRADIENT_PREFIX + update.name], weights[update.name]
        assert update.change == pytest.approx(
            0.1 * float(np.sqrt((gradient**2).mean())), rel=2e-3, abs=1e-8
        )
        if weight.ndim == 2:
            assert update.ratio == pytest.approx(
                0.1 * float(gradient.std() / weight.std()), rel=2e-3
            )


def test_what_gets_no_update_is_named_though_decay_would_move_it(folder: Path) -> None:
    config = config_of(weight_decay=0.1)
    setup = planted_input(folder, config).trial_setup
    machine = setup.new_engine(config)
    ratios = trials.measure_update_ratios(
        machine, setup.batch(0, 4), 1e-3, config, setup.vocab_size
    )
    assert trials.judge_updates(ratios, 1e-3, 0).verdict == "ok"
    frozen = planted.Frozen(setup.new_engine(config))
    ratios = trials.measure_update_ratios(frozen, setup.batch(0, 4), 1e-3, config, setup.vocab_size)  # type: ignore[arg-type]
    finding = trials.judge_updates(ratios, 1e-3, 0)
    assert finding.verdict == "bad"
    assert planted.Frozen.NAME in finding.evidence
    assert "more" not in finding.evidence


def test_a_first_update_is_judged_more_strictly_than_later_ones(folder: Path) -> None:
    config = config_of(optimizer="adamw")
    setup = planted_input(folder, config).trial_setup
    ratios = trials.measure_update_ratios(
        setup.new_engine(config), setup.batch(0, 4), 2e-3, config, setup.vocab_size
    )
    median = np.median(
        [item.ratio for item in ratios if item.name.endswith(("q.weight", "up.weight", "o.weight"))]
    )
    assert (
        0.08 < median < 0.15
    )  # Adam's first update is the rate, against weights of deviation .02 and less
    assert trials.judge_updates(ratios, 2e-3, 0).verdict == "watch"
    assert trials.judge_updates(ratios, 2e-3, 0, fine_tuned=True).verdict == "ok"
    assert trials.judge_updates(ratios, 2e-3, 100).verdict == "ok"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_is_learnt_by_heart_and_the_same_in_both_engines(engine: str, folder: Path) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    setup = planted_input(
        folder, config_of(dropout=0.5, optimizer="sgd"), engine=engine
    ).trial_setup
    losses = trials.overfit_one_batch(setup, 4)
    machine, batch = setup.new_engine(setup.config), setup.batch(0, 4)
    assert losses[0] == pytest.approx(
        float(machine.losses(batch.tokens, batch.targets).mean()), rel=1e-5
    )  # no dropout
    assert losses[-1] < 0.1 * math.log(setup.vocab_size) <= min(losses[:-1])
    assert trials.judge_overfit(losses, setup.vocab_size).verdict == "ok"
    assert trials.judge_overfit(losses[:8], setup.vocab_size).verdict != "ok"


class Parabola:
    """Gradient descent on the loss h x^2 / 2, which explodes only above the rate 2 / h."""

    def __init__(self, curvature: float) -> None:
        self.curvature, self.x = curvature, 1.0

    def load(self, state: Any) -> None:
        self.x = 1.0

    def accumulate(self, batch: Batch, weight: float) -> Losses:
        return Losses(0.5 * self.curvature * self.x**2, {})

    def update(self, lr: float) -> Update:
        self.x -= lr * self.curvature * self.x
        return Update(1.0, True, True)


@pytest.mark.parametrize("curvature", [0.3, 3.0, 30.0])
def test_the_range_test_finds_the_limit_of_a_parabola(curvature: float) -> None:
    config = config_of(optimizer="sgd")
    ones = np.ones((2, 4), np.int64)
    setup = TrialSetup(
        config,
        20,
        lambda _: Parabola(curvature),
        lambda step, rows: Batch(ones, ones, step, ones[:, 0]),
        list,
    )  # type: ignore[arg-type, return-value]
    test = trials.run_range_test(setup, 2)
    assert 0.02 / curvature < test.limit < 2 / curvature
    assert test.suggested_rate < test.limit
    assert len(test.rates) < trials.RANGE_STEPS or curvature < 1  # it ended where the loss exploded


def test_the_rate_is_judged_against_the_limit() -> None:
    rates = np.geomspace(1e-4, 1, 9)
    test = RangeTest(rates, np.linspace(4, 2, 9), np.linspace(4, 2, 9), limit=0.02)

    def verdict(lr: float) -> str:
        return trials.judge_range(test, OptimizerConfig(lr=lr)).verdict

    assert [verdict(lr) for lr in (1e-5, 1e-3, 0.02, 0.06, 0.2)] == [
        "watch",
        "ok",
        "ok",
        "watch",
        "bad",
    ]
    flat = test._replace(smooth=np.full(9, 4.0))
    assert trials.judge_range(flat, OptimizerConfig()).verdict == "bad"


def test_tuned_weights_may_have_nothing_to_gain_at_any_rate() -> None:
    """What the noise of single batches brings down is no gain, and no limit follows from it."""
    losses = 0.9 + 0.05 * np.random.default_rng(0).standard_normal(60)
    losses[0] = 1.0
    test = RangeTest(np.geomspace(1e-5, 1, 60), losses, np.linspace(1.0, 0.9, 60), limit=2e-5)
    tuned = trials.judge_range(test, OptimizerConfig(lr=1e-4), fine_tuned=True)
    assert (tuned.verdict, trials.judge_range(test, OptimizerConfig(lr=1e-4)).verdict) == (
        "ok",
        "bad",
    )
    assert "old text" in tuned.meaning
    learns = test._replace(losses=np.linspace(4, 2, 60), smooth=np.linspace(4, 2, 60))
    assert trials.judge_range(learns, OptimizerConfig(lr=1e-4), fine_tuned=True).verdict == "bad"


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    widths = [64, 128, 256]
    check = CoordinateCheck(widths, {"logits": [w**0.5 for w in widths], "stream": [3.0] * 3})
    assert check.slope("logits") == pytest.approx(0.5)
    assert check.slope("stream") == pytest.approx(0)
    assert "not flat" in coordinate_check.judge_coordinates(check).meaning
    assert coordinate_check.judge_coordinates(
        CoordinateCheck(widths, {"stream": [3.0] * 3})
    ).meaning.startswith("flat")


@pytest.mark.parametrize(
    "changes", [{}, {"n_heads": 1, "d_model": 16}, {"n_heads": 6, "n_kv_heads": 2, "d_model": 96}]
)
def test_other_widths_are_the_same_model_wider(changes: dict[str, Any], folder: Path) -> None:
    config = config_of(**changes)
    c = config.model
    for model, twice in zip(coordinate_check.scale_width(c), coordinate_check.scale_width(c)[1:]):
        assert (model.head_size, model.n_heads / model.n_kv_heads) == (
            c.head_size,
            c.n_heads / c.n_kv_heads,
        )
        assert (twice.d_model, twice.n_layers, twice.norm) == (
            2 * model.d_model,
            c.n_layers,
            c.norm,
        )
        assert abs(model.d_ff / model.d_model - c.d_ff / c.d_model) < 1 / model.d_model
    assert coordinate_check.scale_width(c)[0].d_model <= 128


def test_activations_of_other_widths_are_of_the_right_number(folder: Path) -> None:
    setup = planted_input(folder, config_of()).trial_setup
    check = coordinate_check.check_coordinates(dataclasses.replace(setup), 2)
    assert list(check.places) == ["stream", "attention", "feed-forward", "logits"]
    assert all(len(values) == 3 and min(values) > 0 for values in check.places.values())
