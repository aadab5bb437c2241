"""What is computed in which type: float32 throughout, or narrow activations over float32 weights; the loss scale."""

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

from glasslm.engines.torch import engine as torch_engine  # noqa: E402
from glasslm.engines.torch.engine import LARGEST_SCALE, TorchEngine  # noqa: E402

NARROW: dict[Any, Any] = {"bf16": torch.bfloat16, "fp16": torch.float16}
SWITCHES = [
    *single_switches(),
    (
        "dropping",
        dataclasses.replace(next(single_switches())[1], dropout=0.3, attention_dropout=0.3),
    ),
]


class Types(TorchDispatchMode):
    """Counts the operations, forward and backward, by the floating types of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and part.is_floating_point() and part.dim():
                self.seen[part.dtype] += 1
        return result


@contextmanager
def outputs_of_modules(engine: TorchEngine) -> Iterator[dict[str, Any]]:
    """The type of what each module returns, first."""
    found: dict[str, Any] = {}

    def note(name: str, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).dtype

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name, module in engine.model.named_modules()
    ]
    yield found
    for hook in hooks:
        hook.remove()


def use(engine: TorchEngine, width: int) -> dict[str, Any]:
    """All that an engine does, once; the types of what it gives out."""
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
    one = engine.logits(small.tokens[:2, :1], cache, np.array([1, 1]))
    nats = engine.losses(small.tokens, small.targets)
    return {
        "weights": {parameter.dtype for parameter in engine.parameters.values()},
        "gradients": gradients,
        "moments": {moment.dtype for moment in engine.optimizer.moments.values()},
        "cache": {cache.keys.dtype, cache.values.dtype},
        "arrays": {
            array.dtype.name for array in (ragged, one, nats, *dict(engine.state()).values())
        },
        "finite": all(np.isfinite(array).all() for array in (one, nats)),
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
    """In none of its operations, but for sums that are single numbers."""
    engine = engine_of(model, optimizer=optimizer)
    with Types() as types:
        found = use(engine, model.block_size)
    assert types.seen.keys() == {torch.float32}
    assert types.seen[torch.float32] > 200
    exact = {torch.float32}
    assert found == {
        "weights": exact, "gradients": exact, "moments": exact, "cache": exact, "arrays": {"float32"}, "finite": True
    }  # fmt: skip


@pytest.mark.parametrize(("name", "model"), SWITCHES)
@pytest.mark.parametrize("precision", NARROW)
def test_activations_are_narrow_and_the_rest_is_float32(
    name: str, model: ModelConfig, precision: Precision
) -> None:
    engine = engine_of(model, precision)
    with outputs_of_modules(engine) as outputs, Types() as types:
        found = use(engine, model.block_size)
    exact, narrow = {torch.float32}, NARROW[precision]
    assert found == {
        "weights": exact, "gradients": exact, "moments": exact, "cache": {narrow}, "arrays": {"float32"}, "finite": True
    }  # fmt: skip
    assert types.seen.keys() == {torch.float32, narrow}
    wide = {name for name, dtype in outputs.items() if dtype != narrow}
    routers = {
        name for name in outputs if name.endswith("router")
    }  # where a small difference sends a token elsewhere
    assert wide == {"embedding"} | routers  # the first is looked up in the weights
    assert {"blocks.0.attention.q", "blocks.0.attention_norm"} <= outputs.keys()
    assert any(name.endswith(".down") for name in outputs)


@pytest.mark.parametrize(("name", "model"), SWITCHES)
@pytest.mark.parametrize(("precision", "distance"), [("bf16", 0.03), ("fp16", 0.006)])
def test_narrow_losses_are_near_those_of_float32(
    name: str, model: ModelConfig, precision: Precision, distance: float
) -> None:
    """Within 0.03 and 0.006 nats a token, at weights far from their start, and with a gradient that points alike."""
    start = initial_weights(parameter_table(model, V), 0)
    weights = {name: array * 10 if array.ndim == 2 else array for name, array in start}
    exact, narrow = engine_of(model), engine_of(model, precision)
    for engine in (exact, narrow):
        engine.load(weights.items())
    narrow.loss_scale = min(narrow.loss_scale, 64.0)  # the gradients of such weights are large
    some = batch(width=model.block_size)
    nats, near = exact.losses(*some[:2]), narrow.losses(*some[:2])
    assert 0 < np.abs(nats - near).max() < distance
    one, other = (
        np.concatenate(
            [array.ravel() for array in engine.gradients(some, 1 / some.targets.size).values()]
        )
        for engine in (exact, narrow)
    )
    assert one @ other / (np.linalg.norm(one) * np.linalg.norm(other)) > 0.995
    assert np.linalg.norm(other) == pytest.approx(np.linalg.norm(one), rel=0.02)


@pytest.mark.parametrize("precision", NARROW)
def test_the_softmax_over_the_vocabulary_is_exact(precision: Precision) -> None:
    """Its logits may be narrow: what is made of them is not."""
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
    """To a bfloat16's three digits."""
    engine = engine_of(precision="bf16")
    whole = engine.logits(batch().tokens, engine.new_cache(B, T), np.full(B, T), every=True)
    cache = engine.new_cache(B, T)
    for t in range(T):
        one = engine.logits(batch().tokens[:, t : t + 1], cache, np.ones(B, np.int64))
        np.testing.assert_allclose(one, whole[:, t], rtol=0, atol=0.02 * np.abs(whole).max())


# -- the loss scale of float16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_halves_the_scale_and_is_no_fault(optimizer: Any) -> None:
    engine, healthy = (engine_of(precision="fp16", optimizer=optimizer) for _ in range(2))
    for one in (engine, healthy):
        train(one, 2)
    before = copy(engine)
    for halvings in (1, 2):
        engine.accumulate(batch(5), 1e6)  # times 65,536: more than float16 holds
        told = engine.update(1e-2)
        assert not np.isfinite(told.norm)
        assert (told.finite, told.applied) == (True, False)
        assert (engine.loss_scale, engine.updates) == (LARGEST_SCALE / 2**halvings, 2)
        assert_same_bits(copy(engine), before)
    healthy.loss_scale /= 4
    for one in (engine, healthy):
        train(one, 2, first=2)
    assert_same_bits(copy(engine), copy(healthy))


def test_the_scale_comes_down_until_gradients_fit_and_they_are_told_without_it() -> None:
    engine, exact = engine_of(precision="fp16"), engine_of()
    engine.loss_scale = 2.0**30
    norms = []
    while not norms or not np.isfinite(norms[-1]):
        engine.accumulate(batch(), 1 / (B * T))
        norms.append(engine.update(1e-2).norm)
    assert 3 < len(norms) < 16
    assert engine.loss_scale == 2.0 ** (31 - len(norms))
    exact.accumulate(batch(), 1 / (B * T))
    assert norms[-1] == pytest.approx(exact.update(1e-2).norm, rel=0.01)
    gradient, wide = engine.gradients(batch(1), 1 / (B * T)), exact.gradients(batch(1), 1 / (B * T))
    for name, array in gradient.items():
        assert np.linalg.norm(array) == pytest.approx(np.linalg.norm(wide[name]), rel=0.05)


def test_at_a_scale_of_one_what_is_not_finite_is_a_fault() -> None:
    engine = engine_of(precision="fp16")
    engine.loss_scale = 1.0
    engine.accumulate(batch(), float("nan"))
    assert engine.update(1e-2)[1:] == (False, False)
    assert engine.loss_scale == 1.0


def test_the_scale_grows_again_after_many_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "GROWTH_INTERVAL", 3)
    engine = engine_of(precision="fp16")
    engine.loss_scale = LARGEST_SCALE / 4
    scales = []
    for step in range(12):
        engine.accumulate(batch(step), 1 / (B * T))
        engine.update(1e-2)
        scales.append(engine.loss_scale / LARGEST_SCALE)
    assert scales == [0.25, 0.25, *[0.5] * 3, *[1.0] * 7]  # and no further


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_other_precisions_have_no_scale(precision: Precision) -> None:
    engine = engine_of(precision=precision)
    engine.load(engine_of().state(), updates=3, loss_scale=1024.0)
    train(engine, 1)
    assert engine.loss_scale == 1.0
    assert torch_engine.COMPUTE[precision] == engine.model.dtype


def test_the_scale_is_loaded_again() -> None:
    engine, other = engine_of(precision="fp16"), engine_of(precision="fp16")
    train(engine, 1)
    engine.loss_scale = 512.0
    other.load(copy(engine).items(), engine.updates, engine.loss_scale)
    assert other.loss_scale == 512.0
    other.load(copy(engine).items(), engine.updates, 1.0)
    assert other.loss_scale == LARGEST_SCALE  # of a checkpoint that another precision wrote
