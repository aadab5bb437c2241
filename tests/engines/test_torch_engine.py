"""The PyTorch engine: names, causality, micro-batches, dropout, updates, state and full memory."""

import dataclasses
import math
from collections.abc import Iterator
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
from glasslm.engines.protocol import Batch, Engine
from glasslm.errors import DamagedError, InputError
from glasslm.lab.checks.gradient_check import combinations, single_switches
from glasslm.model.parameters import initial_weights, parameter_table

torch = pytest.importorskip("torch")

from glasslm.engines.torch import attention as torch_attention  # noqa: E402 - needs PyTorch
from glasslm.engines.torch import engine as torch_engine  # noqa: E402
from glasslm.engines.torch.attention import (  # noqa: E402
    AttentionContext,
    SiteDropout,
    attention,
    explicit_attention,
)
from glasslm.engines.torch.engine import TorchEngine  # noqa: E402
from glasslm.engines.torch.layers import dropout_mask  # noqa: E402

Array = np.ndarray[Any, Any]
V, B, T = 13, 6, 8
MODEL = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, block_size=T, dropout=0.2, attention_dropout=0.1
)
OPTIMIZERS = get_args(OptimizerName)


def engine_of(
    model: ModelConfig = MODEL,
    precision: Precision = "fp32",
    micro: int = 2,
    device: Any = "cpu",
    **settings: Any,
) -> TorchEngine:
    compiled = settings.pop("compiled", False)
    train = TrainConfig(batch_size=B, micro_batch_size=micro)
    run = RunConfig(model=model, optimizer=OptimizerConfig(**settings), train=train).resolve()
    engine = TorchEngine(run, V, device=device, precision=precision, threads=1, compiled=compiled)
    engine.load(initial_weights(engine.table, 0))
    return engine


def batch(step: int = 0, rows: int = B, width: int = T) -> Batch:
    tokens = np.random.default_rng(step).integers(0, V, (rows, width + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], step, np.arange(rows))


def train(engine: Engine, steps: int, first: int = 0) -> list[float]:
    """Train for so many steps; returns their losses."""
    losses = []
    for step in range(first, first + steps):
        losses.append(engine.accumulate(batch(step), 1 / (B * T)))
        engine.update(1e-2)
    return losses


def copy(engine: Engine) -> dict[str, Array]:
    return {name: array.copy() for name, array in engine.state()}


def assert_same_bits(arrays: dict[str, Array], expected: dict[str, Array]) -> None:
    assert arrays.keys() == expected.keys()
    for name in arrays:
        assert arrays[name].dtype == expected[name].dtype
        assert arrays[name].tobytes() == expected[name].tobytes(), name


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "model"), [*single_switches(), *combinations(20, seed=2)])
def test_the_modules_are_named_as_the_table_is(name: str, model: ModelConfig) -> None:
    engine = engine_of(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in engine.model.named_parameters()}
    assert shapes == {name: row.shape for name, row in parameter_table(model, V).items()}
    assert set(engine.model.state_dict()) == set(shapes), "a checkpoint has no table of positions"


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("name", "model"), list(single_switches()))
def test_no_logit_depends_on_a_later_token_or_another_row(
    name: str, model: ModelConfig, dropping: bool
) -> None:
    """By the gradient of each logit with respect to the embeddings.

    Every earlier token within the windows of all layers together contributes to it.
    """
    if dropping and model.attention == "flash":
        return  # flash has no dropout of probabilities
    if dropping:
        model = dataclasses.replace(model, attention_dropout=0.5)
    engine = engine_of(model, "fp64")
    with torch.no_grad():
        for parameter in engine.parameters.values():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    embedded: list[Any] = []
    engine.model.embedding.register_forward_hook(
        lambda module, args, output: embedded.append(output.requires_grad_())
    )
    tokens, _, keys = engine._inputs(batch(rows=3, width=model.block_size), np.arange(3))
    logits, _ = engine.model(tokens, keys)
    pattern = model.attention_pattern or ("w" if model.window else "f")
    kinds = (pattern * model.n_layers)[: model.n_layers]
    for t in range(model.block_size):
        (gradient,) = torch.autograd.grad(
            logits[1, t].square().sum(), embedded[0], retain_graph=True
        )
        parts = gradient.abs().amax(-1)
        assert not parts[1, t + 1 :].any()
        assert not parts[[0, 2]].any()
        if not dropping:
            far = sum(model.window - 1 if kind == "w" else t for kind in kinds)
            assert (parts[1, max(0, t - far) : t + 1] > 0).all()
            assert not parts[1, : max(0, t - far)].any()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_explicit_attention_equals_pytorchs(biased: bool, width: int, kv_heads: int) -> None:
    """For texts that its tiles divide evenly and unevenly."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    q, k, v = normal(3, 4, width, 6), normal(3, kv_heads, width, 6), normal(3, kv_heads, width, 6)
    later = torch.ones(width, width, dtype=torch.bool).triu(1)
    bias = normal(4, width, width).masked_fill(later, -math.inf) if biased else None
    context = AttentionContext(rotation=None, bias=bias, hidden_mask=None, causal=width > 1)
    torch.testing.assert_close(
        explicit_attention(q, k, v, context), attention(q, k, v, context), rtol=1e-12, atol=1e-12
    )


def test_attention_drops_probabilities() -> None:
    """With identity values the output is the probabilities."""
    width, p = 8, 0.5
    keys = torch.tensor([3, -7], dtype=torch.int32)
    q, k = torch.zeros(2, 4, width, width), torch.zeros(2, 4, width, width)  # all scores are equal
    v = torch.eye(width).expand(2, 4, width, width)
    context = AttentionContext(
        rotation=None, bias=None, hidden_mask=None, causal=True, dropout=SiteDropout(p, keys)
    )
    expected = torch.ones(width, width).tril() / torch.arange(1, width + 1)[:, None]
    mask = dropout_mask(
        torch.arange(4 * width * width).view(4, width, width), p, keys, torch.float32
    )
    torch.testing.assert_close(attention(q, k, v, context), expected * mask)
    assert 0.4 < float((mask == 0).float().mean()) < 0.6


# -- accumulation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 5])
def test_the_size_of_micro_batches_changes_nothing_but_rounding(micro: int) -> None:
    """With dropout, whose mask depends on the row; also if the last micro-batch is smaller."""
    single, divided = engine_of(precision="fp64", micro=B), engine_of(precision="fp64", micro=micro)
    assert (single.micro_batch_size, divided.micro_batch_size) == (B, micro)
    expected, actual = (engine.gradients(batch(), 1 / (B * T)) for engine in (single, divided))
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-9, atol=1e-13)
    tokens, targets, *_ = batch()
    np.testing.assert_allclose(
        divided.losses(tokens, targets), single.losses(tokens, targets), rtol=1e-12
    )


def test_accumulating_twice_is_one_large_batch() -> None:
    """The rows keep their indices in the step's batch, and so their dropout."""
    single, twice = engine_of(precision="fp64"), engine_of(precision="fp64")
    full = batch()
    loss = single.accumulate(full, 1 / (B * T)).cross_entropy
    halves = [
        Batch(full.tokens[rows], full.targets[rows], 0, full.rows[rows])
        for rows in (slice(0, 2), slice(2, B))
    ]
    assert sum(
        twice.accumulate(half, 1 / (B * T)).cross_entropy for half in halves
    ) == pytest.approx(loss, rel=1e-12)
    assert twice.update(1e-2).norm == pytest.approx(single.update(1e-2).norm, rel=1e-10)
    for name, array in copy(single).items():
        np.testing.assert_allclose(copy(twice)[name], array, rtol=1e-7, atol=1e-10)


def test_dropout_depends_on_seed_step_and_row_alone() -> None:
    def loss(step: int = 0, row: int = 0, rows: int = 3, seed: int = 42) -> float:
        engine = engine_of(precision="fp64", micro=1)
        engine.config = dataclasses.replace(
            engine.config, train=dataclasses.replace(engine.config.train, seed=seed)
        )
        tokens = np.tile(batch().tokens[:1], (rows, 1))
        targets = np.full_like(tokens, -1)
        targets[0] = batch().targets[0]
        indices = np.arange(rows) + 10
        indices[0] = row
        return engine.accumulate(Batch(tokens, targets, step, indices), 1.0).cross_entropy

    base = loss()
    assert loss() == loss(rows=1) == base
    assert len({base, loss(step=1), loss(row=1), loss(seed=43)}) == 4


def test_the_loss_is_the_weighted_sum_of_the_nats() -> None:
    engine = engine_of(dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0))
    nats = engine.losses(batch().tokens, batch().targets)
    assert nats.shape == (B, T)
    assert engine.accumulate(batch(), 0.25).cross_entropy == pytest.approx(
        0.25 * float(nats.sum()), rel=1e-5
    )


def test_gradients_are_those_of_one_batch() -> None:
    """They ignore what was accumulated before, and are discarded, as in the NumPy engine."""
    engine, fresh = engine_of(), engine_of()
    engine.accumulate(batch(1), 1.0)
    assert_same_bits(engine.gradients(batch(0), 1.0), fresh.gradients(batch(0), 1.0))
    with pytest.raises(AssertionError, match="before accumulate"):
        engine.update(1e-2)


# -- updates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_a_gradient_that_is_not_finite_changes_no_bit(optimizer: OptimizerName, bad: float) -> None:
    """Neither does one that overflows only when it is squared."""
    engine, healthy = engine_of(optimizer=optimizer), engine_of(optimizer=optimizer)
    for trainee in (engine, healthy):
        train(trainee, 2)
    before = copy(engine)
    engine.accumulate(batch(5), bad)
    update = engine.update(1e-2)
    assert (update.finite, update.applied) == (False, False)
    assert not math.isfinite(update.norm)
    assert (engine.updates, engine.loss_scale) == (2, 1.0)
    assert_same_bits(copy(engine), before)
    for trainee in (engine, healthy):  # the next steps are the same
        train(trainee, 2, first=2)
    assert_same_bits(copy(engine), copy(healthy))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_norm_above_the_limit_is_skipped_and_one_below_is_not(optimizer: OptimizerName) -> None:
    engine = engine_of(optimizer=optimizer)
    engine.accumulate(batch(), 1 / (B * T))
    norm = engine.update(1e-2).norm
    before = copy(engine)
    engine.accumulate(batch(), 1 / (B * T))
    update = engine.update(1e-2, skip_above=norm / 2)
    assert (update.finite, update.applied, engine.updates) == (True, False, 1)
    assert_same_bits(copy(engine), before)
    engine.accumulate(batch(), 1 / (B * T))
    assert engine.update(1e-2, skip_above=2 * norm).applied
    assert engine.updates == 2


def test_the_gradient_is_clipped_and_the_norm_is_the_one_before_clipping() -> None:
    """With SGD without momentum and decay, a step is the learning rate times the gradient."""
    settings: dict[str, Any] = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "precision": "fp64",
    }
    gradient = engine_of(**settings).gradients(batch(), 1.0)
    norm = math.sqrt(sum(float((array**2).sum()) for array in gradient.values()))
    for clip, factor in ((norm / 3, 1 / 3), (norm * 3, 1.0), (0.0, 1.0)):
        engine = engine_of(**settings, grad_clip=clip)
        before = copy(engine)
        engine.accumulate(batch(), 1.0)
        assert engine.update(0.1).norm == pytest.approx(norm, rel=1e-12)
        for name, array in gradient.items():
            np.testing.assert_allclose(
                copy(engine)[name], before[name] - 0.1 * factor * array, rtol=1e-9, atol=1e-12
            )


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_and_load_are_a_round_trip(optimizer: OptimizerName) -> None:
    """Of weights and moments, by name: the next updates have the same bits."""
    engine, loaded = engine_of(optimizer=optimizer), engine_of(optimizer=optimizer)
    train(engine, 3)
    loaded.load(list(copy(engine).items()), engine.updates)
    assert loaded.updates == 3
    assert_same_bits(copy(loaded), copy(engine))
    for trainee in (engine, loaded):
        train(trainee, 2, first=3)
    assert_same_bits(copy(loaded), copy(engine))


def test_loading_only_weights_resets_the_moments() -> None:
    engine, fresh = engine_of(), engine_of()
    train(engine, 1)
    engine.load(initial_weights(engine.table, 0))
    assert engine.updates == 0
    for trainee in (engine, fresh):
        train(trainee, 2)
    assert_same_bits(copy(engine), copy(fresh))


def test_a_loaded_engine_copies_the_weights() -> None:
    engine = engine_of()
    weights = dict(initial_weights(engine.table, 1))
    before = {name: array.copy() for name, array in weights.items()}
    engine.load(weights.items())
    train(engine, 1)
    assert_same_bits(weights, before)


def test_inference_allocates_no_moments() -> None:
    engine = engine_of()
    engine.losses(batch().tokens, batch().targets)
    engine.logits(batch().tokens, engine.new_cache(B, T), np.full(B, T))
    engine.load(initial_weights(engine.table, 1))
    assert "optimizer" not in vars(engine)
    train(engine, 1)
    assert "optimizer" in vars(engine)


def damaged_state(kind: str) -> Iterator[tuple[str, Array]]:
    """Weights with one fault of the given kind."""
    for name, array in initial_weights(parameter_table(MODEL, V), 1):
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
    if kind == "another optimizer's":
        yield "sgd.m/blocks.0.attention_norm.weight", np.zeros(16, np.float32)


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("missing", "blocks.1.attention.q.weight"),
        ("renamed", "blocks.1.attention.query.weight"),
        ("reshaped", "blocks.1.attention.q.weight"),
        ("extra", "blocks.2.norm.weight"),
        ("moment", "adamw.m/blocks.0.attention_norm.weight"),
        ("another optimizer's", "sgd.m/blocks.0.attention_norm.weight"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_loads_nothing(
    kind: str, entry: str
) -> None:
    engine = engine_of()
    before = copy(engine)
    with pytest.raises(DamagedError, match=entry):
        engine.load(damaged_state(kind))
    assert_same_bits(copy(engine), before)


def test_denormals_are_flushed_only_during_training() -> None:
    """The setting affects a whole thread, so the engine restores it after each call."""
    engine, flushed = engine_of(), []
    engine.model.register_forward_hook(
        lambda *_: flushed.append(np.full(3, 5e-324) @ np.ones(3) == 0)
    )
    train(engine, 1)
    assert set(flushed) == {torch.set_flush_denormal(False)}
    engine.losses(batch().tokens, batch().targets)
    engine.logits(batch().tokens, engine.new_cache(B, T), np.full(B, T))
    with pytest.raises(InputError):
        engine.accumulate(batch()._replace(tokens=batch().tokens + V), 1.0)
    assert np.full(3, 5e-324) @ np.ones(3) > 0
    assert float(torch.full((3,), 5e-324, dtype=torch.float64).sum()) > 0


# -- memory ----------------------------------------------------------------------------------------


def allocate_too_much(*arguments: Any, **more: Any) -> Any:
    """Allocate 4 PiB, which PyTorch refuses."""
    return torch.empty(1 << 50, dtype=torch.float32)


def raise_gpu_error(*arguments: Any, **more: Any) -> Any:
    raise torch.OutOfMemoryError("Allocation on device")


METHODS: dict[str, Any] = {
    "accumulate": lambda engine: engine.accumulate(batch(), 1.0),
    "losses": lambda engine: engine.losses(batch().tokens, batch().targets),
    "logits": lambda engine: engine.logits(batch().tokens, engine.new_cache(B, T), np.full(B, T)),
}


@pytest.mark.parametrize("full", [allocate_too_much, raise_gpu_error])
@pytest.mark.parametrize("method", METHODS)
def test_full_memory_is_a_memory_error(
    method: str, full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    monkeypatch.setattr(engine.model, "hidden_states", full)
    with pytest.raises(MemoryError):
        METHODS[method](engine)


@pytest.mark.parametrize("full", [allocate_too_much, raise_gpu_error])
def test_full_memory_for_moments_is_a_memory_error(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are allocated at the first update, or when the state is read."""
    engine = engine_of()
    engine.accumulate(batch(), 1.0)
    monkeypatch.setattr(torch_engine, "Optimizer", full)
    with pytest.raises(MemoryError):
        engine.update(1e-2)
    with pytest.raises(MemoryError):
        list(engine.state())


def test_a_model_or_cache_that_is_too_large_is_a_memory_error() -> None:
    engine = engine_of()
    with pytest.raises(MemoryError):
        engine.new_cache(1 << 44, T)
    with pytest.raises(MemoryError):
        TorchEngine(engine.config, 1 << 46, device="cpu", precision="fp32")


@pytest.mark.parametrize(
    ("length", "has_window", "has_documents", "is_explicit"),
    [
        (1023, False, False, True),
        (1024, False, False, False),
        (1024, True, False, True),  # the fused kernel would keep T x T weights, too
        (1024, True, True, False),
    ],
)
def test_compiled_for_a_cpu_only_short_texts_keep_the_weights_of_attention(
    length: int,
    has_window: bool,
    has_documents: bool,
    is_explicit: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """memory_estimate.py chooses in the same way."""
    calls: list[Any] = []
    monkeypatch.setattr(torch_attention, "is_compiling_for_cpu", lambda x: True)
    monkeypatch.setattr(torch_attention, "explicit_attention", lambda *inputs: calls.append(inputs))
    q = torch.zeros(1, 1, length, 2)
    hidden_mask = torch.ones(1, length, length).tril(-2).bool() if has_window else None
    starts = torch.zeros(1, length, dtype=torch.int64) if has_documents else None
    context = AttentionContext(None, None, hidden_mask, not has_window, "auto", starts=starts)
    attention(q, q, q, context)
    assert len(calls) == is_explicit


def test_other_errors_of_pytorch_are_not_translated() -> None:
    engine = engine_of(dataclasses.replace(MODEL, position="learned"))
    with pytest.raises(RuntimeError, match="size of tensor"):
        engine.losses(np.zeros((1, T + 1), np.int64), np.zeros((1, T + 1), np.int64))
