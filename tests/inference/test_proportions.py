"""Proportions and their Wilson intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from glasslm.inference.proportions import Proportion, TokenProportion


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


def test_the_interval_of_tokens_is_over_texts() -> None:
    """Half of the texts are all right, as when a model copies or does not."""
    share = TokenProportion((7,) * 25 + (0,) * 24 + (3,), 7)
    shares = np.array(share.counts) / 7
    expected = ttest_1samp(shares, 0).confidence_interval()
    assert share.interval == pytest.approx((expected.low, expected.high))
    texts = Proportion(25, 50).interval
    assert share.interval == pytest.approx(texts, abs=0.03)
    assert (share.facts["count"], share.facts["of"]) == (178, 350)


def test_the_interval_of_tokens_holds_the_true_share() -> None:
    """Where each of 50 texts is all right or all wrong; one of all tokens holds it in 10%."""
    draws = 127 * (np.random.default_rng(0).random((200, 50)) < 0.5)
    intervals = [TokenProportion(tuple(row.tolist()), 127).interval for row in draws]
    assert 0.9 < np.mean([low <= 0.5 <= high for low, high in intervals]) < 0.99


@pytest.mark.parametrize("count", [0, 9])
def test_tokens_that_are_all_alike_have_the_interval_of_the_texts(count: int) -> None:
    share = TokenProportion((count,) * 50, 9)
    assert share.interval == Proportion(50 * count // 9, 50).interval
    assert str(share) == str(Proportion(50 * count // 9, 50))
