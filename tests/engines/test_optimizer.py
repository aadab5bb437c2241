"""The optimizers against float64 transcriptions of their papers; gradients that are not finite."""

import dataclasses
import math
from typing import Any, get_args

import numpy as np
import pytest

from glasslm.config.schema import (
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.numpy.optimizer import CHUNK_NUMBERS, adamw, orthogonalize, sgd
from glasslm.engines.protocol import Batch
from glasslm.model.parameters import initial_weights

Array = np.ndarray[Any, Any]
V = 11
MODEL = ModelConfig(
    d_model=16, n_layers=1, n_heads=2, block_size=6, norm="layernorm", bias=True, position="learned"
)
SETTINGS = OptimizerConfig(
    optimizer="adamw", lr=0.05, weight_decay=0.3, grad_clip=0.5, betas=(0.8, 0.95)
)


def build_engine(dtype: Any = np.float64, **settings: Any) -> NumpyEngine:
    optimizer = dataclasses.replace(SETTINGS, **settings)
    run = RunConfig(
        model=MODEL, optimizer=optimizer, train=TrainConfig(batch_size=2, micro_batch_size=2)
    ).resolve()
    engine = NumpyEngine(run, V, threads=1, dtype=dtype)
    engine.load(initial_weights(engine.table, 0, dtype))
    return engine


def make_batch(step: int) -> Batch:
    tokens = np.random.default_rng(step).integers(0, V, (2, 7))
    return Batch(tokens[:, :-1], tokens[:, 1:], step, np.arange(2))


def copy_state(engine: NumpyEngine) -> dict[str, Array]:
    return {name: array.copy() for name, array in engine.state()}


def test_adamw_over_ten_updates_equals_the_paper() -> None:
    """Algorithm 2 of arXiv:1711.05101, its schedule multiplier as our rate, after clipping."""
    engine = build_engine()
    theta = {name: array for name, array in copy_state(engine).items() if "/" not in name}
    m = {name: np.zeros_like(array) for name, array in theta.items()}
    v = {name: np.zeros_like(array) for name, array in theta.items()}
    beta1, beta2 = SETTINGS.betas
    clipped = 0
    for t in range(1, 11):
        g = {name: array.copy() for name, array in engine.gradients(make_batch(t), 1 / 12).items()}
        norm = math.sqrt(sum(float((array**2).sum()) for array in g.values()))
        scale = min(1, SETTINGS.grad_clip / norm)
        clipped += scale < 1
        rate = 0.05 / t
        for name in theta:
            gradient = g[name] * scale
            m[name] = beta1 * m[name] + (1 - beta1) * gradient
            v[name] = beta2 * v[name] + (1 - beta2) * gradient**2
            m_hat, v_hat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
            decay = 0.3 if name.startswith("blocks.") and theta[name].ndim == 2 else 0.0
            theta[name] = theta[name] - rate * (
                m_hat / (np.sqrt(v_hat) + 1e-8) + decay * theta[name]
            )
        engine.accumulate(make_batch(t), 1 / 12)
        update = engine.update(rate)
        assert update.norm == pytest.approx(norm, rel=1e-12)
        assert update.finite
        assert update.applied
    assert clipped > 0
    assert engine.updates == 10
    state = copy_state(engine)
    for name in theta:
        # A weight whose gradient is zero up to rounding has no direction: hence the atol.
        np.testing.assert_allclose(state[name], theta[name], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state[f"adamw.m/{name}"], m[name], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state[f"adamw.v/{name}"], v[name], rtol=1e-9, atol=1e-12)


def test_an_array_longer_than_a_chunk_is_updated_as_one() -> None:
    n = 2 * CHUNK_NUMBERS + 17
    g = np.random.default_rng(0).standard_normal(n)
    p, m, v = np.ones(n), np.zeros(n), np.zeros(n)
    adamw(p, g.copy(), m, v, t=1, lr=0.1, decay=0.0, betas=(0.9, 0.95), scale=1.0, eps=1e-8)
    # The first step has the size of the rate.
    np.testing.assert_allclose(p, 1 - 0.1 * g / (np.abs(g) + 1e-8), rtol=1e-12)


def test_sgd_with_momentum_over_five_updates() -> None:
    p, m = np.array([1.0, -2.0]), np.zeros(2)
    q, n = p.copy(), m.copy()
    for t in range(5):
        g = np.array([0.1 * t, 1.0])
        sgd(p, g.copy(), m, lr=0.1, decay=0.2, momentum=0.9, scale=0.5)
        n = 0.9 * n + 0.5 * g
        q = q - 0.1 * 0.2 * q - 0.1 * n
    np.testing.assert_allclose(p, q, rtol=1e-13)


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64), (1, 8), (352, 128)])
def test_orthogonalizing_keeps_the_directions_and_evens_out_the_lengths(
    shape: tuple[int, int],
) -> None:
    """The singular vectors are those of the matrix; the singular values are about 1."""
    g = np.random.default_rng(1).standard_normal(shape) * 1e-3
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    x = orthogonalize(g)
    in_basis = u.T @ x @ vt.T
    values = np.diag(in_basis)
    # Five steps do not raise values below about 0.01 of the norm; a square matrix may have some.
    large = np.linalg.svd(g, compute_uv=False) / np.linalg.norm(g) > 0.01
    assert (values[large] > 0.6).all()
    assert (values < 1.3).all()
    np.testing.assert_allclose(in_basis, np.diag(values), atol=1e-10)


def test_muon_moves_hidden_matrices_by_its_rule_and_the_rest_by_adamw() -> None:
    engine, second = (
        build_engine(optimizer="muon", grad_clip=0.0),
        build_engine(optimizer="adamw", grad_clip=0.0),
    )
    before = copy_state(engine)
    gradient = {
        name: array.copy() for name, array in engine.gradients(make_batch(0), 1 / 12).items()
    }
    for first in (engine, second):
        first.accumulate(make_batch(0), 1 / 12)
        first.update(0.05)
    after, by_adamw = copy_state(engine), copy_state(second)
    for name, row in engine.table.items():
        if row.group == "muon":
            g = gradient[name]
            step = 0.05 * 0.2 * math.sqrt(max(g.shape)) * orthogonalize(g + 0.95 * g)
            np.testing.assert_allclose(
                after[name], before[name] * (1 - 0.05 * 0.3) - step, rtol=1e-10, atol=1e-12
            )
            np.testing.assert_allclose(after[f"muon.m/{name}"], g, rtol=1e-12)
            assert f"adamw.m/{name}" not in after
        else:
            np.testing.assert_array_equal(after[name], by_adamw[name])


def test_muon_steps_have_the_size_of_adams() -> None:
    """Root mean square 0.2 x rate whatever the shape: arXiv:2502.16982, equation 4."""
    engine = build_engine(optimizer="muon", weight_decay=0.0)
    before = copy_state(engine)
    engine.accumulate(make_batch(0), 1 / 12)
    engine.update(1.0)
    for name, row in engine.table.items():
        if row.group == "muon":
            rms = np.sqrt(((engine.weights[name] - before[name]) ** 2).mean())
            assert 0.1 < rms < 0.3


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_norms_biases_and_embeddings_do_not_decay(optimizer: str) -> None:
    """With a gradient of exactly zero, decay alone changes a weight."""
    engine = build_engine(optimizer=optimizer)
    before = copy_state(engine)
    unpredicted = Batch(make_batch(0).tokens, np.full((2, 6), -1), 0, np.arange(2))
    engine.accumulate(unpredicted, 1.0)
    assert engine.update(0.1).norm == 0
    for name in engine.table:
        hidden = name.startswith("blocks.") and before[name].ndim == 2
        np.testing.assert_allclose(
            engine.weights[name], before[name] * (1 - 0.1 * 0.3 if hidden else 1), rtol=1e-12
        )


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_no_bit(optimizer: str, bad: float) -> None:
    engine = build_engine(np.float32, optimizer=optimizer)
    engine.accumulate(make_batch(0), 1 / 12)
    engine.update(0.01)
    before = copy_state(engine)
    with np.errstate(invalid="ignore", over="ignore"):
        engine.accumulate(make_batch(1), bad)
        update = engine.update(0.01)
    assert (update.finite, update.applied) == (False, False)
    assert engine.updates == 1
    assert_same_bits(copy_state(engine), before)

    # The next step gives the same bits as without the bad one.
    healthy = build_engine(np.float32, optimizer=optimizer)
    for step, first in ((0, healthy), (2, healthy), (2, engine)):
        first.accumulate(make_batch(step), 1 / 12)
        first.update(0.01)
    assert_same_bits(copy_state(engine), copy_state(healthy))


def test_a_gradient_that_overflows_only_when_squared_is_not_finite_either() -> None:
    engine = build_engine(np.float32)
    before = copy_state(engine)
    with np.errstate(over="ignore"):
        engine.accumulate(make_batch(0), 1e25)
        update = engine.update(0.01)
    assert not update.applied
    assert_same_bits(copy_state(engine), before)


def test_a_norm_above_the_limit_is_skipped_and_one_below_is_not() -> None:
    engine = build_engine()
    engine.accumulate(make_batch(0), 1 / 12)
    norm = engine.update(0.01).norm
    before = copy_state(engine)
    engine.accumulate(make_batch(0), 1 / 12)
    update = engine.update(0.01, skip_above=norm / 2)
    assert (update.finite, update.applied) == (True, False)
    assert_same_bits(copy_state(engine), before)
    engine.accumulate(make_batch(0), 1 / 12)
    assert engine.update(0.01, skip_above=2 * norm).applied
    assert engine.updates == 2


def assert_same_bits(first: dict[str, Array], second: dict[str, Array]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name
