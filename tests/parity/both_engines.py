"""One model in both engines, with the same weights, and how near each other their numbers must be."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest

from glasslm.config.schema import (
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    Precision,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch, Losses
from glasslm.engines.torch.engine import TorchEngine
from glasslm.lab.checks.gradient_check import B, T, V, combinations, single_switches
from glasslm.model.parameters import initial_weights, parameter_table

Array = np.ndarray[Any, Any]

DTYPES = {"fp64": np.float64, "fp32": np.float32}
# Of a tensor's largest entry; a tensor of small numbers is measured by the largest of all, times the floor.
TOLERANCE, FLOOR = {"fp64": 1e-10, "fp32": 1e-4}, 1e-3

SINGLE = list(single_switches())
MODELS = [*SINGLE, *combinations(25, seed=0)]
DROPPING = [
    (f"{name}, dropping", dataclasses.replace(model, dropout=0.3, attention_dropout=0.3))
    for name, model in SINGLE
    if model.attention != "flash"  # which drops no probabilities
]
CASES = [
    *[(name, model, "fp64") for name, model in MODELS],
    *[(name, model, "fp32") for name, model in SINGLE],
]
TRAINED = [*CASES, *[(name, model, "fp64") for name, model in DROPPING]]
OPTIMIZERS = get_args(OptimizerName)


def pair(
    model: ModelConfig, precision: Precision, vocab_size: int = V, rows: int = B, **optimizer: Any
) -> tuple[NumpyEngine, TorchEngine]:
    """Both engines, two micro-batches a batch, with weights so large that nothing is near its linear range."""
    train = TrainConfig(batch_size=rows, micro_batch_size=max(1, rows // 2))
    run = RunConfig(model=model, optimizer=OptimizerConfig(**optimizer), train=train).resolved()
    one = NumpyEngine(run, vocab_size, threads=1, dtype=DTYPES[precision])
    other = TorchEngine(run, vocab_size, device="cpu", precision=precision, threads=1)
    weights = wide_weights(run.model, vocab_size, DTYPES[precision])
    for engine in (one, other):
        engine.load(weights.items())
    return one, other


def wide_weights(
    model: ModelConfig, vocab_size: int, dtype: Any, by: float = 0.3
) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    start = initial_weights(parameter_table(model, vocab_size), 0)
    return {
        name: (array + by * rng.standard_normal(array.shape)).astype(dtype) for name, array in start
    }


def batch(step: int = 3, vocab_size: int = V, rows: int = B, width: int = T) -> Batch:
    """Random tokens, and targets of which one is not predicted. The rows are not the first of their step."""
    rng = np.random.default_rng(step)
    tokens, targets = (
        rng.integers(0, vocab_size, (rows, width)),
        rng.integers(0, vocab_size, (rows, width)),
    )
    targets[0, 2] = -1
    return Batch(tokens, targets, step, np.arange(rows) + 5)


def assert_losses_near(found: Losses, expected: Losses, tolerance: float) -> None:
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=tolerance)
    assert found.auxiliary == pytest.approx(expected.auxiliary, rel=tolerance)
    assert (found.experts is None) == (expected.experts is None)
    if expected.experts is not None:
        np.testing.assert_array_equal(found.experts, expected.experts)


def copy(arrays: Any) -> dict[str, Array]:
    return {name: array.copy() for name, array in dict(arrays).items()}


def assert_near(
    found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float
) -> None:
    """Tensor by tensor: gradients, or weights and moments, each kind with its own floor."""
    assert found.keys() == expected.keys()
    largest: dict[str, float] = {}
    for name, array in expected.items():
        kind = name.rpartition("/")[0]
        largest[kind] = max(largest.get(kind, 0.0), float(np.abs(array).max()))
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        bound = tolerance * max(
            float(np.abs(array).max()), FLOOR * largest[name.rpartition("/")[0]]
        )
        assert_within(found[name], array, bound, name)


def assert_within(found: Array, expected: Array, bound: float, name: str = "") -> None:
    """np.testing.assert_allclose takes longer than what it compares here: it is left to say what is wrong."""
    if found.shape != expected.shape or not (np.abs(found - expected) <= bound).all():
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=name)
