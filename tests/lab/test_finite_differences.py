"""Finite differences: the size and the place of an error, points at a kink, NaN."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glasslm.lab.checks import finite_differences
from glasslm.lab.checks.finite_differences import TOLERANCE, check_gradients

Array = np.ndarray[Any, Any]


def check_function(
    value: Callable[[Array], float], slope: Callable[[Array], Array], x: Array, **options: Any
) -> Any:
    return check_gradients(
        "case",
        {"x": x},
        lambda: value(x),
        lambda: {"x": slope(x)},
        np.random.default_rng(0),
        **options,
    )


def test_it_says_how_wrong_and_where_and_restores_the_inputs() -> None:
    x = np.arange(6.0).reshape(2, 3) + 1
    before = x.copy()

    def wrong(x: Array) -> Array:
        g = 2 * x
        g[1, 2] *= 1.01
        return g

    finding = check_function(lambda x: float((x * x).sum()), wrong, x)
    assert finding.where == "x[1, 2]"
    assert finding.error == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert finding.elements == 6
    np.testing.assert_array_equal(x, before)
    assert check_function(lambda x: float((x * x).sum()), lambda x: 2 * x, x).error < 1e-9


def test_nan_does_not_pass() -> None:
    assert not check_function(
        lambda x: float((x * x).sum()), lambda x: np.where(x > 1, np.nan, 2 * x), np.ones(3) * 2
    ).passed


def test_a_point_at_a_kink_is_moved_and_counted() -> None:
    x = np.array([1.0, 1e-7, -1.0])  # between the two points of the difference

    def slope(x: Array) -> Array:
        return np.where(x > 0, 2.0, 0.0)

    finding = check_function(lambda x: float(2 * np.maximum(x, 0).sum()), slope, x, kinks=True)
    assert finding.passed
    assert finding.redrawn >= 1
    assert x[1] == 1e-7
    assert not check_function(lambda x: float(2 * np.maximum(x, 0).sum()), slope, x).passed


def test_a_large_third_derivative_is_not_taken_for_an_error() -> None:
    x = np.array([1.0])
    finding = check_function(
        lambda x: float(np.sin(300 * x).sum()), lambda x: 300 * np.cos(300 * x), x
    )
    assert finding.passed
    h = finite_differences.STEP_SIZE
    two_points = float(np.sin(300 * (1 + h)) - np.sin(300 * (1 - h))) / (2 * h)
    assert abs(two_points / (300 * np.cos(300)) - 1) > TOLERANCE


def test_a_sample_takes_that_many_elements() -> None:
    assert (
        check_function(
            lambda x: float((x * x).sum()), lambda x: 2 * x, np.ones(100), sample=7
        ).elements
        == 7
    )
