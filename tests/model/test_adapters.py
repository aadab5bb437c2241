"""LoRA adapters in both engines: their start, merging, training, and peft's numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from glasslm.config.schema import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    Precision,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.factory import make_engine
from glasslm.engines.numpy import ops
from glasslm.engines.protocol import Batch
from glasslm.model.adapters import merge_adapters, without_adapters
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint
from glasslm.runs.checkpoint import RunIdentity, TrainingPosition

Array = np.ndarray[Any, Any]
V, B, T = 11, 4, 6
ALL = "q,k,v,o,gate,up,down"
MODELS: dict[str, dict[str, Any]] = {
    "queries and values": {},
    "every matrix": {"lora_targets": ALL},
    "fewer key heads": {"n_kv_heads": 2, "lora_targets": "q,k"},
    "biases and LayerNorms": {
        "bias": True,
        "norm": "layernorm",
        "feedforward": "gelu",
        "lora_targets": "v,o,up,down",
    },
    "an untied head, other norms": {
        "tie_embeddings": False,
        "norm_position": "post",
        "qk_norm": True,
    },
    "experts": {"n_experts": 4, "shared_expert": True, "lora_targets": ALL},
    "alone in a stack": {"lora_targets": "k,up", "bias": True},
}


@pytest.fixture(params=["numpy", "torch"])
def engine_name(request: pytest.FixtureRequest) -> str:
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


def model_of(name: str = "queries and values", rank: int = 3) -> ModelConfig:
    sizes: dict[str, Any] = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 24,
        "block_size": T,
    }
    return ModelConfig(**sizes | {"lora_rank": rank, "lora_alpha": 6.0} | MODELS[name])


def engine_of(
    engine_name: str, model: ModelConfig, precision: Precision = "fp64", **optimizer: Any
) -> Any:
    train = TrainConfig(batch_size=B, micro_batch_size=2)
    config = RunConfig(model, optimizer=OptimizerConfig(**optimizer), train=train)
    compute = ComputeConfig(engine=engine_name, device="cpu", precision=precision, threads=1)  # type: ignore[arg-type]
    return make_engine(config, V, compute, training=True)


def with_new_adapters(model: ModelConfig) -> dict[str, Array]:
    """Random weights far from their start, and initial adapters, if there are any."""
    draw = np.random.default_rng(5)
    start = dict(initial_weights(parameter_table(model, V), 0, np.float64))
    plain = parameter_table(without_adapters(model), V)
    return start | {
        name: start[name] + 0.3 * draw.standard_normal(start[name].shape) for name in plain
    }


def with_trained_adapters(model: ModelConfig) -> dict[str, Array]:
    """The same with random adapters."""
    draw = np.random.default_rng(6)
    weights = with_new_adapters(model)
    return weights | {
        name: 0.5 * draw.standard_normal(w.shape) for name, w in weights.items() if ".lora_" in name
    }


def batch(step: int = 0) -> Batch:
    text = np.random.default_rng(step).integers(0, V, (B, T + 1))
    return Batch(text[:, :-1], text[:, 1:], step, np.arange(B))


def predictions(engine: Any) -> tuple[Array, Array]:
    """(B, T) losses, and (B, T, V) logits computed with a cache."""
    data = batch()
    logits = engine.logits(data.tokens, engine.new_cache(B, T), np.full(B, T), every=True)
    return engine.losses(data.tokens, data.targets), logits


# -- the adapted model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_an_adapted_model_starts_as_its_base(
    engine_name: str, name: str, precision: Precision
) -> None:
    """Their bits are equal, because B is zero."""
    adapted, weights = model_of(name), with_new_adapters(model_of(name))
    base = {key: array for key, array in weights.items() if ".lora_" not in key}
    engine, base_engine = (
        engine_of(engine_name, adapted, precision),
        engine_of(engine_name, without_adapters(adapted), precision),
    )
    engine.load(weights.items())
    base_engine.load(base.items())
    for actual, expected in zip(predictions(engine), predictions(base_engine)):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_the_merged_model_computes_what_the_adapted_one_does(
    engine_name: str, name: str, precision: Precision, tolerance: float
) -> None:
    model = model_of(name)
    dtype = np.float64 if precision == "fp64" else np.float32
    weights = {key: array.astype(dtype) for key, array in with_trained_adapters(model).items()}
    engine, merged = (
        engine_of(engine_name, model, precision),
        engine_of(engine_name, without_adapters(model), precision),
    )
    engine.load(weights.items())
    merged.load(merge_adapters(weights, model).items())
    for expected, actual in zip(predictions(engine), predictions(merged)):
        np.testing.assert_allclose(
            actual, expected, rtol=tolerance, atol=tolerance * float(np.abs(expected).max())
        )
    unadapted = engine_of(engine_name, without_adapters(model), precision)
    unadapted.load((key, array) for key, array in weights.items() if ".lora_" not in key)
    # The adapters have an effect.
    assert np.abs(predictions(unadapted)[0] - predictions(engine)[0]).max() > 0.01


def test_merging_adds_the_product_once_and_touches_nothing_else() -> None:
    """W + alpha / r B A, in the type of W; the input arrays do not change."""
    model = model_of("experts")
    weights = {key: array.astype(np.float32) for key, array in with_trained_adapters(model).items()}
    before = {key: array.copy() for key, array in weights.items()}
    merged = merge_adapters(weights, model)
    assert merged.keys() == parameter_table(without_adapters(model), V).keys()
    adapted = {key.removesuffix(".lora_a") for key in weights if key.endswith(".lora_a")}
    # In two blocks: four in attention, three in each of four experts and the shared one.
    assert len(adapted) == 2 * (4 + 3 * 5)
    for key, array in merged.items():
        assert array.dtype == np.float32
        module = key.removesuffix(".weight")
        if module not in adapted:
            np.testing.assert_array_equal(array, before[key])
            continue
        a, b = (before[f"{module}.{part}"].astype(np.float64) for part in ("lora_a", "lora_b"))
        np.testing.assert_allclose(array, before[key] + 6.0 / 3 * b @ a, rtol=1e-6, atol=1e-7)
    for key, array in weights.items():
        np.testing.assert_array_equal(array, before[key])
    wide = {
        key: array.astype(np.float64) if ".lora_" in key else array for key, array in before.items()
    }
    kinds = {
        key.removesuffix(".weight") in adapted: array.dtype
        for key, array in merge_adapters(wide, model).items()
    }
    assert kinds == {True: np.float64, False: np.float32}  # the wider of the two types
    again = merge_adapters(merged, without_adapters(model))
    assert again.keys() == merged.keys()
    assert all(again[key] is merged[key] for key in merged)


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_moments_are_those_of_the_adapters_alone(engine_name: str, name: str) -> None:
    model = model_of(name)
    engine = engine_of(engine_name, model, optimizer="adamw")
    engine.load(with_trained_adapters(model).items())
    adapters = {key for key in parameter_table(model, V) if ".lora_" in key}
    gradients = engine.gradients(batch(), 1 / (B * T))
    assert set(gradients) == adapters
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())
    norm = np.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients.values()))
    engine.accumulate(batch(), 1 / (B * T))
    assert engine.update(0.01).norm == pytest.approx(norm, rel=1e-12)
    assert {key for key, _ in engine.state()} == adapters | {
        f"adamw.{moment}/{key}" for key in adapters for moment in "mv"
    }


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_merged_matrix_by_the_chain_rule(
    engine_name: str, name: str
) -> None:
    """W + s B A with the gradient dW gives dA = s Bᵀ dW and dB = s dW Aᵀ."""
    model, weights = model_of(name), with_trained_adapters(model_of(name))
    engine, merged = engine_of(engine_name, model), engine_of(engine_name, without_adapters(model))
    engine.load(weights.items())
    merged.load(merge_adapters(weights, model).items())
    expected = merged.gradients(batch(), 1 / (B * T))
    gradients = engine.gradients(batch(), 1 / (B * T))
    largest = max(float(np.abs(gradient).max()) for gradient in gradients.values())
    for module in (key.removesuffix(".lora_a") for key in gradients if key.endswith(".lora_a")):
        a, b, dw = (
            weights[f"{module}.lora_a"],
            weights[f"{module}.lora_b"],
            expected[f"{module}.weight"],
        )
        for part, gradient in (("lora_a", b.T @ dw), ("lora_b", dw @ a.T)):
            key = f"{module}.{part}"
            np.testing.assert_allclose(
                gradients[key], 6.0 / 3 * gradient, rtol=0, atol=1e-12 * largest, err_msg=key
            )


def test_at_the_start_only_b_has_a_gradient(engine_name: str) -> None:
    model = model_of("every matrix")
    engine = engine_of(engine_name, model)
    engine.load(with_new_adapters(model).items())
    gradients = engine.gradients(batch(), 1 / (B * T))
    for key, gradient in gradients.items():
        assert np.any(gradient) == key.endswith(".lora_b"), key


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_frozen_weights_never_change_by_a_bit(engine_name: str, optimizer: OptimizerName) -> None:
    """Gradients, weight decay and the average leave them; the adapters all change."""
    model = model_of("experts")
    engine = engine_of(engine_name, model, "fp32", optimizer=optimizer, weight_decay=0.5, ema=0.9)
    engine.load(with_trained_adapters(model).items())

    def all_weights() -> dict[str, Array]:
        if engine_name == "numpy":
            return {key: engine.weights[key].copy() for key in parameter_table(model, V)}
        return {key: array.detach().numpy().copy() for key, array in engine.parameters.items()}

    before = all_weights()
    for step in range(4):
        engine.accumulate(batch(step), 1 / (B * T))
        assert engine.update(0.1).applied
    for key, array in all_weights().items():
        changed = array.tobytes() != before[key].tobytes()
        assert changed == (".lora_" in key), key


def test_adapters_have_no_weight_decay() -> None:
    """It would pull the model to its base, as early stopping does."""
    assert not any(
        row.decay for key, row in parameter_table(model_of("experts"), V).items() if ".lora_" in key
    )


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("queries and values", [(16, 16), (16, 16)]),
        ("every matrix", [(16, 16)] * 4 + [(24, 16)] * 2 + [(16, 24)]),
        ("fewer key heads", [(16, 16), (8, 16)]),
        ("biases and LayerNorms", [(16, 16), (16, 16), (24, 16), (16, 24)]),
        ("experts", [(16, 16)] * 4 + 5 * ([(24, 16)] * 2 + [(16, 24)])),
    ],
)
@pytest.mark.parametrize("rank", [1, 8])
def test_counts_and_checkpoint_bytes_follow_from_the_rank(
    name: str, shapes: list[tuple[int, int]], rank: int, tmp_path: Path
) -> None:
    """r (I + O) parameters for each adapted matrix (O, I); a checkpoint has two moments of each."""
    model = model_of(name, rank)
    expected = 2 * sum(rank * (width + height) for height, width in shapes)
    counts = parameter_table(model, V).counts()
    assert counts["trained"] == expected
    assert counts["total"] == expected + parameter_table(without_adapters(model), V).total
    engine = engine_of("numpy", model, "fp32", optimizer="adamw")
    engine.load(with_new_adapters(model).items())
    folder = checkpoint.save(
        tmp_path, engine.state(), TrainingPosition(0, 0, 0, 0), RunIdentity("", "", "")
    )
    for file, arrays in (("model.safetensors", 1), ("optimizer.safetensors", 2)):
        data = (folder / file).read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        assert len(data) - header == 4 * arrays * expected
    assert all(".lora_" in key for key in load_file(folder / "model.safetensors"))


# -- peft ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 16.0), (8, 2.0)])
def test_peft_computes_the_same(rank: int, alpha: float) -> None:
    """Output and gradients of input and adapters, from the same W, bias, A, B and alpha."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from glasslm.engines.torch.layers import Linear

    I, O, N = 12, 10, 7  # noqa: E741 - as in ops.py
    draw = np.random.default_rng(rank)
    w, bias, a, b = (draw.standard_normal(shape) for shape in ((O, I), (O,), (rank, I), (O, rank)))
    x, dy = draw.standard_normal((N, I)), draw.standard_normal((N, O))

    model = torch.nn.Sequential(torch.nn.Linear(I, O)).double()
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], lora_dropout=0.0)
    theirs = peft.get_peft_model(model, settings)
    layer = theirs.base_model.model[0]
    pairs = [(layer.base_layer.weight, w), (layer.base_layer.bias, bias)]
    pairs += [(layer.lora_A["default"].weight, a), (layer.lora_B["default"].weight, b)]
    ours = Linear(I, O, bias=True, rank=rank, scale=alpha / rank).double()
    pairs += [(ours.weight, w), (ours.bias, bias), (ours.lora_a, a), (ours.lora_b, b)]
    with torch.no_grad():
        for parameter, array in pairs:
            parameter.copy_(torch.from_numpy(array))

    def outputs_and_gradients(module: Any, lora_a: Any, lora_b: Any) -> list[Array]:
        inputs = torch.from_numpy(x).requires_grad_()
        y = module(inputs)
        gradients = torch.autograd.grad(y, [inputs, lora_a, lora_b], torch.from_numpy(dy))
        return [array.detach().numpy() for array in (y, *gradients)]

    expected = outputs_and_gradients(
        theirs, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    )
    y, frozen_back = ops.frozen_linear(x, w, np.empty)
    added, adapter_back = ops.adapter(x, a, b, alpha / rank, np.empty)
    dx, da, db = adapter_back(dy)
    by_hand = [y + bias + added, frozen_back(dy) + dx, da, db]
    for arrays in (outputs_and_gradients(ours, ours.lora_a, ours.lora_b), by_hand):
        for actual, wanted in zip(arrays, expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)
