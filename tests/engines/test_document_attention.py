"""Attention inside documents: no logits depend on another document, in any path of both engines."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.documents import continued_starts, document_starts
from glasslm.engines.factory import make_engine
from glasslm.engines.numpy.attention import alibi_bias, attention
from glasslm.engines.numpy.flash import flash_attention
from glasslm.engines.positions import alibi_slopes
from glasslm.engines.protocol import Batch, Engine
from glasslm.engines.resources import is_torch_installed
from glasslm.model.parameters import initial_weights, parameter_table

B, T, V, END = 3, 17, 13, 4
ENGINES = ("numpy", "torch") if is_torch_installed() else ("numpy",)
BASE = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=12, block_size=T + 1,
    document_attention=True, document_end_id=END,
)  # fmt: skip


def make_tokens(seed: int = 0) -> np.ndarray:
    """(B, T + 1) tokens: three documents, one, and one with empty ones."""
    tokens = np.random.default_rng(seed).integers(0, V - 1, (B, T + 1))
    tokens[tokens == END] = V - 1
    tokens[0, [5, 12]] = END
    tokens[2, [0, 1, 9, 16]] = END
    return tokens


def engine_of(name: Any, **changes: Any) -> Engine:
    model = dataclasses.replace(BASE, **changes)
    config = RunConfig(
        model=model, optimizer=OptimizerConfig(optimizer="sgd"), train=TrainConfig(batch_size=B)
    ).resolve()
    compute = ComputeConfig(engine=name, device="cpu", precision="fp64", threads=1)
    engine = make_engine(config, V, compute, training=True)
    rng = np.random.default_rng(1)
    table = parameter_table(config.model, V)
    engine.load(
        (name, array + 0.3 * rng.standard_normal(array.shape))
        for name, array in initial_weights(table, 1)
    )
    return engine


def all_logits(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    rows = len(tokens)
    counts = np.full(rows, tokens.shape[1])
    return engine.logits(tokens, engine.new_cache(rows, tokens.shape[1]), counts, every=True)


def losses(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(engine.losses(tokens[:, :-1], tokens[:, 1:]))


PATHS: list[tuple[Any, dict[str, Any]]] = [
    (engine, {"attention": algorithm, "position": position, "window": window})
    for engine in ENGINES
    for algorithm in ("plain", "flash")
    for position in ("none", "rope", "alibi")
    for window in (0, 4)
]


@pytest.mark.parametrize(("name", "changes"), PATHS, ids=str)
def test_a_document_has_the_losses_that_it_has_alone(name: Any, changes: dict[str, Any]) -> None:
    """With relative positions a document may stand anywhere in a row."""
    engine, tokens = engine_of(name, **changes), make_tokens()
    together, cached = losses(engine, tokens), all_logits(engine, tokens[:, :-1])
    for row in range(B):
        ends = [int(i) for i in np.flatnonzero(tokens[row] == END)]
        for first, last in zip([0, *ends], [*ends, T], strict=True):
            if first == last:
                continue
            part = tokens[row : row + 1, first : last + 1]
            np.testing.assert_allclose(
                together[row, first:last], losses(engine, part)[0], rtol=1e-9, atol=1e-11
            )
            alone = all_logits(engine, part[:, :-1])[0]
            np.testing.assert_allclose(cached[row, first:last], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope"])
def test_no_logits_depend_on_another_document(name: Any, position: str) -> None:
    engine, tokens = engine_of(name, position=position), make_tokens()
    before, whole = (
        losses(engine, tokens),
        losses(engine_of(name, document_attention=False, position=position), tokens),
    )
    assert not np.allclose(before[0, 5:], whole[0, 5:])
    changed = tokens.copy()
    changed[0, :5] = (changed[0, :5] + 1) % 4
    after = losses(engine, changed)
    np.testing.assert_array_equal(after[0, 5:], before[0, 5:])
    np.testing.assert_array_equal(after[1:], before[1:])
    assert not np.allclose(after[0, :5], before[0, :5])


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("window", [0, 5])
def test_a_cache_gives_the_logits_of_the_whole_text(name: Any, window: int) -> None:
    engine = engine_of(name, window=window, position="rope")
    tokens = make_tokens()[:, :T]
    expected = all_logits(engine, tokens)
    cache = engine.new_cache(B, T)
    at = np.zeros(B, int)
    for counts in ([3, 0, 1], [1, 5, 1], [1, 1, 1], [6, 7, 8], [0, 1, 0], [1, 1, 1], [5, 2, 5]):
        portion = np.full((B, max(counts)), END)  # padding is no end of a document
        for row, count in enumerate(counts):
            portion[row, :count] = tokens[row, at[row] : at[row] + count]
        got = engine.logits(portion, cache, np.array(counts), every=True)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(
                got[row, :count], expected[row, at[row] : at[row] + count], rtol=1e-8, atol=1e-10
            )
        at += counts
    assert at.tolist() == [T] * B
    cache.clear(0)
    first = engine.logits(tokens[:, :3], cache, np.array([3, 0, 0]), every=True)
    np.testing.assert_allclose(first[0], expected[0, :3], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("attention_name", ["plain", "flash"])
@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_gradients_are_those_of_finite_differences(attention_name: str, position: str) -> None:
    engine: Any = engine_of("numpy", attention=attention_name, position=position)
    tokens = make_tokens()
    batch = Batch(tokens[:, :-1], tokens[:, 1:], 0, np.arange(B))
    gradients = {n: g.copy() for n, g in engine.gradients(batch, 1.0).items()}
    weights = {name: array.copy() for name, array in engine.state() if name in gradients}
    rng, h = np.random.default_rng(2), 1e-5
    for name, weight in weights.items():
        direction = rng.standard_normal(weight.shape)
        sums = []
        for sign in (1, -1):
            engine.load((weights | {name: weight + sign * h * direction}).items())
            sums.append(losses(engine, tokens).sum())
        slope = (sums[0] - sums[1]) / (2 * h)
        assert slope == pytest.approx(
            float((gradients[name] * direction).sum()), rel=1e-6, abs=1e-6
        )


@pytest.mark.parametrize("changes", [
    {}, {"window": 4}, {"position": "alibi"}, {"attention": "flash"}, {"position": "learned"},
    {"attention_dropout": 0.3, "dropout": 0.1}, {"attention_dropout": 0.3, "position": "alibi"},
], ids=str)  # fmt: skip
def test_the_engines_agree(changes: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    tokens = make_tokens()
    batch = Batch(tokens[:, :-1], tokens[:, 1:], 3, np.arange(B))
    by_hand, by_autograd = (engine_of(name, **changes) for name in ENGINES)
    expected: Any = by_hand
    ours, theirs = expected.gradients(batch, 0.1), by_autograd.gradients(batch, 0.1)  # type: ignore[attr-defined]
    assert ours.keys() == theirs.keys()
    scale = max(float(np.abs(g).max()) for g in ours.values())
    for name, gradient in ours.items():
        np.testing.assert_allclose(theirs[name], gradient, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("name", ENGINES)
def test_inspected_weights_are_zero_across_documents(name: Any) -> None:
    tokens = make_tokens()
    batch = Batch(tokens[:, :-1], tokens[:, 1:], 0, np.arange(B))
    site = "blocks.1.attention"
    arrays = engine_of(name).inspect(batch, [f"{site}.weights", f"{site}.scores"])
    weights = arrays[f"{site}.weights"]
    assert (weights[0, :, 5:12, :5] == 0).all()
    assert (weights[0, :, 5, 5] == 1).all()
    assert np.isinf(arrays[f"{site}.scores"][0, :, 12:, :12]).all()
    np.testing.assert_allclose(weights.sum(-1), 1)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # with and without a bound of the scores
def test_tiles_are_the_plain_attention(window: int, biased: bool, scale: float) -> None:
    rng, H, K, Q = np.random.default_rng(0), 4, 2, 6
    qk, v = scale * rng.standard_normal((B, T, H + K, Q)), rng.standard_normal((B, T, K, Q))
    dout = rng.standard_normal((B, T, H, Q))
    starts = document_starts(BASE, make_tokens()[:, :-1])
    slopes = alibi_slopes(H, np.float64) if biased else None
    bias = alibi_bias(slopes, np.arange(T), np.arange(T)) if slopes is not None else None
    plain, plain_back = attention(qk.copy(), v, bias, None, np.empty, window, starts)
    expected = plain_back(dout.copy())
    for tile in (2, 5, 128):
        tiled, tiled_back = flash_attention(qk.copy(), v, slopes, window, np.empty, tile, starts)
        np.testing.assert_allclose(tiled, plain, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(tiled_back(dout.copy()), expected, rtol=1e-8, atol=1e-9)


def test_starts_of_documents() -> None:
    tokens = np.array([[7, END, 3, 3, END, END, 2]])
    starts = document_starts(BASE, tokens)
    assert starts is not None
    assert starts.tolist() == [[0, 1, 1, 1, 4, 5, 5]]
    later = continued_starts(BASE, tokens, np.array([10]), np.array([3]), np.array([6]))
    assert later is not None
    assert later.tolist() == [[6, 11, 11, 11, 11, 11, 11]]  # after three tokens comes padding
    off = dataclasses.replace(BASE, document_attention=False)
    assert document_starts(off, tokens) is None
