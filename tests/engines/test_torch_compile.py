"""A compiled model computes the same as an eager one, and is compiled once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from glasslm.config.schema import ComputeConfig, ModelConfig
from glasslm.training import launch, step_timer
from small_runs import read_json, small_config, write_text

torch = pytest.importorskip("torch")

from test_torch_engine import (  # noqa: E402 - needs PyTorch
    MODEL,
    B,
    T,
    batch,
    copy,
    engine_of,
)

from glasslm.engines.torch.hardware import missing_compiler  # noqa: E402
from glasslm.errors import InputError  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # PyTorch warns about parts of its own compiler

MODELS: dict[str, ModelConfig] = {
    "rope, dropout": MODEL,
    "alibi, shared keys, geglu": dataclasses.replace(
        MODEL,
        position="alibi",
        feedforward="geglu",
        n_kv_heads=2,
        norm="layernorm",
        bias=True,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "gelu": dataclasses.replace(MODEL, feedforward="gelu", position="learned"),
}


@pytest.fixture(autouse=True)
def _reset_the_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_has_the_eager_gradients(name: str) -> None:
    """Within 1e-4 of the largest entry; the next three updates agree as well.

    The last micro-batch is smaller than the others.
    """
    assert not missing_compiler("cpu")
    eager, compiled = (
        engine_of(MODELS[name], micro=4, compiled=compiled) for compiled in (False, True)
    )
    assert (eager.compiled, compiled.compiled) == (False, True)
    expected, actual = (engine.gradients(batch(), 1 / (B * T)) for engine in (eager, compiled))
    assert expected.keys() == actual.keys() == eager.table.keys()
    largest = max(np.abs(array).max() for array in expected.values())
    for key, array in expected.items():
        bound = 1e-4 * max(np.abs(array).max(), 1e-3 * largest)
        np.testing.assert_allclose(actual[key], array, rtol=0, atol=bound, err_msg=key)
    for step in range(3):
        losses = [
            engine.accumulate(batch(step), 1 / (B * T)).cross_entropy
            for engine in (eager, compiled)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        norms = [engine.update(1e-3).norm for engine in (eager, compiled)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    for key, array in copy(eager).items():
        np.testing.assert_allclose(
            copy(compiled)[key], array, rtol=0, atol=1e-3 * max(np.abs(array).max(), 1e-3)
        )
    tokens, targets, *_ = batch()
    np.testing.assert_allclose(
        compiled.losses(tokens, targets), eager.losses(tokens, targets), rtol=1e-3
    )


@torch._inductor.config.patch({"cpp.cxx": (None, "/bin/false"), "force_disable_caches": True})
def test_a_failing_compiler_is_reported_in_one_line() -> None:
    engine = engine_of(compiled=True)
    with pytest.raises(
        InputError, match=r"torch\.compile does not work .*C\+\+ compiler.*--compile off"
    ) as refusal:
        engine.accumulate(batch(), 1 / (B * T))
    assert "\n" not in str(refusal.value)


@torch._inductor.config.patch({"cpp.cxx": (None, "/bin/false"), "force_disable_caches": True})
def test_an_automatic_compilation_that_fails_leaves_the_run_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_timer, "MIN_COMPILED_RUN_S", {"cpu": 0.0})
    messages: list[str] = []
    compute = ComputeConfig(engine="torch", device="cpu", precision="fp32")
    config = small_config(write_text(tmp_path / "text.txt"), max_steps=2)
    run = tmp_path / "run"
    launch.train(config, compute, run, notify=messages.append)
    assert read_json(run / "run.json")["compiled"] is False
    assert "not compiled: torch.compile does not work here (" in "\n".join(messages)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_the_model_is_compiled_once() -> None:
    """One block serves all; further steps, evaluations and samples do not compile again."""
    engine = engine_of(compiled=True, micro=3)
    graphs = []
    torch._dynamo.utils.counters.clear()
    for step in range(4):
        engine.accumulate(batch(step), 1 / (B * T))
        engine.update(1e-3)
        engine.losses(batch().tokens[: step + 1], batch().targets[: step + 1])
        cache = engine.new_cache(1, T)
        for token in batch(step).tokens[0]:
            engine.logits(np.full((1, 1), token), cache, np.ones(1, np.int64))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1] * 4
