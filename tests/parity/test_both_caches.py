"""The KV cache of the PyTorch engine against a pass over the whole text, and against NumPy's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from both_engines import (  # noqa: E402 - need PyTorch
    CASES,
    SINGLE,
    TOLERANCE,
    Array,
    V,
    assert_near,
    assert_within,
    make_pair,
)

from glasslm.config.schema import ModelConfig, Precision  # noqa: E402
from glasslm.lab.checks.gradient_check import small_model  # noqa: E402

BLOCK = small_model().block_size
TEXTS = np.random.default_rng(0).integers(0, V, (3, BLOCK))
WHOLE, FEW, FILL = [BLOCK] * 3, [4, 4, 4], [2, 2, 2]
# New tokens of each row, call by call. In the ragged ones the padding of a row that is nearly full
# is past the end of the cache, and in one of them a row begins with a call that reads nothing.
SCHEDULES = {
    "at once": [WHOLE],
    "in two": [FEW, FILL],
    "one by one": [[1, 1, 1]] * BLOCK,
    "ragged": [[2, 0, 1], [1, 3, 2], [1, 1, 1], [1, 1, 1], [1, 0, 1]],
    "past the end": [[5, 1, 0], [1, 4, 3], [0, 1, 3]],
    "side by side from unequal places": [[3, 1, 2], [1, 1, 1], [2, 2, 2]],
}
cases = pytest.mark.parametrize(("name", "model", "precision"), CASES)


def calls(schedule: str) -> Iterator[tuple[Array, Array, Array]]:
    """Tokens (3, T), padded, counts (3,), and how many tokens each row has read before."""
    read = np.zeros(3, np.int64)
    for counts in SCHEDULES[schedule]:
        tokens = np.full((3, max(counts)), V - 1)
        for row, count in enumerate(counts):
            tokens[row, :count] = TEXTS[row, read[row] : read[row] + count]
        yield tokens, np.array(counts), read.copy()
        read += counts


def uncached_log_probabilities(engine: Any) -> Array:
    """(3, BLOCK, V) log-probabilities by the pass of evaluation, for each next token in turn."""
    return -np.stack([engine.losses(TEXTS, np.full_like(TEXTS, v)) for v in range(V)], -1)


def log_softmax(logits: Array) -> Array:
    wide = logits - logits.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


@cases
def test_cached_equals_uncached(name: str, model: ModelConfig, precision: Precision) -> None:
    """In all schedules, after each row's last new token and after every one."""
    _, engine = make_pair(model, precision)
    expected = uncached_log_probabilities(engine)
    bound = TOLERANCE[precision] * np.abs(expected).max()
    for schedule in SCHEDULES:
        last, every = engine.new_cache(3, BLOCK), engine.new_cache(3, BLOCK)
        for tokens, counts, before in calls(schedule):
            np.testing.assert_array_equal(last.lengths, before)
            after_last = engine.logits(tokens, last, counts)
            after_each = engine.logits(tokens, every, counts, every=True)
            assert after_last.shape == (3, V)
            assert after_each.shape == (*tokens.shape, V)
            for row, count in enumerate(counts):
                right = expected[row, before[row] : before[row] + count]
                assert_within(log_softmax(after_each[row, :count]), right, bound)
                assert_within(log_softmax(after_last[row])[None][:count], right[-1:], bound)
        np.testing.assert_array_equal(last.lengths, np.sum(SCHEDULES[schedule], 0))


@cases
def test_both_engines_read_alike(name: str, model: ModelConfig, precision: Precision) -> None:
    """The logits themselves, not only their softmax."""
    by_numpy, by_torch = make_pair(model, precision)
    for schedule in SCHEDULES:
        caches = by_numpy.new_cache(3, BLOCK), by_torch.new_cache(3, BLOCK)
        for tokens, counts, _ in calls(schedule):
            expected = by_numpy.logits(tokens, caches[0], counts, every=True)
            actual = by_torch.logits(tokens, caches[1], counts, every=True)
            assert actual.dtype == expected.dtype
            for row, count in enumerate(counts):
                if count:
                    assert_near(
                        {"": actual[row, :count]}, {"": expected[row, :count]}, TOLERANCE[precision]
                    )
            np.testing.assert_array_equal(caches[1].lengths, caches[0].lengths)


@pytest.mark.parametrize(("name", "model"), SINGLE)
def test_a_cleared_row_starts_anew_and_the_others_go_on(name: str, model: ModelConfig) -> None:
    _, engine = make_pair(model, "fp64")
    expected = uncached_log_probabilities(engine)
    cache = engine.new_cache(2, BLOCK)
    engine.logits(TEXTS[:2, :5], cache, np.array([5, 5]))
    cache.clear(0)
    np.testing.assert_array_equal(cache.lengths, [0, 5])
    logits = engine.logits(np.array([[*TEXTS[2, :2]], [TEXTS[1, 5], 0]]), cache, np.array([2, 1]))
    np.testing.assert_allclose(log_softmax(logits[0]), expected[2, 1], atol=1e-10)
    np.testing.assert_allclose(log_softmax(logits[1]), expected[1, 5], atol=1e-10)


def test_the_contents_of_the_padding_do_not_matter() -> None:
    _, engine = make_pair(small_model(), "fp64")
    results = []
    for padding in (0, V - 1):
        cache = engine.new_cache(2, BLOCK)
        tokens = np.array([[1, 2, 3, 4], [5, padding, padding, padding]])
        engine.logits(tokens, cache, np.array([4, 1]))
        results.append(engine.logits(np.array([[1], [2]]), cache, np.array([1, 1])))
    np.testing.assert_array_equal(results[0], results[1])


def test_a_full_cache_refuses_more() -> None:
    _, engine = make_pair(small_model(), "fp64")
    cache = engine.new_cache(3, BLOCK)
    engine.logits(TEXTS, cache, np.array(WHOLE))
    with pytest.raises(AssertionError, match="room"):
        engine.logits(TEXTS[:, :1], cache, np.array([0, 0, 1]))


def test_the_lengths_are_a_copy() -> None:
    _, engine = make_pair(small_model(), "fp64")
    cache = engine.new_cache(2, BLOCK)
    cache.lengths[0] = 5
    np.testing.assert_array_equal(cache.lengths, [0, 0])


def test_reading_and_scoring_change_no_weight_and_no_moment() -> None:
    _, engine = make_pair(small_model(), "fp64")
    before = {name: array.tobytes() for name, array in engine.state()}
    engine.logits(TEXTS, engine.new_cache(3, BLOCK), np.array(WHOLE))
    engine.losses(TEXTS, TEXTS)
    assert {name: array.tobytes() for name, array in engine.state()} == before
    assert all(parameter.grad is None for parameter in engine.parameters.values())
