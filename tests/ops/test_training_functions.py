"""glasslm.ops around training: updates, clipping, schedules, batches and checkpoint files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import files, ops
from glasslm.config.schema import ModelConfig, OptimizerConfig
from glasslm.data.batch_sampler import BatchSampler
from glasslm.engines.numpy import optimizer
from glasslm.training.learning_rate import lr_at

SHAPES: list[tuple[int, ...]] = [(), (3,), (2, 3), (2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clipping_keeps_types_containers_and_inputs(shape: tuple[int, ...]) -> None:
    g = np.full(shape, 3.0, np.float32)
    g.flags.writeable = False
    for gradients in (g, [g, g], (g,), {"w": g, "b": g}):
        by_norm, norm = ops.clip_by_norm(gradients, 0.5)
        by_value = ops.clip_by_value(gradients, 0.5)
        assert type(by_norm) is type(by_value) is type(gradients)
        for clipped in (by_norm, by_value):
            values: Any = clipped.values() if isinstance(clipped, dict) else clipped
            for array in [clipped] if isinstance(clipped, np.ndarray) else values:
                assert array.dtype == np.float32
                assert array.shape == shape
                assert not np.shares_memory(array, g)
        count = 1 if isinstance(gradients, np.ndarray) else len(gradients)
        assert norm == pytest.approx(3 * (count * g.size) ** 0.5)
    unclipped, norm = ops.clip_by_norm([g], 1e9)
    assert np.array_equal(unclipped[0], g)
    assert ops.clip_by_norm([0 * g], 1.0)[1] == 0
    huge = np.full(shape, 1e25, np.float32)  # its square overflows float32
    assert np.isfinite(ops.clip_by_norm([huge], 1.0)[1])


def test_updates_are_those_of_the_engine() -> None:
    rng = np.random.default_rng(0)
    p, g, m, v = rng.standard_normal((4, 5, 3)).astype(np.float32)
    v = abs(v)
    for ours, theirs, arrays in (
        (ops.muon, optimizer.muon, (m,)),
        (ops.sgd, optimizer.sgd, (m,)),
        (ops.adamw, optimizer.adamw, (m, v)),
    ):
        options: dict[str, Any] = {"lr": 0.1, "decay": 0.2}
        options |= {"momentum": 0.9} if len(arrays) == 1 else {"t": 3, "betas": (0.9, 0.95)}
        mine, other = ([a.copy() for a in (p, g, *arrays)] for _ in range(2))
        wide = np.zeros((5, 6), np.float32)
        mine[0] = wide[:, ::2]  # a strided weight is updated in place, too
        mine[0][...] = p
        ours(*mine, **options)
        eps = {"eps": optimizer.ADAM_EPS} if theirs is optimizer.adamw else {}
        theirs(*other, **options, **eps, scale=1.0)
        assert np.array_equal(mine[1], g)
        for a, b in zip([mine[0], *mine[2:]], [other[0], *other[2:]], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            assert not np.array_equal(a, p)


def test_the_learning_rate_is_that_of_training() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        config = OptimizerConfig(lr=0.3, min_lr=0.03, warmup_steps=4, schedule=schedule)
        for step in range(25):
            rate = ops.learning_rate(
                step, 20, lr=0.3, min_lr=0.03, warmup_steps=4, schedule=schedule
            )
            assert rate == lr_at(step, config, 20)


def test_step_decay_warms_up() -> None:
    rates = [ops.step_decay(step, lr=1.0, every=3, factor=0.5, warmup_steps=2) for step in range(7)]
    assert rates == [0.5, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_batches_are_those_of_training() -> None:
    tokens = np.arange(50, dtype=np.uint16)
    tokens.flags.writeable = False
    inputs, targets = ops.sample_batch(tokens, 40, 7, seed=3, step=5)
    expected = BatchSampler(50, 7, 40, 3, epochs=False).batch(tokens, 5, np.arange(40))
    assert np.array_equal(inputs, expected[0])
    assert np.array_equal(targets, inputs + 1)
    assert inputs.shape == targets.shape == (40, 7)
    starts = [ops.sample_batch(tokens, 400, 47, seed=seed)[0][:, 0] for seed in range(3)]
    assert {*np.concatenate(starts).tolist()} == {0, 1, 2}  # every window, none past the end


def test_initial_weights_have_the_names_and_the_seed_of_a_run() -> None:
    config = ModelConfig(d_model=8, n_heads=2, n_layers=2)
    weights = ops.initial_weights(config, 5, dtype=np.float64)
    assert np.array_equal(weights["norm.weight"], np.ones(8))
    again = ops.initial_weights(config, 5, dtype=np.float64)
    other = ops.initial_weights(config, 5, seed=1, dtype=np.float64)
    name = "blocks.1.attention.q.weight"
    assert np.array_equal(weights[name], again[name])
    assert not np.array_equal(weights[name], other[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layernorm", "bias": True, "feedforward": "gelu"},
        {"norm_position": "post", "position": "sinusoidal"},
        {"position": "alibi", "qk_norm": True, "n_kv_heads": 1},
        {"position": "learned", "tie_embeddings": False, "attention": "flash"},
        {"n_experts": 3, "shared_expert": True, "window": 2},
        {"lora_rank": 2, "dropout": 0.5},
        {"norm": "none", "position": "none", "scale_embeddings": True},
    ],
    ids=str,
)
def test_any_architecture_learns_in_a_few_updates(changes: dict[str, Any]) -> None:
    """Weights, gradients and their names fit each other, in a block, too."""
    config = dataclasses.replace(
        ModelConfig(d_model=8, n_heads=2, n_layers=2, d_ff=8, block_size=6), **changes
    )
    weights = ops.initial_weights(config, 5)
    moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
    tokens = np.array([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 4]])
    losses = []
    for t in range(1, 13):
        logits, backward = ops.transformer(tokens[:, :-1], weights, config)
        nats, nats_back = ops.cross_entropy(logits, tokens[:, 1:])
        losses.append(nats.mean())
        gradients = backward(nats_back(1 / nats.size))
        assert gradients.keys() <= weights.keys()
        for name, g in gradients.items():
            ops.adamw(weights[name], g, *moments[name], t=t, lr=0.05)
    assert losses[-1] < losses[0] - 0.01
    block_weights = {
        name.removeprefix("blocks.1."): w
        for name, w in weights.items()
        if name.startswith("blocks.1.")
    }
    y, block_back = ops.block(np.ones((6, 8), np.float32), block_weights, config)
    dx, gradients = block_back(np.ones_like(y))
    assert y.shape == dx.shape == (6, 8)
    assert {f"blocks.1.{name}" for name in gradients} <= weights.keys()
    assert any(g.any() for g in gradients.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 2, "attention_pattern": "wf"},
        {"attention_pattern": "fn"},
        {"window": 2, "attention_pattern": "fwf", "window_rope_base": 500.0},
        {"window": 2, "residual": "parallel", "norm_position": "sandwich"},
    ],
    ids=str,
)
def test_blocks_one_after_the_other_are_the_model(changes: dict[str, Any]) -> None:
    """Each with the attention of its layer, and the gradient of the stream between them."""
    sizes: dict[str, Any] = {"d_model": 8, "n_heads": 2, "n_layers": 4, "d_ff": 8, "block_size": 6}
    config = ModelConfig(**sizes, **changes)
    rng = np.random.default_rng(0)
    weights = {
        name: w + 0.3 * rng.standard_normal(w.shape)
        for name, w in ops.initial_weights(config, 5, dtype=np.float64).items()
    }
    tokens = np.array([[1, 2, 0, 3, 4, 1]])
    x, blocks_back = weights["embedding.weight"][tokens], []
    for layer in range(4):
        prefix = f"blocks.{layer}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        x, back = ops.block(x, own, config, layer=layer)
        blocks_back.append(back)
    h, norm_back = ops.rms_norm(x, weights["norm.weight"])
    logits, head_back = ops.linear(h, weights["embedding.weight"])
    expected, backward = ops.transformer(tokens, weights, config)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
    dlogits = rng.standard_normal(logits.shape)
    dx = norm_back(head_back(dlogits)[0])[0]
    gradients = backward(dlogits)
    for layer in reversed(range(4)):
        dx, own_gradients = blocks_back[layer](dx)
        for name, gradient in own_gradients.items():
            np.testing.assert_allclose(gradient, gradients[f"blocks.{layer}.{name}"], atol=1e-10)


def test_a_checkpoint_holds_any_arrays_and_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays: dict[str, Any] = {
        "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T[::2],
        "scalar": np.float64(0.1),
        "step": 10,
        "flag": True,
        "empty": np.zeros((0, 3)),
        "big-endian": np.array([1, 2], ">i4"),
        "half": np.ones(3, np.float16),
    }
    path = tmp_path / "folder" / "c.safetensors"
    ops.save_checkpoint(path, arrays)
    loaded = ops.load_checkpoint(str(path))
    assert loaded.keys() == arrays.keys()
    for name, array in loaded.items():
        assert np.array_equal(array, arrays[name]), name
        assert array.shape == np.shape(arrays[name]), name
        assert array.flags.writeable
    assert loaded["strided"].dtype == np.float32
    assert loaded["scalar"].dtype == np.float64
    assert int(loaded["step"]) == 10

    def fail(*_: Any) -> None:
        raise OSError("power failure")

    monkeypatch.setattr(files, "_rename", fail)
    with pytest.raises(OSError, match="power failure"):
        ops.save_checkpoint(path, {"step": 11})
    monkeypatch.undo()
    assert int(ops.load_checkpoint(path)["step"]) == 10
    assert [entry.name for entry in path.parent.iterdir()] == ["c.safetensors"]
