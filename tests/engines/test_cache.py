"""The KV cache gives the results of a pass over the whole text, for every switch."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import ModelConfig, RunConfig, TrainConfig
from glasslm.engines.numpy.engine import CACHE_ROWS_PER_THREAD, NumpyEngine
from glasslm.lab.checks.gradient_check import combinations, single_switches, small_model
from glasslm.model.parameters import initial_weights

Array = np.ndarray[Any, Any]
V, BLOCK = 7, 6
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-4}
TEXTS = np.random.default_rng(0).integers(0, V, (3, BLOCK))
MODELS = [*single_switches(), *combinations(6, seed=1)]


def build_engine(config: ModelConfig, dtype: Any = np.float64) -> NumpyEngine:
    run = RunConfig(model=config, train=TrainConfig(micro_batch_size=8)).resolve()
    engine = NumpyEngine(run, V, threads=1, dtype=dtype)
    rng = np.random.default_rng(0)
    # Far from the initial weights, so that attention is sharp and a wrong mask or position shows.
    engine.load(
        (name, w + 0.5 * rng.standard_normal(w.shape))
        for name, w in initial_weights(engine.table, 0)
    )
    return engine


def uncached_log_probabilities(engine: NumpyEngine, tokens: Array) -> Array:
    """(B, T, V) log-probabilities by the forward pass of training, for each next token in turn."""
    return -np.stack([engine.losses(tokens, np.full_like(tokens, v)) for v in range(V)], -1)


def log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("name", "config"), MODELS)
def test_cached_equals_uncached(name: str, config: ModelConfig, dtype: Any) -> None:
    """In portions of unequal length for each row, one of them empty, and then token by token."""
    engine = build_engine(config, dtype)
    expected = uncached_log_probabilities(engine, TEXTS)
    bound = TOLERANCE[dtype] * np.abs(expected).max()
    cache = engine.new_cache(3, BLOCK)
    for counts in ([2, 0, 1], [1, 3, 2], [1, 1, 1], [1, 1, 1], [1, 0, 1]):
        before, width = cache.lengths, max(counts)
        tokens = np.full((3, width), V - 1)
        for row, count in enumerate(counts):
            tokens[row, :count] = TEXTS[row, before[row] : before[row] + count]
        logits = engine.logits(tokens, cache, np.array(counts))
        assert logits.shape == (3, V)
        np.testing.assert_array_equal(cache.lengths, before + counts)
        for row in np.flatnonzero(counts).tolist():
            np.testing.assert_allclose(
                log_softmax(logits[row]), expected[row, cache.lengths[row] - 1], rtol=0, atol=bound
            )
    np.testing.assert_array_equal(cache.lengths, [6, 5, 6])


@pytest.mark.parametrize(("name", "config"), MODELS)
def test_every_gives_the_logits_after_each_position(name: str, config: ModelConfig) -> None:
    engine = build_engine(config)
    expected = uncached_log_probabilities(engine, TEXTS)
    cache = engine.new_cache(3, BLOCK)
    first = engine.logits(TEXTS[:, :4], cache, np.array([4, 4, 4]), every=True)
    rest = engine.logits(TEXTS[:, 4:], cache, np.array([2, 2, 2]), every=True)
    assert first.shape == (3, 4, V)
    log_probabilities = log_softmax(np.concatenate([first, rest], 1))
    np.testing.assert_allclose(
        log_probabilities, expected, rtol=0, atol=1e-10 * np.abs(expected).max()
    )


@pytest.mark.parametrize(("name", "config"), MODELS)
def test_greedy_text_is_the_same_token_for_token(name: str, config: ModelConfig) -> None:
    engine = build_engine(config)
    prompts = TEXTS[:, :1]
    uncached = prompts
    while uncached.shape[1] < BLOCK:
        uncached = np.concatenate(
            [uncached, uncached_log_probabilities(engine, uncached)[:, -1:].argmax(-1)], 1
        )
    cache = engine.new_cache(3, BLOCK)
    cached, new = prompts, prompts
    while cached.shape[1] < BLOCK:
        new = engine.logits(new, cache, np.ones(3, np.int64)).argmax(-1)[:, None]
        cached = np.concatenate([cached, new], 1)
    np.testing.assert_array_equal(cached, uncached)


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_a_cleared_row_starts_anew_and_the_others_go_on(position: str) -> None:
    engine = build_engine(dataclasses.replace(small_model(), position=position))  # type: ignore[arg-type]
    expected = uncached_log_probabilities(engine, TEXTS)
    cache = engine.new_cache(2, BLOCK)
    engine.logits(TEXTS[:2, :4], cache, np.array([4, 4]))
    cache.clear(0)
    np.testing.assert_array_equal(cache.lengths, [0, 4])
    logits = engine.logits(
        np.array([[TEXTS[2, 0], TEXTS[2, 1]], [TEXTS[1, 4], 0]]), cache, np.array([2, 1])
    )
    np.testing.assert_allclose(log_softmax(logits[0]), expected[2, 1], atol=1e-10)
    np.testing.assert_allclose(log_softmax(logits[1]), expected[1, 4], atol=1e-10)


def test_the_contents_of_the_padding_do_not_matter() -> None:
    engine = build_engine(small_model())
    results = []
    for padding in (0, V - 1):
        cache = engine.new_cache(2, BLOCK)
        tokens = np.array([[1, 2, 3, 4], [5, padding, padding, padding]])
        engine.logits(tokens, cache, np.array([4, 1]))
        results.append(engine.logits(np.array([[1], [2]]), cache, np.array([1, 1])))
    np.testing.assert_array_equal(results[0], results[1])


def test_the_lengths_are_a_copy() -> None:
    cache = build_engine(small_model()).new_cache(2, BLOCK)
    cache.lengths[0] = 5
    np.testing.assert_array_equal(cache.lengths, [0, 0])


def test_computing_logits_changes_no_weight_and_no_moment() -> None:
    engine = build_engine(small_model())
    before = {name: array.tobytes() for name, array in engine.state()}
    engine.logits(TEXTS, engine.new_cache(3, BLOCK), np.full(3, BLOCK))
    engine.losses(TEXTS, TEXTS)
    assert {name: array.tobytes() for name, array in engine.state()} == before


def test_many_rows_are_read_in_parts_that_do_not_depend_on_the_threads() -> None:
    config = ModelConfig(d_model=16, n_layers=2, n_heads=2, block_size=8)
    run = RunConfig(model=config, train=TrainConfig(micro_batch_size=8)).resolve()
    rng = np.random.default_rng(0)
    rows = 2 * CACHE_ROWS_PER_THREAD + 3
    tokens, counts = rng.integers(0, 7, (rows, 4)), rng.integers(0, 5, rows)
    results = []
    for threads in (1, 3):
        engine = NumpyEngine(run, 7, threads=threads)
        engine.load(initial_weights(engine.table, 0))
        cache = engine.new_cache(rows, 8)
        first = engine.logits(tokens, cache, counts)
        results.append((first, engine.logits(tokens[:, :1], cache, np.ones(rows, np.int64))))
        assert (cache.lengths == counts + 1).all()
    for first, second in zip(*results):
        assert (first[counts > 0] == second[counts > 0]).all()
    for row in (0, CACHE_ROWS_PER_THREAD, rows - 1):
        single = engine.new_cache(1, 8)
        if counts[row]:
            engine.logits(tokens[row : row + 1, : counts[row]], single, counts[row : row + 1])
        again = engine.logits(tokens[row : row + 1, :1], single, np.ones(1, np.int64))
        np.testing.assert_allclose(again[0], results[0][1][row], rtol=0, atol=1e-5)
