"""Inspection: both engines give the same arrays under the same names, and nothing changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.factory import make_engine
from glasslm.engines.inspection import backward_names, forward_names
from glasslm.engines.protocol import Batch, Engine
from glasslm.errors import InputError
from glasslm.model.parameters import initial_weights, parameter_table

V, B, T = 11, 3, 7
SMALL = ModelConfig(d_model=16, n_layers=2, n_heads=4, block_size=T, d_ff=24)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "post": {"norm_position": "post", "norm": "layernorm", "bias": True, "feedforward": "relu"},
    "alibi": {"position": "alibi", "n_kv_heads": 2, "window": 3},
    "flash": {"attention": "flash", "qk_norm": True, "scale_embeddings": True},
    "learned": {
        "position": "learned",
        "tie_embeddings": False,
        "feedforward": "gelu",
        "dropout": 0.3,
    },
    "experts": {"n_experts": 3, "experts_per_token": 1, "shared_expert": True},
    "adapters": {"lora_rank": 2, "lora_targets": "q,v,down"},
}


def make_config(changes: dict[str, Any], **optimizer: Any) -> RunConfig:
    model = dataclasses.replace(SMALL, **changes)
    settings, train = OptimizerConfig(**optimizer), TrainConfig(batch_size=B)
    return RunConfig(model=model, optimizer=settings, train=train).resolve()


def build_engine(name: str, config: RunConfig, precision: str = "fp64", **compute: Any) -> Engine:
    engine = make_engine(
        config, V, ComputeConfig(engine=name, precision=precision, threads=1, **compute)
    )  # type: ignore[arg-type]
    weights = initial_weights(parameter_table(config.model, V), seed=5)
    generator = np.random.default_rng(1)
    engine.load(
        (name, array + 0.3 * generator.standard_normal(array.shape)) for name, array in weights
    )
    return engine


def make_batch(seed: int = 0) -> Batch:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, V, (B, T))
    targets[0, :2] = -1
    return Batch(generator.integers(0, V, (B, T)), targets, step=4, rows=np.arange(B))


def list_names(config: RunConfig) -> list[str]:
    table = parameter_table(config.model, V)
    return [*forward_names(config.model), *backward_names(config.model, table)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_engines_give_the_same_arrays(variant: str) -> None:
    pytest.importorskip("torch")
    config = make_config(VARIANTS[variant], z_loss=0.01, ema=0.9)
    names = list_names(config)
    ours, theirs = (
        build_engine(name, config).inspect(make_batch(), names) for name in ("numpy", "torch")
    )
    assert list(ours) == list(theirs) == names
    for name in names:
        assert ours[name].shape == theirs[name].shape, name
        hidden = np.isneginf(ours[name])
        np.testing.assert_array_equal(hidden, np.isneginf(theirs[name]), name)
        a, b = ours[name][~hidden], theirs[name][~hidden]
        np.testing.assert_allclose(
            a, b, atol=1e-10 * max(1e-3, np.abs(b).max(initial=0)), rtol=0, err_msg=name
        )


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_inspection_changes_nothing(engine: str, variant: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    config = make_config(VARIANTS[variant])

    def train_state(inspecting: bool) -> dict[str, Any]:
        machine = build_engine(engine, config, "fp32")
        for step in range(4):
            batch = make_batch(step)._replace(step=step)
            weight = 1 / np.count_nonzero(batch.targets >= 0)
            machine.accumulate(batch, weight)
            if inspecting:
                machine.inspect(make_batch(9), list_names(config))
            machine.update(1e-2)
            if inspecting:
                machine.inspect(batch, list_names(config))
        return {name: array.copy() for name, array in machine.state()}

    inspected, plain = train_state(inspecting=True), train_state(inspecting=False)
    assert inspected.keys() == plain.keys()
    for name, array in inspected.items():
        assert array.tobytes() == plain[name].tobytes(), name


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_inspection_gives_what_is_computed(engine: str) -> None:
    """The parts add up to the stream, the weights to 1, and the logits are those of `logits`."""
    if engine == "torch":
        pytest.importorskip("torch")
    config = make_config({"dropout": 0.5})
    machine, batch = build_engine(engine, config), make_batch()
    arrays = machine.inspect(batch, forward_names(config.model))
    np.testing.assert_allclose(
        arrays["blocks.1"],
        arrays["blocks.0"] + arrays["blocks.1.attention"] + arrays["blocks.1.feedforward"],
        atol=1e-12,
    )
    weights = arrays["blocks.0.attention.weights"]
    np.testing.assert_allclose(weights.sum(-1), 1)
    assert (np.triu(weights, 1) == 0).all()
    logits = machine.logits(batch.tokens, machine.new_cache(B, T), np.full(B, T), every=True)
    np.testing.assert_allclose(arrays["logits"], logits, atol=1e-10)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("variant", ["default", "experts", "adapters", "post"])
def test_gradients_are_those_of_training(engine: str, variant: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    config = make_config(VARIANTS[variant])
    machine: Any = build_engine(engine, config)
    batch, names = make_batch(), backward_names(config.model, parameter_table(config.model, V))
    expected = machine.gradients(batch, 1 / np.count_nonzero(batch.targets >= 0))
    arrays = machine.inspect(batch, names)
    for name, gradient in expected.items():
        np.testing.assert_allclose(arrays[f"gradient/{name}"], gradient, atol=1e-12, err_msg=name)
    assert set(names) - {f"gradient/{name}" for name in expected} == {
        "gradient/blocks.0", "gradient/blocks.1", "gradient/embedding"
    }  # fmt: skip


def test_the_gradient_of_the_stream_is_that_of_an_added_position() -> None:
    """A learned position is added to the stream: its gradient is the sum over the rows there."""
    config = make_config({"position": "learned"})
    machine = build_engine("numpy", config)
    arrays = machine.inspect(make_batch(), ["gradient/embedding", "gradient/position.weight"])
    np.testing.assert_allclose(
        arrays["gradient/embedding"].sum(0), arrays["gradient/position.weight"], atol=1e-14
    )


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_an_unknown_name_is_refused_with_a_suggestion(engine: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"blocks\.0\.attention"):
        build_engine(engine, make_config({})).inspect(make_batch(), ["blocks.0.atention"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch warns of its own compiler's parts
def test_a_compiled_model_can_be_inspected() -> None:
    torch = pytest.importorskip("torch")
    from glasslm.engines.torch import hardware

    if hardware.missing_compiler("cpu"):
        pytest.skip("no compiler here")
    config = make_config({})
    machine, plain = (
        build_engine("torch", config, "fp32", compile="on"),
        build_engine("torch", config, "fp32"),
    )
    batch = make_batch()
    machine.accumulate(batch, 1 / 19)
    before = torch._dynamo.utils.counters["frames"]["ok"]
    arrays = machine.inspect(batch, list_names(config))
    machine.update(1e-3)
    machine.accumulate(batch, 1 / 19)
    assert torch._dynamo.utils.counters["frames"]["ok"] == before  # nothing was compiled again
    for name, array in plain.inspect(batch, list_names(config)).items():
        hidden = np.isneginf(array)
        scale = max(1e-3, np.abs(array[~hidden]).max())
        np.testing.assert_allclose(
            arrays[name][~hidden], array[~hidden], atol=1e-4 * scale, err_msg=name
        )
