"""Sampling.

The distribution against its definition, the draws against it and published Philox numbers.
"""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glasslm.errors import DivergedError, InputError
from glasslm.inference.sampling import (
    Sampling,
    log_probabilities,
    probabilities,
    sample_tokens,
    uniform_draw,
)

# Equal logits or clearly different ones, and shares that no sum of equals meets: rounding decides
# nothing here.
LOGITS = hnp.arrays(
    np.float32, st.integers(2, 40), elements=st.integers(-2000, 2000).map(lambda n: n / 100)
)
SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.0107, 0.3137, 0.8911, 1.0]),
    min_p=st.sampled_from([0.0, 0.0517, 0.513, 1.0]),
    repetition_penalty=st.sampled_from([0.8137, 1.0, 1.2931]),
    seed=st.integers(0, 2**64 - 1),
)


def sample_one(logits, sampling, position, sample=0, used_tokens=None, allowed=None):
    """The token chosen for a single text."""
    draws = [uniform_draw(sampling.seed, sample, position)]
    return int(sample_tokens(logits[None], sampling, draws, used_tokens, allowed)[0])


def reference_probabilities(logits, sampling, used_tokens, allowed):
    """The same distribution in plain Python, one token at a time, for temperatures above 0."""
    scores = {}
    for token, logit in enumerate(map(float, logits)):
        if used_tokens[token]:
            logit = (
                logit / sampling.repetition_penalty
                if logit > 0
                else logit * sampling.repetition_penalty
            )
        if allowed[token]:
            scores[token] = logit / sampling.temperature
    ranked = sorted(scores, key=lambda token: (-scores[token], token))
    ranked = ranked[: sampling.top_k or len(ranked)]
    weights = {token: math.exp(scores[token] - scores[ranked[0]]) for token in ranked}
    total = sum(weights.values())
    nucleus, share = [], 0.0
    for token in ranked:
        if share >= sampling.top_p:
            break
        nucleus.append(token)
        share += weights[token] / total
    remaining = [token for token in nucleus if weights[token] >= sampling.min_p]
    total = sum(weights[token] for token in remaining)
    return [weights[token] / total if token in remaining else 0.0 for token in range(len(logits))]


@given(LOGITS, SETTINGS, st.data())
def test_the_distribution_is_the_defined_one(logits, sampling, data):
    flags = st.lists(st.booleans(), min_size=len(logits), max_size=len(logits))
    used_tokens, allowed = np.array(data.draw(flags)), np.array(data.draw(flags))
    allowed[data.draw(st.integers(0, len(logits) - 1))] = True
    actual = probabilities(logits, sampling, used_tokens, allowed)
    assert actual.sum() == pytest.approx(1)
    assert not actual[~allowed].any()
    if sampling.temperature:
        np.testing.assert_allclose(
            actual, reference_probabilities(logits, sampling, used_tokens, allowed), atol=1e-12
        )
    assert actual[sample_one(logits, sampling, 3, 1, used_tokens, allowed[None])] > 0


@given(st.integers(1, 5), st.integers(2, 40), SETTINGS, st.data())
def test_what_a_row_says_does_not_depend_on_the_others(n, V, sampling, data):
    """Bit for bit: a text must not depend on what is written beside it."""
    elements = st.integers(-2000, 2000).map(lambda number: number / 100)
    logits = data.draw(hnp.arrays(np.float32, (n, V), elements=elements))
    used_tokens, allowed = data.draw(hnp.arrays(bool, (n, V))), data.draw(hnp.arrays(bool, (n, V)))
    allowed[np.arange(n), data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, V - 1)))] = True
    together = probabilities(logits, sampling, used_tokens, allowed)
    draws = [uniform_draw(sampling.seed, row, row) for row in range(n)]
    tokens = sample_tokens(logits, sampling, draws, used_tokens, allowed)
    logprobs = log_probabilities(logits)[np.arange(n), tokens]
    for row in range(n):
        alone = slice(row, row + 1)
        np.testing.assert_array_equal(
            together[row], probabilities(logits[row], sampling, used_tokens[row], allowed[row])
        )
        assert tokens[row] == sample_one(
            logits[row], sampling, row, row, used_tokens[row], allowed[alone]
        )
        assert logprobs[row] == log_probabilities(logits[row])[tokens[row]]


def test_each_filter_does_what_its_paper_says():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    plain = Sampling(temperature=1.0)
    assert probabilities(logits, plain) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert probabilities(logits, Sampling(temperature=0.5)) == pytest.approx(
        np.array([1, 16, 4, 9]) / 30
    )
    assert probabilities(logits, Sampling(temperature=1, top_k=2)) == pytest.approx(
        [0, 4 / 7, 0, 3 / 7]
    )
    assert probabilities(logits, Sampling(temperature=1, top_p=0.5)) == pytest.approx(
        [0, 4 / 7, 0, 3 / 7]
    )
    assert probabilities(logits, Sampling(temperature=1, min_p=0.6)) == pytest.approx(
        [0, 4 / 7, 0, 3 / 7]
    )
    assert probabilities(logits, Sampling(temperature=0)).tolist() == [0, 1, 0, 0]
    # CTRL, section 4.1: only the tokens of the text so far are discounted; a negative logit becomes
    # more negative
    used_tokens = np.array([False, True, True, False])
    penal = probabilities(
        np.array([1.0, 2.0, -1.0, 0.0]), Sampling(1.0, repetition_penalty=2.0), used_tokens
    )
    assert penal == pytest.approx(np.exp([1, 1, -2, 0]) / np.exp([1, 1, -2, 0]).sum())


def test_among_equals_the_lower_token_stays():
    equal = np.zeros(5, np.float32)
    assert np.flatnonzero(probabilities(equal, Sampling(1.0, top_k=2))).tolist() == [0, 1]
    assert np.flatnonzero(probabilities(equal, Sampling(1.0, top_p=0.5))).tolist() == [0, 1, 2]
    assert sample_one(equal, Sampling(0.0), 0) == 0


@given(LOGITS, st.floats(-5, 5))
def test_a_shift_of_all_logits_changes_nothing(logits, shift):
    sampling = Sampling(0.7, top_k=5, top_p=0.9, min_p=0.01)
    exact = logits.astype(np.float64).round(3)  # ties stay ties after the shift
    shifted = (exact + round(shift)).round(3)
    np.testing.assert_allclose(
        probabilities(exact, sampling), probabilities(shifted, sampling), atol=1e-9
    )


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 positions.

    The bound is beyond its distribution's 99.99% by Wilson and Hilferty.
    """
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32)
    sampling = Sampling(1.3, top_k=9, seed=7)
    expected = probabilities(logits, sampling)
    n = 20_000
    draws = [uniform_draw(sampling.seed, 0, position) for position in range(n)]
    counts = Counter(sample_tokens(np.tile(logits, (n, 1)), sampling, draws).tolist())
    assert set(counts) == set(np.flatnonzero(expected).tolist())
    chi2 = sum(
        (counts[token] - n * expected[token]) ** 2 / (n * expected[token]) for token in counts
    )
    df = len(counts) - 1
    assert chi2 < df * (1 - 2 / (9 * df) + 3.8 * math.sqrt(2 / (9 * df))) ** 3


def test_the_uniforms_are_philox():
    """Known answers of Random123 (kat_vectors, philox4x64 10); NumPy counts up before it draws."""
    ones = 2**64 - 1
    assert uniform_draw(0, 0, 2**256 - 1) == (0x16554D9ECA36314C >> 11) / 2**53
    assert uniform_draw(ones, ones, 2**256 - 2) == (0x87B092C3013FE90B >> 11) / 2**53


def test_the_uniforms_differ_by_seed_sample_and_position():
    draws = {
        uniform_draw(seed, sample, at)
        for seed in (0, 1, 2**64 - 1)
        for sample in range(5)
        for at in range(50)
    }
    assert len(draws) == 750
    assert all(0 <= draw < 1 for draw in draws)


def test_the_smallest_and_the_largest_uniform_find_a_token():
    assert sample_tokens(np.array([[-1e9, -1e9, 0.0, 1.0]]), Sampling(1.0), [0.0]) == [2]
    for n in range(1, 200):
        logits = np.random.default_rng(n).normal(size=n)
        logits[-1] = -1e9  # no probability
        assert sample_tokens(logits[None], Sampling(1.0), [1 - 2**-53])[0] < max(1, n - 1)


def test_top_p_of_zero_keeps_the_likeliest_token_alone() -> None:
    scores = np.array([0.1, 2.0, 2.0, -1.0])
    assert probabilities(scores, Sampling(1.0, top_p=0.0)).tolist() == [0, 1, 0, 0]


def test_log_probabilities_are_of_the_raw_logits():
    logits = np.array([3.0, 1.0, -2.0], np.float32)
    actual = log_probabilities(logits)
    assert np.exp(actual).sum() == pytest.approx(1)
    assert actual[0] - actual[2] == pytest.approx(5)
    assert log_probabilities(logits[None] + 1000)[0] == pytest.approx(actual)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
        {"top_p": -0.1},
        {"top_p": 1.1}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 1.5},
        {"repetition_penalty": 0.0}, {"repetition_penalty": 1e-320}, {"repetition_penalty": 1e300},
        {"repetition_penalty": math.inf}, {"repetition_penalty": math.nan},
        {"seed": -1}, {"seed": 2**64},
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(settings):
    (name,) = settings
    with pytest.raises(InputError, match=name):
        Sampling(**settings)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(DivergedError, match="finite"):
        probabilities(np.array([[0.0, 1.0, 2.0], [0.0, bad, 1.0]]), Sampling())
