"""The NumPy engine: threads, micro-batches, masked targets, dropout, state, float32 throughout."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_ops import float64_variables

from glasslm.config.conversion import with_flags
from glasslm.config.schema import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.choice import resolve_micro_batch_size
from glasslm.engines.factory import make_engine
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch, Engine
from glasslm.engines.resources import thread_count
from glasslm.errors import DamagedError
from glasslm.lab.checks.gradient_check import single_switches
from glasslm.model.parameters import initial_weights

Array = np.ndarray[Any, Any]
V, B, T = 13, 6, 8
MODEL = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, block_size=T, dropout=0.2, attention_dropout=0.1
)


def build_engine(
    model: ModelConfig = MODEL,
    micro: int = 2,
    threads: int = 1,
    dtype: Any = np.float32,
    optimizer: str = "muon",
) -> NumpyEngine:
    settings = OptimizerConfig(optimizer=optimizer)  # type: ignore[arg-type]
    train = TrainConfig(batch_size=B, micro_batch_size=micro)
    engine = NumpyEngine(
        RunConfig(model=model, optimizer=settings, train=train).resolve(), V, threads, dtype
    )
    engine.load(initial_weights(engine.table, 0, dtype))
    return engine


def make_batch(step: int = 0, rows: int = B, width: int = T) -> Batch:
    tokens = np.random.default_rng(step).integers(0, V, (rows, width + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], step, np.arange(rows))


def copy_state(engine: Engine) -> dict[str, Array]:
    return {name: array.copy() for name, array in engine.state()}


def assert_same_bits(first: dict[str, Array], second: dict[str, Array]) -> None:
    assert list(first) == list(second)
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert first[name].tobytes() == second[name].tobytes(), name


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_two_and_three_threads_give_the_same_bits(optimizer: str) -> None:
    """After five updates with dropout. Micro-batches, not threads, fix the order of additions."""
    results = []
    for threads in (1, 2, 3):
        engine = build_engine(threads=threads, optimizer=optimizer)
        losses = []
        for step in range(5):
            losses.append(engine.accumulate(make_batch(step), 1 / (B * T)))
            engine.update(1e-2)
        losses.append(float(engine.losses(make_batch(9).tokens, make_batch(9).targets).sum()))
        results.append((copy_state(engine), losses))
    for state, losses in results[1:]:
        assert_same_bits(state, results[0][0])
        assert losses == results[0][1]


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 5])
def test_the_size_of_micro_batches_changes_nothing_but_rounding(micro: int) -> None:
    """With dropout, whose mask belongs to a row; also where the last micro-batch is smaller."""
    whole, parts = (
        build_engine(micro=B, dtype=np.float64),
        build_engine(micro=micro, dtype=np.float64),
    )
    first, second = (engine.gradients(make_batch(), 1 / (B * T)) for engine in (whole, parts))
    for name in first:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-9, atol=1e-13)


def test_accumulating_twice_is_one_large_batch() -> None:
    """The rows keep their indices in the step's batch, and with them their dropout."""
    whole, twice = build_engine(dtype=np.float64), build_engine(dtype=np.float64)
    full = make_batch()
    loss = whole.accumulate(full, 1 / (B * T)).cross_entropy
    halves = [
        Batch(full.tokens[rows], full.targets[rows], 0, full.rows[rows])
        for rows in (slice(0, 2), slice(2, B))
    ]
    assert sum(
        twice.accumulate(half, 1 / (B * T)).cross_entropy for half in halves
    ) == pytest.approx(loss, rel=1e-12)
    whole_update, twice_update = whole.update(1e-2), twice.update(1e-2)
    assert twice_update.norm == pytest.approx(whole_update.norm, rel=1e-10)
    for name, array in whole.state():
        np.testing.assert_allclose(dict(twice.state())[name], array, rtol=1e-7, atol=1e-10)


def test_an_update_forgets_its_gradients() -> None:
    engine, second = build_engine(), build_engine()
    engine.accumulate(make_batch(0), 1 / (B * T))
    engine.update(1e-2)
    second.load(list(copy_state(engine).items()), engine.updates)
    for first in (engine, second):
        first.accumulate(make_batch(1), 1 / (B * T))
        first.update(1e-2)
    assert_same_bits(copy_state(engine), copy_state(second))


def test_dropout_depends_on_seed_step_and_row_alone() -> None:
    def loss(step: int = 0, row: int = 0, row_count: int = 3, seed: int = 42) -> float:
        engine = build_engine(micro=1)
        engine.config = dataclasses.replace(
            engine.config, train=dataclasses.replace(engine.config.train, seed=seed)
        )
        tokens = np.tile(make_batch().tokens[:1], (row_count, 1))
        targets = np.full_like(tokens, -1)
        targets[0] = make_batch().targets[0]
        rows = np.arange(row_count) + 10
        rows[0] = row
        return engine.accumulate(Batch(tokens, targets, step, rows), 1.0).cross_entropy

    base = loss()
    assert loss() == loss(row_count=1) == base
    assert len({base, loss(step=1), loss(row=1), loss(seed=43)}) == 4


# -- masked targets --------------------------------------------------------------------------------


def test_targets_of_minus_one_are_ignored() -> None:
    """A padded row gives the loss and the gradient of the text without its padding."""
    model = dataclasses.replace(
        MODEL, dropout=0.0, attention_dropout=0.0, norm="layernorm", bias=True
    )
    engine = build_engine(model, dtype=np.float64)
    full = make_batch(rows=2)
    targets = full.targets.copy()
    targets[:, 5:] = -1
    with_padding = engine.gradients(Batch(full.tokens, targets, 0, full.rows), 0.1)
    padded = {name: array.copy() for name, array in with_padding.items()}
    shorter = engine.gradients(Batch(full.tokens[:, :5], full.targets[:, :5], 0, full.rows), 0.1)
    for name in shorter:
        np.testing.assert_allclose(padded[name], shorter[name], rtol=1e-9, atol=1e-14)
    nats = engine.losses(full.tokens, targets)
    np.testing.assert_array_equal(nats[:, 5:], 0)
    np.testing.assert_allclose(
        nats[:, :5], engine.losses(full.tokens[:, :5], full.targets[:, :5]), rtol=1e-12
    )


def test_the_loss_is_the_weighted_sum_of_the_nats_and_starts_at_log_vocabulary() -> None:
    engine = build_engine(dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0))
    nats = engine.losses(make_batch().tokens, make_batch().targets)
    assert nats.shape == (B, T)
    assert engine.accumulate(make_batch(), 0.25).cross_entropy == pytest.approx(
        0.25 * float(nats.sum()), rel=1e-5
    )
    assert float(nats.mean()) == pytest.approx(np.log(V), abs=0.1)


def test_texts_shorter_than_the_context_are_accepted() -> None:
    for _, config in single_switches():
        engine = build_engine(config)
        assert np.isfinite(engine.accumulate(make_batch(rows=1, width=1), 1.0).cross_entropy)


# -- float32 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), list(single_switches()))
def test_a_float32_model_has_no_float64_anywhere(name: str, config: ModelConfig) -> None:
    """Weights, moments, gradients, logits, caches, and every local variable of the engine."""
    engine = build_engine(config)
    small = make_batch(width=config.block_size)
    with float64_variables() as wide:
        engine.accumulate(small, 1 / small.targets.size)
        engine.update(1e-2)
        cache = engine.new_cache(2, config.block_size)
        logits = engine.logits(small.tokens[:2, :4], cache, np.array([4, 2]), every=True)
        first = engine.logits(small.tokens[:2, :1], cache, np.array([1, 1]))
        nats = engine.losses(small.tokens, small.targets)
    assert {array.dtype for array in (logits, first, nats)} == {np.dtype(np.float32)}
    assert {array.dtype for _, array in engine.state()} == {np.dtype(np.float32)}
    assert {array.dtype for array in engine.gradients(small, 1.0).values()} == {
        np.dtype(np.float32)
    }
    numbers = [array for array in vars(cache).values() if np.asarray(array).dtype.kind == "f"]
    assert {array.dtype for array in numbers} == {np.dtype(np.float32)}
    assert wide == []


def test_float32_and_float64_agree_within_rounding() -> None:
    narrow, wide = (
        build_engine(dtype=dtype).gradients(make_batch(), 1 / (B * T))
        for dtype in (np.float32, np.float64)
    )
    largest = max(np.abs(array).max() for array in wide.values())
    for name in wide:
        assert np.abs(narrow[name] - wide[name]).max() <= 1e-4 * max(
            np.abs(wide[name]).max(), 1e-3 * largest
        )


def test_a_second_step_takes_no_new_memory() -> None:
    """Of the buffer pool, which holds all large arrays."""
    engine = build_engine()
    allocated = []
    for step in range(4):
        engine.accumulate(make_batch(step), 1 / (B * T))
        engine.update(1e-2)
        allocated.append(engine._buffers.allocated_bytes)
    assert allocated[0] > 0
    assert allocated[1:] == allocated[:1] * 3


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_state_and_load_are_a_round_trip(optimizer: str) -> None:
    """Weights and moments by name: the next update gives the same bits."""
    engine, second = build_engine(optimizer=optimizer), build_engine(optimizer=optimizer)
    for step in range(3):
        engine.accumulate(make_batch(step), 1 / (B * T))
        engine.update(1e-2)
    second.load(list(copy_state(engine).items()), engine.updates)
    assert second.updates == 3
    assert_same_bits(copy_state(second), copy_state(engine))
    for first in (engine, second):
        first.accumulate(make_batch(3), 1 / (B * T))
        first.update(1e-2)
    assert_same_bits(copy_state(second), copy_state(engine))


def test_the_names_of_the_state_are_those_of_the_table_and_the_optimizers() -> None:
    engine = build_engine()
    names = [name for name, _ in engine.state()]
    weights = list(engine.table)
    assert names[: len(weights)] == weights
    moments = names[len(weights) :]
    assert {name.partition("/")[0] for name in moments} == {"muon.m", "adamw.m", "adamw.v"}
    assert {name.partition("/")[2] for name in moments} == set(weights)


def test_loading_weights_alone_forgets_the_moments() -> None:
    engine, fresh = build_engine(), build_engine()
    engine.accumulate(make_batch(), 1 / (B * T))
    engine.update(1e-2)
    engine.load(initial_weights(engine.table, 0))
    assert engine.updates == 0
    for first in (engine, fresh):
        first.accumulate(make_batch(), 1 / (B * T))
        first.update(1e-2)
    assert_same_bits(copy_state(engine), copy_state(fresh))


def damaged_state(kind: str) -> Iterator[tuple[str, Array]]:
    for name, array in initial_weights(build_engine().table, 1):
        if name == "blocks.1.attention.q.weight":
            if kind == "missing":
                continue
            if kind == "renamed":
                name = "blocks.1.attention.query.weight"
            if kind == "reshaped":
                array = array[:, :-1]
        yield name, array
    if kind == "extra":
        yield "blocks.2.norm.weight", np.zeros(16, np.float32)
    if kind == "moment":
        yield "adamw.m/blocks.0.attention_norm.weight", np.zeros(17, np.float32)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("missing", "blocks.1.attention.q.weight"),
        ("renamed", "blocks.1.attention.query.weight"),
        ("reshaped", "blocks.1.attention.q.weight"),
        ("extra", "blocks.2.norm.weight"),
        ("moment", "adamw.m/blocks.0.attention_norm.weight"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_by_name_and_nothing_is_loaded(
    kind: str, named: str
) -> None:
    engine = build_engine()
    before = copy_state(engine)
    with pytest.raises(DamagedError, match=named):
        engine.load(damaged_state(kind))
    assert_same_bits(copy_state(engine), before)


def test_make_engine_obeys_precision_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(model=MODEL)
    for precision, dtype in (("auto", np.float32), ("fp32", np.float32), ("fp64", np.float64)):
        engine = make_engine(config, V, ComputeConfig(precision=precision, threads=1))  # type: ignore[arg-type]
        assert {array.dtype for _, array in engine.state()} == {np.dtype(dtype)}
    monkeypatch.setenv("GLASSLM_THREADS", "3")
    assert thread_count(0) == 3
    assert thread_count(2) == 2
    monkeypatch.delenv("GLASSLM_THREADS")
    assert thread_count(0) >= 1


def test_a_micro_batch_is_at_most_half_of_the_batch_so_that_two_threads_have_work() -> None:
    run = RunConfig(model=ModelConfig(block_size=64), train=TrainConfig(batch_size=4)).resolve()
    assert resolve_micro_batch_size(run, "numpy") == 2
    # Never more than the batch.
    assert resolve_micro_batch_size(with_flags(run, {"micro_batch_size": 9}), "numpy") == 4
    # About 1,024 tokens.
    long = with_flags(run, {"block_size": 512, "batch_size": 64})
    assert resolve_micro_batch_size(long, "numpy") == 2
