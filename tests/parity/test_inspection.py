"""Looking inside: both engines show the same under the same names, and looking changes nothing."""

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


def config_of(changes: dict[str, Any], optimizer: OptimizerConfig = OptimizerConfig()) -> RunConfig:  # noqa: B008
    model = dataclasses.replace(SMALL, **changes)
    return RunConfig(model=model, optimizer=optimizer, train=TrainConfig(batch_size=B)).resolved()


def engine_of(name: str, config: RunConfig, precision: str = "fp64", **compute: Any) -> Engine:
    engine = make_engine(
        config, V, ComputeConfig(engine=name, precision=precision, threads=1, **compute)
    )  # type: ignore[arg-type]
    weights = initial_weights(parameter_table(config.model, V), seed=5)
    generator = np.random.default_rng(1)
    engine.load(
        (name, array + 0.3 * generator.standard_normal(array.shape)) for name, array in weights
    )
    return engine


def batch_of(seed: int = 0) -> Batch:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, V, (B, T))
    targets[0, :2] = -1
    return Batch(generator.integers(0, V, (B, T)), targets, step=4, rows=np.arange(B))


def names_of(config: RunConfig) -> list[str]:
    return [*forward_names(config.model), *backward_names(config.model, parameter_table(config.model, V))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_engines_show_the_same(variant: str) -> None:
    pytest.importorskip("torch")
    config = config_of(VARIANTS[variant], OptimizerConfig(z_loss=0.01, ema=0.9))
    names = names_of(config)
    ours, theirs = (
        engine_of(name, config).inspect(batch_of(), names) for name in ("numpy", "torch")
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
def test_looking_changes_nothing(engine: str, variant: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    config = config_of(VARIANTS[variant])

    def trained(looking: bool) -> dict[str, Any]:
        machine = engine_of(engine, config, "fp32")
        for step in range(4):
            batch = batch_of(step)._replace(step=step)
            weight = 1 / np.count_nonzero(batch.targets >= 0)
            machine.accumulate(batch, weight)
            if looking:
                machine.inspect(batch_of(9), names_of(config))
            machine.update(1e-2)
            if looking:
                machine.inspect(batch, names_of(config))
        return {name: array.copy() for name, array in machine.state()}

    looked, alone = trained(looking=True), trained(looking=False)
    assert looked.keys() == alone.keys()
    for name, array in looked.items():
        assert array.tobytes() == alone[name].tobytes(), name


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_what_is_shown_is_what_is_computed(engine: str) -> None:
    """The parts add up to the stream, the weights to one, and the last part is the logits that `logits` gives."""
    if engine == "torch":
        pytest.importorskip("torch")
    config = config_of({"dropout": 0.5})
    machine, batch = engine_of(engine, config), batch_of()
    seen = machine.inspect(batch, forward_names(config.model))
    np.testing.assert_allclose(
        seen["blocks.1"],
        seen["blocks.0"] + seen["blocks.1.attention"] + seen["blocks.1.feedforward"],
        atol=1e-12,
    )
    weights = seen["blocks.0.attention.weights"]
    np.testing.assert_allclose(weights.sum(-1), 1)
    assert (np.triu(weights, 1) == 0).all()
    logits = machine.logits(batch.tokens, machine.new_cache(B, T), np.full(B, T), every=True)
    np.testing.assert_allclose(seen["logits"], logits, atol=1e-10)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("variant", ["default", "experts", "adapters", "post"])
def test_gradients_are_those_of_training(engine: str, variant: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    config = config_of(VARIANTS[variant])
    machine: Any = engine_of(engine, config)
    batch, names = batch_of(), backward_names(config.model, parameter_table(config.model, V))
    of_training = machine.gradients(batch, 1 / np.count_nonzero(batch.targets >= 0))
    seen = machine.inspect(batch, names)
    for name, gradient in of_training.items():
        np.testing.assert_allclose(seen[f"gradient/{name}"], gradient, atol=1e-12, err_msg=name)
    assert set(names) - {f"gradient/{name}" for name in of_training} == {
        "gradient/blocks.0", "gradient/blocks.1", "gradient/embedding"
    }  # fmt: skip


def test_the_gradient_of_the_stream_is_that_of_a_push() -> None:
    """A learned position is added to the stream: the sum of its gradient over the rows is that of the position."""
    config = config_of({"position": "learned"})
    machine = engine_of("numpy", config)
    seen = machine.inspect(batch_of(), ["gradient/embedding", "gradient/position.weight"])
    np.testing.assert_allclose(
        seen["gradient/embedding"].sum(0), seen["gradient/position.weight"], atol=1e-14
    )


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_an_unknown_name_is_refused_with_what_was_meant(engine: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"blocks\.0\.attention"):
        engine_of(engine, config_of({})).inspect(batch_of(), ["blocks.0.atention"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch warns of its own compiler's parts
def test_a_compiled_model_can_be_looked_at() -> None:
    torch = pytest.importorskip("torch")
    from glasslm.engines.torch import hardware

    if hardware.compiler_missing("cpu"):
        pytest.skip("no compiler here")
    config = config_of({})
    machine, plain = (
        engine_of("torch", config, "fp32", compile="on"),
        engine_of("torch", config, "fp32"),
    )
    batch = batch_of()
    machine.accumulate(batch, 1 / 19)
    before = torch._dynamo.utils.counters["frames"]["ok"]
    seen = machine.inspect(batch, names_of(config))
    machine.update(1e-3)
    machine.accumulate(batch, 1 / 19)
    assert torch._dynamo.utils.counters["frames"]["ok"] == before  # nothing was compiled again
    for name, array in plain.inspect(batch, names_of(config)).items():
        hidden = np.isneginf(array)
        scale = max(1e-3, np.abs(array[~hidden]).max())
        np.testing.assert_allclose(
            seen[name][~hidden], array[~hidden], atol=1e-4 * scale, err_msg=name
        )
