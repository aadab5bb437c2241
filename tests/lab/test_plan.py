"""Plans for a compute: the rule, the optimum of the law, and warnings."""

from __future__ import annotations

import math

import pytest
from law_runs import SMALL, runs

from glasslm.errors import InputError
from glasslm.lab.scaling.law import Observation
from glasslm.lab.scaling.plan import extrapolation_warning, plan_compute, repetition_warning
from glasslm.lab.scaling.uncertainty import bootstrap


def test_a_plan_spends_its_compute_and_finds_the_law_s_optimum() -> None:
    boot = bootstrap(runs(SMALL, noise=0.003))
    planned = plan_compute(5e15, boot)
    assert planned.fitted is not None
    assert planned.N_opt is not None
    assert planned.fitted.loss is not None
    assert planned.rule.loss is not None
    for choice in (planned.rule, planned.fitted):
        assert pytest.approx(5e15 / (6 * choice.N)) == choice.D
    assert planned.rule.tokens_per_parameter == pytest.approx(20)
    assert pytest.approx(math.sqrt(5e15 / 120)) == planned.rule.N
    assert SMALL.N_opt(5e15) in planned.N_opt
    assert planned.fitted.loss.value < planned.rule.loss.value
    assert planned.warning is None
    warning = plan_compute(1.21e16, boot).warning
    assert warning is not None
    assert "10.1 times the largest compute" in warning


def test_a_plan_without_a_fit_is_the_rule() -> None:
    """Chinchilla itself: 70B parameters and 1.4T tokens for 5.88e23 FLOPs."""
    planned = plan_compute(5.88e23)
    assert pytest.approx(1.4e12) == planned.rule.D
    assert planned.rule.tokens_per_parameter == pytest.approx(20)
    assert (planned.fitted, planned.N_opt, planned.warning) == (None, None, None)
    with pytest.raises(InputError, match="compute is 0"):
        plan_compute(0)


def test_extrapolation_and_repetition_are_said() -> None:
    assert extrapolation_warning(1e16, 1e15) is None
    assert "20 times" in (extrapolation_warning(2e16, 1e15) or "")
    observations = [Observation(1e5, D, 2.0, seed=seed) for D in (1e6, 4e6, 8e6) for seed in (0, 1)]
    assert repetition_warning(observations, 1e6).startswith(
        "1 of 3 cells went more than 4 times over the 1,000,000 tokens"
    )
    assert "up to 8.0 times" in repetition_warning(observations, 1e6)
    assert repetition_warning(observations, 2e6) == ""
