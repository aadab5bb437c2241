"""Weights of targets: factors of the gradient of each target's nats, of any sign."""

from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig, TrainConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch
from glasslm.model.parameters import initial_weights, parameter_table

V, B, T = 11, 4, 6
MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, block_size=T)


@pytest.fixture(params=["numpy", "torch"])
def engine(request: pytest.FixtureRequest) -> Any:
    """An engine in float64, with micro-batches of two rows."""
    if request.param == "torch":
        pytest.importorskip("torch")
    config = RunConfig(MODEL, train=TrainConfig(batch_size=B, micro_batch_size=2)).resolve()
    compute = ComputeConfig(engine=request.param, device="cpu", precision="fp64", threads=1)
    made = make_engine(config, V, compute, training=True)
    draw = np.random.default_rng(0)
    start = initial_weights(parameter_table(config.model, V), 0, np.float64)
    made.load((name, array + 0.3 * draw.standard_normal(array.shape)) for name, array in start)
    return made


@pytest.fixture
def batch() -> Batch:
    draw = np.random.default_rng(3)
    text = draw.integers(0, V, (B, T + 1))
    targets = text[:, 1:].copy()
    targets[1, 2:4] = -1
    return Batch(text[:, :-1], targets, 0, np.arange(B), draw.standard_normal((B, T)))


def gradients(engine: Any, batch: Batch) -> dict[str, Any]:
    return {name: array.copy() for name, array in engine.gradients(batch, 0.1).items()}


def test_the_gradient_is_the_weighted_sum_of_the_gradients_of_single_targets(
    engine: Any, batch: Batch
) -> None:
    assert batch.weights is not None
    expected: dict[str, Any] = {}
    for row, position in np.argwhere(batch.targets >= 0):
        targets = np.full((B, T), -1)
        targets[row, position] = batch.targets[row, position]
        single = gradients(engine, batch._replace(targets=targets, weights=None))
        for name, array in single.items():
            expected[name] = expected.get(name, 0) + batch.weights[row, position] * array
    for name, array in gradients(engine, batch).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_weights_of_one_change_no_bit_and_the_losses_stay_those_without_weights(
    engine: Any, batch: Batch
) -> None:
    plain, ones = batch._replace(weights=None), batch._replace(weights=np.ones((B, T)))
    first, second = gradients(engine, plain), gradients(engine, ones)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert engine.accumulate(batch, 0.1) == engine.accumulate(plain, 0.1)


def test_gradients_inside_the_model_are_weighted_too(engine: Any, batch: Batch) -> None:
    name = "gradient/blocks.0.attention.o.weight"
    inspected = engine.inspect(batch, [name])[name]
    valid = np.count_nonzero(batch.targets >= 0)
    direct = engine.gradients(batch, 1 / valid)[name.removeprefix("gradient/")]
    np.testing.assert_allclose(inspected, direct, rtol=1e-9, atol=1e-14)


def test_portions_of_a_batch_have_their_weights(batch: Batch) -> None:
    parts = list(batch.split(3))
    assert [len(part.tokens) for part in parts] == [3, 1]
    joined = np.concatenate([part.weights for part in parts if part.weights is not None])
    np.testing.assert_array_equal(joined, batch.weights)
    assert all(part.weights is None for part in batch._replace(weights=None).split(3))
