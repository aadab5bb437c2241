"""Precisions: float32 throughout, or narrow activations with float32 weights; the loss scale."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import ModelConfig, Precision
from glasslm.lab.checks.gradient_check import single_switches
from glasslm.model.parameters import initial_weights, parameter_table

torch = pytest.importorskip("torch")

from test_torch_engine import (  # noqa: E402 - needs PyTorch
    MODEL,
    OPTIMIZERS,
    B,
    T,
    V,
    assert_same_bits,
    batch,
    copy,
    engine_of,
    train,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from glasslm.engines.torch import precision as torch_precision  # noqa: E402
from glasslm.engines.torch.engine import TorchEngine  # noqa: E402
from glasslm.engines.torch.layers import RMSNorm1p  # noqa: E402
from glasslm.engines.torch.optimizer import orthogonalize  # noqa: E402
from glasslm.engines.torch.precision import MAX_LOSS_SCALE, TORCH_DTYPES  # noqa: E402

NARROW: dict[Any, Any] = {"bf16": torch.bfloat16, "fp16": torch.float16}
SWITCHES = [
    *single_switches(),
    (
        "dropout",
        dataclasses.replace(next(single_switches())[1], dropout=0.3, attention_dropout=0.3),
    ),
]


class DtypeCounter(TorchDispatchMode):
    """Counts operations, forward and backward, by the floating-point types of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and part.is_floating_point() and part.dim():
                self.counts[part.dtype] += 1
        return result


@contextmanager
def outputs_of_modules(engine: TorchEngine) -> Iterator[dict[str, Any]]:
    """The type of the first output of each module, by name."""
    dtypes: dict[str, Any] = {}

    def record(name: str, output: Any) -> None:
        dtypes[name] = (output[0] if isinstance(output, tuple) else output).dtype

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: record(name, output))
        for name, module in engine.model.named_modules()
    ]
    yield dtypes
    for hook in hooks:
        hook.remove()


def dtypes_of_all_methods(engine: TorchEngine, width: int) -> dict[str, Any]:
    """Call every method of an engine once; returns the types of all results."""
    small = batch(width=width)
    engine.accumulate(small, 1 / small.targets.size)
    gradients = {
        parameter.grad.dtype
        for parameter in engine.parameters.values()
        if parameter.grad is not None
    }
    engine.update(1e-2)
    cache = engine.new_cache(2, width)
    ragged = engine.logits(small.tokens[:2, :4], cache, np.array([4, 2]), every=True)
    single = engine.logits(small.tokens[:2, :1], cache, np.array([1, 1]))
    nats = engine.losses(small.tokens, small.targets)
    return {
        "weights": {parameter.dtype for parameter in engine.parameters.values()},
        "gradients": gradients,
        "moments": {moment.dtype for moment in engine.optimizer.moments.values()},
        "cache": {cache.keys.dtype, cache.values.dtype},
        "arrays": {
            array.dtype.name for array in (ragged, single, nats, *dict(engine.state()).values())
        },
        "finite": all(np.isfinite(array).all() for array in (single, nats)),
    }


@pytest.mark.parametrize(
    ("name", "model", "optimizer"),
    [
        *((*switch, "muon") for switch in SWITCHES),
        *(("small", MODEL, optimizer) for optimizer in OPTIMIZERS),
    ],
)
def test_a_float32_model_has_no_float64_anywhere(
    name: str, model: ModelConfig, optimizer: Any
) -> None:
    """Except for sums, which are single numbers."""
    engine = engine_of(model, optimizer=optimizer)
    with DtypeCounter() as dtypes:
        results = dtypes_of_all_methods(engine, model.block_size)
    assert dtypes.counts.keys() == {torch.float32}
    assert dtypes.counts[torch.float32] > 200
    master = {torch.float32}
    assert results == {
        "weights": master, "gradients": master, "moments": master, "cache": master,
        "arrays": {"float32"}, "finite": True,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "model"), SWITCHES)
@pytest.mark.parametrize("precision", NARROW)
def test_activations_are_narrow_and_the_rest_is_float32(
    name: str, model: ModelConfig, precision: Precision
) -> None:
    engine = engine_of(model, precision)
    with outputs_of_modules(engine) as outputs, DtypeCounter() as dtypes:
        results = dtypes_of_all_methods(engine, model.block_size)
    master, narrow = {torch.float32}, NARROW[precision]
    assert results == {
        "weights": master, "gradients": master, "moments": master, "cache": {narrow},
        "arrays": {"float32"}, "finite": True,
    }  # fmt: skip
    assert dtypes.counts.keys() == {torch.float32, narrow}
    wide = {name for name, dtype in outputs.items() if dtype != narrow}
    # The embedding is read from the weights. In routers a small difference changes the expert.
    routers = {name for name in outputs if name.endswith("router")}
    assert wide == {"embedding"} | routers
    assert {"blocks.0.attention.q", "blocks.0.attention_norm"} <= outputs.keys()
    assert any(name.endswith(".down") for name in outputs)


@pytest.mark.parametrize("precision", NARROW)
def test_a_gain_keeps_weights_that_half_precision_would_lose(precision: Precision) -> None:
    """1 + 2^-10 is 1 in bfloat16 (8 bits); 1 + 2^-12 is 1 in float16 (11 bits)."""
    dtype, small = NARROW[precision], {"bf16": 2**-10, "fp16": 2**-12}[precision]
    norm = RMSNorm1p(64, 1e-6)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.nn.init.constant_(norm.weight, small)
    exact = torch.nn.functional.rms_norm(x.double(), (64,), eps=1e-6) * (1 + small)
    y = norm(x)
    assert y.dtype == dtype
    error = (y.double() - exact).abs() / exact.abs()
    assert error.max() <= 1.01 * torch.finfo(dtype).eps / 2  # a single rounding


@pytest.mark.parametrize(("name", "model"), SWITCHES)
@pytest.mark.parametrize(("precision", "distance"), [("bf16", 0.03), ("fp16", 0.006)])
def test_narrow_losses_are_near_those_of_float32(
    name: str, model: ModelConfig, precision: Precision, distance: float
) -> None:
    """Within 0.03 and 0.006 nats per token, with weights far from their start.

    The gradients have nearly the same direction. Sandwich norms make each sublayer's output large
    beside the embedding, and gradients of weights that are further away hang on single roundings.
    """
    factor = 3 if model.norm_position == "sandwich" else 10
    start = initial_weights(parameter_table(model, V), 0)
    weights = {name: array * factor if array.ndim == 2 else array for name, array in start}
    master, narrow = engine_of(model), engine_of(model, precision)
    for engine in (master, narrow):
        engine.load(weights.items())
    narrow.loss_scale = min(narrow.loss_scale, 64.0)  # the gradients of such weights are large
    data = batch(width=model.block_size)
    nats, near = master.losses(*data[:2]), narrow.losses(*data[:2])
    assert 0 < np.abs(nats - near).max() < distance
    expected, actual = (
        np.concatenate(
            [array.ravel() for array in engine.gradients(data, 1 / data.targets.size).values()]
        )
        for engine in (master, narrow)
    )
    assert expected @ actual / (np.linalg.norm(expected) * np.linalg.norm(actual)) > 0.995
    assert np.linalg.norm(actual) == pytest.approx(np.linalg.norm(expected), rel=0.02)


@pytest.mark.parametrize("precision", NARROW)
def test_the_softmax_over_the_vocabulary_is_exact(precision: Precision) -> None:
    """The logits may be narrow; softmax computes in float32."""
    engine = engine_of(precision=precision)
    tokens, targets, *_ = batch()
    logits = engine.logits(tokens, engine.new_cache(B, T), np.full(B, T), every=True).astype(
        np.float64
    )
    nats = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(engine.losses(tokens, targets), nats, rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", NARROW)
def test_a_narrow_model_learns(precision: Precision, optimizer: Any) -> None:
    engine = engine_of(precision=precision, optimizer=optimizer)
    losses = []
    for _ in range(30):
        losses.append(engine.accumulate(batch(), 1 / (B * T)).cross_entropy)
        assert engine.update(3e-2).finite
    assert engine.updates > 25
    assert losses[0] == pytest.approx(np.log(V), abs=0.1)
    assert losses[-1] < 0.8 * losses[0]


def test_logits_through_a_narrow_cache_are_those_without() -> None:
    """To the three digits of bfloat16."""
    engine = engine_of(precision="bf16")
    prefill = engine.logits(batch().tokens, engine.new_cache(B, T), np.full(B, T), every=True)
    cache = engine.new_cache(B, T)
    for t in range(T):
        step = engine.logits(batch().tokens[:, t : t + 1], cache, np.ones(B, np.int64))
        np.testing.assert_allclose(step, prefill[:, t], rtol=0, atol=0.02 * np.abs(prefill).max())


# -- Muon's products -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_muon_multiplies_bfloat16_at_that_precision_only(precision: Precision) -> None:
    engine = engine_of(precision=precision, optimizer="muon")
    engine.accumulate(batch(), 1 / (B * T))
    with DtypeCounter() as dtypes:
        engine.update(1e-2)
    master = torch.float64 if precision == "fp64" else torch.float32
    assert dtypes.counts.keys() == {master} | ({torch.bfloat16} if precision == "bf16" else set())
    assert {moment.dtype for moment in engine.optimizer.moments.values()} == {master}


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 96, 40), (2, 40, 96)])
def test_products_of_bfloat16_even_out_singular_values_in_nearly_the_same_directions(
    shape: tuple[int, int, int],
) -> None:
    """Against singular value decompositions of matrices whose values span two decades.

    The update is within 5% of float32's.
    """
    draw = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=draw)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    values = torch.logspace(0, -2, min(shape[1:]))
    g = u * values @ vt * 1e-3
    exact, narrow = orthogonalize(g), orthogonalize(g.bfloat16()).float()
    in_basis = (u.mT @ narrow @ vt.mT).diagonal(dim1=1, dim2=2)
    assert ((in_basis > 0.65) & (in_basis < 1.25)).all()
    assert torch.linalg.svdvals(narrow).max() < 1.25
    assert (narrow - exact).norm() < 0.05 * exact.norm()
    assert not orthogonalize(torch.zeros(shape, dtype=torch.bfloat16)).any()


def test_a_run_in_bfloat16_continues_with_the_same_bits() -> None:
    whole, first, second = (engine_of(precision="bf16", optimizer="muon") for _ in range(3))
    train(whole, 4)
    train(first, 2)
    second.load(copy(first).items(), first.updates, first.loss_scale)
    train(second, 2, first=2)
    assert_same_bits(copy(second), copy(whole))


# -- the loss scale of float16 --------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_halves_the_scale_and_counts_as_finite(optimizer: Any) -> None:
    engine, healthy = (engine_of(precision="fp16", optimizer=optimizer) for _ in range(2))
    for trainee in (engine, healthy):
        train(trainee, 2)
    before = copy(engine)
    for halvings in (1, 2):
        engine.accumulate(batch(5), 1e6)  # times 65,536: more than float16 holds
        update = engine.update(1e-2)
        assert not np.isfinite(update.norm)
        assert (update.finite, update.applied) == (True, False)
        assert (engine.loss_scale, engine.updates) == (MAX_LOSS_SCALE / 2**halvings, 2)
        assert_same_bits(copy(engine), before)
    healthy.loss_scale /= 4
    for trainee in (engine, healthy):
        train(trainee, 2, first=2)
    assert_same_bits(copy(engine), copy(healthy))


def test_the_scale_falls_until_gradients_fit_and_is_divided_out() -> None:
    engine, master = engine_of(precision="fp16"), engine_of()
    engine.loss_scale = 2.0**30
    norms = []
    while not norms or not np.isfinite(norms[-1]):
        engine.accumulate(batch(), 1 / (B * T))
        norms.append(engine.update(1e-2).norm)
    assert 3 < len(norms) < 16
    assert engine.loss_scale == 2.0 ** (31 - len(norms))
    master.accumulate(batch(), 1 / (B * T))
    assert norms[-1] == pytest.approx(master.update(1e-2).norm, rel=0.01)
    gradient, wide = (
        engine.gradients(batch(1), 1 / (B * T)),
        master.gradients(batch(1), 1 / (B * T)),
    )
    for name, array in gradient.items():
        assert np.linalg.norm(array) == pytest.approx(np.linalg.norm(wide[name]), rel=0.05)


def test_at_scale_1_a_gradient_that_is_not_finite_counts_as_such() -> None:
    engine = engine_of(precision="fp16")
    engine.loss_scale = 1.0
    engine.accumulate(batch(), float("nan"))
    assert engine.update(1e-2)[1:] == (False, False)
    assert engine.loss_scale == 1.0


def test_the_scale_grows_again_after_many_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_precision, "SCALE_GROWTH_UPDATES", 3)
    engine = engine_of(precision="fp16")
    engine.loss_scale = MAX_LOSS_SCALE / 4
    scales = []
    for step in range(12):
        engine.accumulate(batch(step), 1 / (B * T))
        engine.update(1e-2)
        scales.append(engine.loss_scale / MAX_LOSS_SCALE)
    assert scales == [0.25, 0.25, *[0.5] * 3, *[1.0] * 7]  # its maximum


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_other_precisions_have_no_scale(precision: Precision) -> None:
    engine = engine_of(precision=precision)
    engine.load(engine_of().state(), updates=3, loss_scale=1024.0)
    train(engine, 1)
    assert engine.loss_scale == 1.0
    assert TORCH_DTYPES[precision] == engine.model.dtype


def test_the_scale_is_loaded() -> None:
    engine, loaded = engine_of(precision="fp16"), engine_of(precision="fp16")
    train(engine, 1)
    engine.loss_scale = 512.0
    loaded.load(copy(engine).items(), engine.updates, engine.loss_scale)
    assert loaded.loss_scale == 512.0
    loaded.load(copy(engine).items(), engine.updates, 1.0)
    assert loaded.loss_scale == MAX_LOSS_SCALE  # of a checkpoint that another precision wrote
