"""The learning rate of every step."""

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.schema import OptimizerConfig, ScheduleName
from glasslm.training.learning_rate import WSD_DECAY, lr_at

SCHEDULES = get_args(ScheduleName)


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimizerConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **settings})  # type: ignore[arg-type]
    return [lr_at(step, config, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_never_zero(schedule: str) -> None:
    assert rates(100, schedule=schedule)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_pieces_are_monotone(schedule: str) -> None:
    run = rates(100, schedule=schedule)
    assert max(run) == 1.0
    assert run[:10] == sorted(run[:10])
    assert run[9:] == sorted(run[9:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_last_step_has_min_lr(schedule: str) -> None:
    run = rates(100, schedule=schedule)
    assert run[-1] == 0.1
    assert run[-2] > 0.1


def test_constant_stays() -> None:
    assert set(rates(100, schedule="constant")[9:]) == {1.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_single_step_takes_the_peak(schedule: str) -> None:
    assert rates(1, schedule=schedule) == [1.0]


def test_cosine_is_half_way_in_the_middle() -> None:
    run = rates(101, warmup_steps=0)
    assert run[50] == pytest.approx(0.55)
    assert run[25] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)


def test_wsd_is_flat_and_then_falls_in_a_line_over_the_last_fifth() -> None:
    run = rates(100, schedule="wsd")
    fall = run[-round(100 * WSD_DECAY) - 1 :]
    assert set(run[9 : -len(fall)]) <= {1.0}
    steps = [a - b for a, b in pairwise(fall)]
    assert steps == pytest.approx([0.9 / 20] * 20)


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 500),
    schedule=st.sampled_from(SCHEDULES),
    low=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_run_has_rates_between_nothing_and_the_peak(
    steps: int, warmup: int, schedule: str, low: float
) -> None:
    """Also where the warmup is longer than the run: it is cut to half of it."""
    run = rates(steps, warmup_steps=warmup, schedule=schedule, min_lr=low)
    assert all(0 <= rate <= 1 + 1e-12 for rate in run)
    assert all(rate > 0 for rate in run[:-1])
    if steps != 2:
        assert max(run) == pytest.approx(1.0)
    if schedule != "constant" and steps > 1:
        assert run[-1] == low
