"""The key-value cache of the PyTorch engine computes what a pass over the whole text does, and what NumPy's does."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from both_engines import CASES, SINGLE, TOLERANCE, Array, V, assert_near, assert_within, pair  # noqa: E402 - need PyTorch

from glasslm.config.schema import ModelConfig, Precision  # noqa: E402
from glasslm.data.tokenizers import CharTokenizer  # noqa: E402
from glasslm.inference.generation import generate, visible  # noqa: E402
from glasslm.inference.sampling import Sampling  # noqa: E402
from glasslm.lab.checks.gradient_check import small_model  # noqa: E402

BLOCK = small_model().block_size
TEXTS = np.random.default_rng(0).integers(0, V, (3, BLOCK))
WHOLE, FEW, FILL = [BLOCK] * 3, [4, 4, 4], [2, 2, 2]
# New tokens of each row, call by call. In the ragged ones the padding of a row that is nearly full points past the
# end of the cache, and in one of them a row reads nothing before it has read anything.
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


def uncached(engine: Any) -> Array:
    """(3, BLOCK, V) log-probabilities by the pass of evaluation, one candidate for each next token at a time."""
    return -np.stack([engine.losses(TEXTS, np.full_like(TEXTS, v)) for v in range(V)], -1)


def log_softmax(logits: Array) -> Array:
    wide = logits - logits.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


@cases
def test_cached_equals_uncached(name: str, model: ModelConfig, precision: Precision) -> None:
    """In all schedules, after each row's last new token and after every one."""
    _, engine = pair(model, precision)
    expected = uncached(engine)
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
    """The logits themselves, not only what softmax makes of them."""
    one, other = pair(model, precision)
    for schedule in SCHEDULES:
        caches = one.new_cache(3, BLOCK), other.new_cache(3, BLOCK)
        for tokens, counts, _ in calls(schedule):
            expected = one.logits(tokens, caches[0], counts, every=True)
            found = other.logits(tokens, caches[1], counts, every=True)
            assert found.dtype == expected.dtype
            for row, count in enumerate(counts):
                if count:
                    assert_near(
                        {"": found[row, :count]}, {"": expected[row, :count]}, TOLERANCE[precision]
                    )
            np.testing.assert_array_equal(caches[1].lengths, caches[0].lengths)


@pytest.mark.parametrize(("name", "model"), SINGLE)
def test_a_cleared_row_starts_anew_and_the_others_go_on(name: str, model: ModelConfig) -> None:
    _, engine = pair(model, "fp64")
    expected = uncached(engine)
    cache = engine.new_cache(2, BLOCK)
    engine.logits(TEXTS[:2, :5], cache, np.array([5, 5]))
    cache.clear(0)
    np.testing.assert_array_equal(cache.lengths, [0, 5])
    logits = engine.logits(np.array([[*TEXTS[2, :2]], [TEXTS[1, 5], 0]]), cache, np.array([2, 1]))
    np.testing.assert_allclose(log_softmax(logits[0]), expected[2, 1], atol=1e-10)
    np.testing.assert_allclose(log_softmax(logits[1]), expected[1, 5], atol=1e-10)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    _, engine = pair(small_model(), "fp64")
    results = []
    for padding in (0, V - 1):
        cache = engine.new_cache(2, BLOCK)
        tokens = np.array([[1, 2, 3, 4], [5, padding, padding, padding]])
        engine.logits(tokens, cache, np.array([4, 1]))
        results.append(engine.logits(np.array([[1], [2]]), cache, np.array([1, 1])))
    np.testing.assert_array_equal(results[0], results[1])


def test_a_full_cache_refuses_more() -> None:
    _, engine = pair(small_model(), "fp64")
    cache = engine.new_cache(3, BLOCK)
    engine.logits(TEXTS, cache, np.array(WHOLE))
    with pytest.raises(AssertionError, match="room"):
        engine.logits(TEXTS[:, :1], cache, np.array([0, 0, 1]))


def test_the_lengths_are_a_copy() -> None:
    _, engine = pair(small_model(), "fp64")
    cache = engine.new_cache(2, BLOCK)
    cache.lengths[0] = 5
    np.testing.assert_array_equal(cache.lengths, [0, 0])


def test_reading_and_scoring_change_no_weight_and_no_moment() -> None:
    _, engine = pair(small_model(), "fp64")
    before = {name: array.tobytes() for name, array in engine.state()}
    engine.logits(TEXTS, engine.new_cache(3, BLOCK), np.array(WHOLE))
    engine.losses(TEXTS, TEXTS)
    assert {name: array.tobytes() for name, array in engine.state()} == before
    assert all(parameter.grad is None for parameter in engine.parameters.values())


# -- text past the context --------------------------------------------------------------------------------------------

LETTERS = CharTokenizer("abcdefg")
PROMPTS = ["b", "cage", "fadedbeefcafe"]  # shorter than the context, and longer
LENGTH = 2 * BLOCK + 3
LEARNED_WINDOW = [  # positions that end at the context, so that a window does not make them roll
    (f"{position}, window 3", dataclasses.replace(small_model(), position=position, window=3))
    for position in ("learned", "sinusoidal")
]


def afresh(engine: Any, prompt: str, model: ModelConfig) -> str:
    """Greedy text without a cache: each token from a pass over all that the model sees of those before."""
    ids = LETTERS.encode(prompt).tolist()
    for _ in range(LENGTH):
        seen = ids if model.has_rolling_cache else ids[len(ids) - visible(len(ids), model.block_size) :]
        candidates = np.full((V, len(seen)), -1)
        candidates[:, -1] = np.arange(V)
        ids.append(int(engine.losses(np.tile(seen, (V, 1)), candidates)[:, -1].argmin()))
    return LETTERS.decode(ids[len(prompt) :])


@pytest.mark.parametrize(("name", "model"), [*SINGLE, *LEARNED_WINDOW])
def test_greedy_text_is_the_same_token_for_token(name: str, model: ModelConfig) -> None:
    """With and without a cache, in both engines, of unequal prompts alone and together, until far past the context."""
    engines = pair(model, "fp64")
    expected = [afresh(engines[0], prompt, model) for prompt in PROMPTS]
    settings: Any = {"block_size": BLOCK, "rolling": model.has_rolling_cache, "max_new_tokens": LENGTH}
    for engine in engines:
        for prompts in (PROMPTS, *([prompt] for prompt in PROMPTS)):
            written = dict.fromkeys(range(len(prompts)), "")
            for piece in generate(
                engine, LETTERS, prompts, sampling=Sampling(temperature=0.0), **settings
            ):
                written[piece.prompt] += piece.text
            assert list(written.values()) == [expected[PROMPTS.index(prompt)] for prompt in prompts]
