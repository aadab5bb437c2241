"""Proportions and their Wilson intervals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from glasslm.inference.proportions import Proportion


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(counts: tuple[int, int]) -> None:
    low, high = Proportion(*counts).interval
    scipys = binomtest(*counts).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((scipys.low, scipys.high), abs=1e-12)
    assert 0 <= low <= Proportion(*counts).value <= high <= 1


def test_none_and_all_have_exact_ends() -> None:
    assert {Proportion(0, n).interval[0] for n in range(1, 400)} == {0.0}
    assert {Proportion(n, n).interval[1] for n in range(1, 400)} == {1.0}


def test_a_total_of_zero_has_no_value() -> None:
    assert Proportion(0, 0).interval == (0, 1)
    assert str(Proportion(0, 0)) == "-"
    assert math.isnan(Proportion(0, 0).facts["share"])
