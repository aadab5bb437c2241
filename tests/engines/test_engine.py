"""The NumPy engine's verbs: threads, micro-batches, masked targets, dropout, state, and float32 throughout."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_ops import wide_variables

from glasslm.config.conversion import with_flags
from glasslm.config.schema import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.choice import micro_batch_size, thread_count
from glasslm.engines.factory import make_engine
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch, Engine
from glasslm.errors import DamagedError
from glasslm.lab.checks.gradient_check import single_switches
from glasslm.model.parameters import initial_weights

Array = np.ndarray[Any, Any]
V, B, T = 13, 6, 8
MODEL = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, block_size=T, dropout=0.2, attention_dropout=0.1
)


def engine_of(
    model: ModelConfig = MODEL,
    micro: int = 2,
    threads: int = 1,
    dtype: Any = np.float32,
    optimizer: str = "muon",
) -> NumpyEngine:
    settings = OptimizerConfig(optimizer=optimizer)  # type: ignore[arg-type]
    train = TrainConfig(batch_size=B, micro_batch_size=micro)
    engine = NumpyEngine(
        RunConfig(model=model, optimizer=settings, train=train).resolved(), V, threads, dtype
    )
    engine.load(initial_weights(engine.rows, 0, dtype))
    return engine


def batch(step: int = 0, rows: int = B, width: int = T) -> Batch:
    tokens = np.random.default_rng(step).integers(0, V, (rows, width + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], step, np.arange(rows))


def copy(engine: Engine) -> dict[str, Array]:
    return {name: array.copy() for name, array in engine.state()}


def assert_same_bits(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].tobytes() == other[name].tobytes(), name


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_two_and_three_threads_give_the_same_bits(optimizer: str) -> None:
    """After five updates with dropout; the micro-batches, not the threads, decide what is added in which order."""
    results = []
    for threads in (1, 2, 3):
        engine = engine_of(threads=threads, optimizer=optimizer)
        losses = []
        for step in range(5):
            losses.append(engine.accumulate(batch(step), 1 / (B * T)))
            engine.update(1e-2)
        losses.append(float(engine.losses(batch(9).tokens, batch(9).targets).sum()))
        results.append((copy(engine), losses))
    for state, losses in results[1:]:
        assert_same_bits(state, results[0][0])
        assert losses == results[0][1]


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 5])
def test_the_size_of_micro_batches_changes_nothing_but_rounding(micro: int) -> None:
    """With dropout, whose mask is a row's own; also where the last micro-batch is smaller."""
    whole, parts = engine_of(micro=B, dtype=np.float64), engine_of(micro=micro, dtype=np.float64)
    one, other = (engine.gradients(batch(), 1 / (B * T)) for engine in (whole, parts))
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-9, atol=1e-13)


def test_accumulating_twice_is_one_large_batch() -> None:
    """The rows keep their indices in the step's batch, and with them their dropout."""
    whole, twice = engine_of(dtype=np.float64), engine_of(dtype=np.float64)
    full = batch()
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
    engine, other = engine_of(), engine_of()
    engine.accumulate(batch(0), 1 / (B * T))
    engine.update(1e-2)
    other.load(list(copy(engine).items()), engine.updates)
    for one in (engine, other):
        one.accumulate(batch(1), 1 / (B * T))
        one.update(1e-2)
    assert_same_bits(copy(engine), copy(other))


def test_dropout_depends_on_seed_step_and_row_alone() -> None:
    def loss(step: int = 0, row: int = 0, beside: int = 3, seed: int = 42) -> float:
        engine = engine_of(micro=1)
        engine.config = dataclasses.replace(
            engine.config, train=dataclasses.replace(engine.config.train, seed=seed)
        )
        tokens = np.tile(batch().tokens[:1], (beside, 1))
        targets = np.full_like(tokens, -1)
        targets[0] = batch().targets[0]
        rows = np.arange(beside) + 10
        rows[0] = row
        return engine.accumulate(Batch(tokens, targets, step, rows), 1.0).cross_entropy

    base = loss()
    assert loss() == loss(beside=1) == base
    assert len({base, loss(step=1), loss(row=1), loss(seed=43)}) == 4


# -- what is counted --------------------------------------------------------------------------------------------------


def test_targets_of_minus_one_are_not_there() -> None:
    """A padded row gives the loss and the gradient of the text without its padding."""
    model = dataclasses.replace(
        MODEL, dropout=0.0, attention_dropout=0.0, norm="layernorm", bias=True
    )
    engine = engine_of(model, dtype=np.float64)
    full = batch(rows=2)
    targets = full.targets.copy()
    targets[:, 5:] = -1
    with_padding = engine.gradients(Batch(full.tokens, targets, 0, full.rows), 0.1)
    padded = {name: array.copy() for name, array in with_padding.items()}
    cut = engine.gradients(Batch(full.tokens[:, :5], full.targets[:, :5], 0, full.rows), 0.1)
    for name in cut:
        np.testing.assert_allclose(padded[name], cut[name], rtol=1e-9, atol=1e-14)
    nats = engine.losses(full.tokens, targets)
    np.testing.assert_array_equal(nats[:, 5:], 0)
    np.testing.assert_allclose(
        nats[:, :5], engine.losses(full.tokens[:, :5], full.targets[:, :5]), rtol=1e-12
    )


def test_the_loss_is_the_weighted_sum_of_the_nats_and_starts_at_the_logarithm_of_the_vocabulary() -> (
    None
):
    engine = engine_of(dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0))
    nats = engine.losses(batch().tokens, batch().targets)
    assert nats.shape == (B, T)
    assert engine.accumulate(batch(), 0.25).cross_entropy == pytest.approx(
        0.25 * float(nats.sum()), rel=1e-5
    )
    assert float(nats.mean()) == pytest.approx(np.log(V), abs=0.1)


def test_shorter_texts_than_the_context_are_fine() -> None:
    for _, config in single_switches():
        engine = engine_of(config)
        assert np.isfinite(engine.accumulate(batch(rows=1, width=1), 1.0).cross_entropy)


# -- float32 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), list(single_switches()))
def test_a_float32_model_has_no_float64_anywhere(name: str, config: ModelConfig) -> None:
    """Weights, moments, gradients, logits, caches, and every local variable of the engine on the way."""
    engine = engine_of(config)
    small = batch(width=config.block_size)
    with wide_variables() as wide:
        engine.accumulate(small, 1 / small.targets.size)
        engine.update(1e-2)
        cache = engine.new_cache(2, config.block_size)
        logits = engine.logits(small.tokens[:2, :4], cache, np.array([4, 2]), every=True)
        one = engine.logits(small.tokens[:2, :1], cache, np.array([1, 1]))
        nats = engine.losses(small.tokens, small.targets)
    assert {array.dtype for array in (logits, one, nats)} == {np.dtype(np.float32)}
    assert {array.dtype for _, array in engine.state()} == {np.dtype(np.float32)}
    assert {array.dtype for array in engine.gradients(small, 1.0).values()} == {
        np.dtype(np.float32)
    }
    numbers = [array for array in vars(cache).values() if np.asarray(array).dtype.kind == "f"]
    assert {array.dtype for array in numbers} == {np.dtype(np.float32)}
    assert wide == []


def test_float32_and_float64_agree_within_rounding() -> None:
    narrow, wide = (
        engine_of(dtype=dtype).gradients(batch(), 1 / (B * T)) for dtype in (np.float32, np.float64)
    )
    largest = max(np.abs(array).max() for array in wide.values())
    for name in wide:
        assert np.abs(narrow[name] - wide[name]).max() <= 1e-4 * max(
            np.abs(wide[name]).max(), 1e-3 * largest
        )


def test_a_second_step_takes_no_new_memory() -> None:
    """Of the arena's, which holds all that is large."""
    engine = engine_of()
    taken = []
    for step in range(4):
        engine.accumulate(batch(step), 1 / (B * T))
        engine.update(1e-2)
        taken.append(engine._memory.bytes)
    assert taken[0] > 0
    assert taken[1:] == taken[:1] * 3


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_state_and_load_are_a_round_trip(optimizer: str) -> None:
    """Weights and moments, under their names: the next update has the same bits."""
    engine, other = engine_of(optimizer=optimizer), engine_of(optimizer=optimizer)
    for step in range(3):
        engine.accumulate(batch(step), 1 / (B * T))
        engine.update(1e-2)
    other.load(list(copy(engine).items()), engine.updates)
    assert other.updates == 3
    assert_same_bits(copy(other), copy(engine))
    for one in (engine, other):
        one.accumulate(batch(3), 1 / (B * T))
        one.update(1e-2)
    assert_same_bits(copy(other), copy(engine))


def test_the_names_of_the_state_are_those_of_the_table_and_the_optimizers() -> None:
    engine = engine_of()
    names = [name for name, _ in engine.state()]
    weights = list(engine.rows)
    assert names[: len(weights)] == weights
    moments = names[len(weights) :]
    assert {name.partition("/")[0] for name in moments} == {"muon.m", "adamw.m", "adamw.v"}
    assert {name.partition("/")[2] for name in moments} == set(weights)


def test_loading_weights_alone_forgets_the_moments() -> None:
    engine, fresh = engine_of(), engine_of()
    engine.accumulate(batch(), 1 / (B * T))
    engine.update(1e-2)
    engine.load(initial_weights(engine.rows, 0))
    assert engine.updates == 0
    for one in (engine, fresh):
        one.accumulate(batch(), 1 / (B * T))
        one.update(1e-2)
    assert_same_bits(copy(engine), copy(fresh))


def spoiled(kind: str) -> Iterator[tuple[str, Array]]:
    for name, array in initial_weights(engine_of().rows, 1):
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
def test_what_does_not_fit_is_refused_by_name_and_loads_nothing(kind: str, named: str) -> None:
    engine = engine_of()
    before = copy(engine)
    with pytest.raises(DamagedError, match=named):
        engine.load(spoiled(kind))
    assert_same_bits(copy(engine), before)


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


def test_a_micro_batch_is_no_more_than_half_of_what_there_is_for_two_threads_to_have_work() -> None:
    run = RunConfig(model=ModelConfig(block_size=64), train=TrainConfig(batch_size=4)).resolved()
    assert micro_batch_size(run, "numpy") == 2
    assert (
        micro_batch_size(with_flags(run, {"micro_batch_size": 9}), "numpy") == 4
    )  # never more than there is
    assert (
        micro_batch_size(with_flags(run, {"block_size": 512, "batch_size": 64}), "numpy") == 2
    )  # about 1,024 tokens
