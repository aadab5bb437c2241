"""One model in both engines, with the same weights, and the tolerances of their results."""

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
# Relative to the largest entry of a tensor, or to FLOOR times the largest entry of all tensors.
TOLERANCE, FLOOR = {"fp64": 1e-10, "fp32": 1e-4}, 1e-3

SINGLE = list(single_switches())
MODELS = [*SINGLE, *combinations(25, seed=0)]
DROPPING = [
    (f"{name}, dropping", dataclasses.replace(model, dropout=0.3, attention_dropout=0.3))
    for name, model in SINGLE
    if model.attention != "flash"  # flash drops no probabilities
]
CASES = [
    *[(name, model, "fp64") for name, model in MODELS],
    *[(name, model, "fp32") for name, model in SINGLE],
]
TRAINED = [*CASES, *[(name, model, "fp64") for name, model in DROPPING]]
OPTIMIZERS = get_args(OptimizerName)


def make_pair(
    model: ModelConfig, precision: Precision, vocab_size: int = V, rows: int = B, **optimizer: Any
) -> tuple[NumpyEngine, TorchEngine]:
    """Both engines, two micro-batches a batch, with weights outside of all linear ranges."""
    train = TrainConfig(batch_size=rows, micro_batch_size=max(1, rows // 2))
    run = RunConfig(model=model, optimizer=OptimizerConfig(**optimizer), train=train).resolve()
    by_numpy = NumpyEngine(run, vocab_size, threads=1, dtype=DTYPES[precision])
    by_torch = TorchEngine(run, vocab_size, device="cpu", precision=precision, threads=1)
    weights = wide_weights(run.model, vocab_size, DTYPES[precision])
    for engine in (by_numpy, by_torch):
        engine.load(weights.items())
    return by_numpy, by_torch


def wide_weights(
    model: ModelConfig, vocab_size: int, dtype: Any, spread: float = 0.3
) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    start = initial_weights(parameter_table(model, vocab_size), 0)
    return {
        name: (array + spread * rng.standard_normal(array.shape)).astype(dtype)
        for name, array in start
    }


def make_batch(step: int = 3, vocab_size: int = V, rows: int = B, width: int = T) -> Batch:
    """Random tokens, and targets of which one is not predicted, for rows 5 and up of a step."""
    rng = np.random.default_rng(step)
    tokens, targets = (
        rng.integers(0, vocab_size, (rows, width)),
        rng.integers(0, vocab_size, (rows, width)),
    )
    targets[0, 2] = -1
    return Batch(tokens, targets, step, np.arange(rows) + 5)


def assert_losses_near(actual: Losses, expected: Losses, tolerance: float) -> None:
    assert actual.cross_entropy == pytest.approx(expected.cross_entropy, rel=tolerance)
    assert actual.auxiliary == pytest.approx(expected.auxiliary, rel=tolerance)
    assert (actual.experts is None) == (expected.experts is None)
    if expected.experts is not None:
        np.testing.assert_array_equal(actual.experts, expected.experts)


def copy_arrays(arrays: Any) -> dict[str, Array]:
    return {name: array.copy() for name, array in dict(arrays).items()}


def assert_near(
    actual: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float
) -> None:
    """Compare tensor by tensor: gradients, or weights and moments, each kind with its own floor."""
    assert actual.keys() == expected.keys()
    largest: dict[str, float] = {}
    for name, array in expected.items():
        kind = name.rpartition("/")[0]
        largest[kind] = max(largest.get(kind, 0.0), float(np.abs(array).max()))
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        bound = tolerance * max(
            float(np.abs(array).max()), FLOOR * largest[name.rpartition("/")[0]]
        )
        assert_within(actual[name], array, bound, name)


def assert_within(actual: Array, expected: Array, bound: float, name: str = "") -> None:
    """Compare two arrays; np.testing.assert_allclose, which is slow, only words the failure."""
    if actual.shape != expected.shape or not (np.abs(actual - expected) <= bound).all():
        np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, err_msg=name)
