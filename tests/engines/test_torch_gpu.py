"""The PyTorch engine on a GPU: agreement with the CPU, fast kernels, and whole runs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glasslm
from glasslm.config.schema import ComputeConfig, ModelConfig
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.lab.checks.gradient_check import single_switches
from glasslm.runs import run_folder
from glasslm.training import launch
from small_runs import (
    comparable_results,
    ignore_message,
    logged_lines,
    run_program,
    small_config,
    train_command,
    without_report,
    write_text,
)

torch = pytest.importorskip("torch")

from test_torch_engine import B, T, V, batch, copy, engine_of, train  # noqa: E402 - needs PyTorch
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from glasslm.engines.torch.engine import TorchEngine  # noqa: E402
from small_runs import interrupt_at  # noqa: E402

DEVICE: Any = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the warnings of PyTorch differ between cards
]

Array = np.ndarray[Any, Any]
WITH_DROPOUT = [
    (f"{name}, dropout", dataclasses.replace(model, dropout=0.2, attention_dropout=0.1))
    for name, model in single_switches()
    if model.attention != "flash"  # which has no dropout of probabilities
]
# Wide enough that a TF32 product, with its three digits, would show in the sums.
WIDE = ModelConfig(d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, block_size=T)
WIDE_WITH_DROPOUT = dataclasses.replace(WIDE, dropout=0.2, attention_dropout=0.1)


def wide_weights(engine: TorchEngine) -> dict[str, Array]:
    """Weights far from their start, where no op is nearly linear."""
    rng = np.random.default_rng(0)
    scale = 0.3 if engine.config.model.d_model < 100 else 0.05
    return {
        name: (array + scale * rng.standard_normal(array.shape)).astype(array.dtype)
        for name, array in engine.state()
        if "/" not in name
    }


def assert_near(actual: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    """Within `tolerance` of the tensor's largest entry (at least a thousandth of all entries')."""
    assert actual.keys() == expected.keys()
    largest = max(np.abs(array).max() for array in expected.values())
    for name, array in expected.items():
        bound = tolerance * max(np.abs(array).max(), 1e-3 * largest)
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=bound, err_msg=name)


# -- agreement with the CPU ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "precision"),
    [
        *[(name, model, "fp64") for name, model in WITH_DROPOUT],
        *[
            (name, model, "fp32")
            for name, model in [
                *single_switches(),
                ("wide", WIDE),
                ("wide, dropout", WIDE_WITH_DROPOUT),
            ]
        ],
    ],
)
def test_gradients_of_the_gpu_equal_those_by_hand(
    name: str, model: ModelConfig, precision: Any
) -> None:
    """So products are float32, not TF32, and dropout has the same mask."""
    dtype, tolerance = {"fp64": (np.float64, 1e-10), "fp32": (np.float32, 1e-4)}[precision]
    engine = engine_of(model, precision, device=DEVICE)
    by_hand = NumpyEngine(engine.config, V, threads=1, dtype=dtype)
    weights = wide_weights(engine)
    for loaded in (engine, by_hand):
        loaded.load(weights.items())
    data = batch(width=model.block_size)
    expected = {
        key: array.copy() for key, array in by_hand.gradients(data, 1 / data.targets.size).items()
    }
    assert_near(engine.gradients(data, 1 / data.targets.size), expected, tolerance)
    assert {parameter.device.type for parameter in engine.parameters.values()} == {DEVICE}


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_updates_are_those_of_the_cpu(optimizer: Any) -> None:
    cpu, gpu = (
        engine_of(precision="fp64", device=device, optimizer=optimizer)
        for device in ("cpu", DEVICE)
    )
    np.testing.assert_allclose(train(gpu, 4), train(cpu, 4), rtol=1e-10)
    assert_near(copy(gpu), copy(cpu), 1e-9)
    gpu.load(list(copy(cpu).items()), 4)
    np.testing.assert_allclose(train(gpu, 2, first=4), train(cpu, 2, first=4), rtol=1e-10)


@pytest.mark.parametrize(("name", "model"), list(single_switches()))
def test_logits_with_a_cache_are_those_of_the_cpu(name: str, model: ModelConfig) -> None:
    """Rows of unequal length, an empty one, and padding beyond the end of the cache."""
    cpu, gpu = (engine_of(model, "fp64", device=device) for device in ("cpu", DEVICE))
    gpu.load(weights := list(wide_weights(cpu).items()))
    cpu.load(weights)
    rng = np.random.default_rng(1)
    for schedule in ([[6, 6, 6]], [[1, 1, 1]] * 6, [[5, 1, 0], [1, 4, 3], [0, 1, 3]]):
        caches = [engine.new_cache(3, model.block_size) for engine in (cpu, gpu)]
        for counts in schedule:
            tokens = rng.integers(0, V, (3, max(counts)))
            expected, actual = (
                engine.logits(tokens, cache, np.array(counts), every=True)
                for engine, cache in zip((cpu, gpu), caches)
            )
            for row, count in enumerate(counts):
                np.testing.assert_allclose(
                    actual[row, :count], expected[row, :count], rtol=1e-9, atol=1e-9
                )


# -- fast kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "distance"), [("bf16", 0.03), ("fp16", 0.006)])
def test_narrow_training_is_near_that_of_float32_and_learns(
    precision: Any, distance: float
) -> None:
    exact, narrow = (engine_of(WIDE, kind, device=DEVICE) for kind in ("fp32", precision))
    tokens, targets, *_ = batch()
    difference = np.abs(narrow.losses(tokens, targets) - exact.losses(tokens, targets)).max()
    assert 0 < difference < distance
    losses = []
    for _ in range(20):
        losses.append(narrow.accumulate(batch(), 1 / (B * T)).cross_entropy)
        assert narrow.update(1e-2).finite
    assert losses[-1] < 0.7 * losses[0]
    assert {array.dtype for _, array in narrow.state()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_long_context_takes_the_flash_kernel(kv_heads: int) -> None:
    """In training and in the prefill of a long prompt.

    If the flash kernel cannot be used, sdpa_kernel raises an error.
    """
    width = 2048
    model = ModelConfig(d_model=512, n_layers=1, n_heads=8, n_kv_heads=kv_heads, block_size=width)
    exact, fast = (engine_of(model, kind, micro=1, device=DEVICE) for kind in ("fp32", "bf16"))
    tokens = np.random.default_rng(0).integers(0, V, (2, width + 1))
    data = Batch(tokens[:, :-1], tokens[:, 1:], 0, np.arange(2))
    expected = exact.gradients(data, 1 / data.targets.size)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        gradients = fast.gradients(data, 1 / data.targets.size)
        logits = fast.logits(data.tokens, fast.new_cache(2, width), np.full(2, width))
    for name, array in expected.items():
        assert np.linalg.norm(gradients[name] - array) < 0.05 * np.linalg.norm(array), name
    right = exact.logits(data.tokens, exact.new_cache(2, width), np.full(2, width))
    np.testing.assert_allclose(logits, right, rtol=0, atol=0.03 * np.abs(right).max())


@pytest.mark.parametrize("model", [WIDE, WIDE_WITH_DROPOUT])
def test_a_compiled_model_has_the_eager_gradients(model: ModelConfig) -> None:
    """Also if the last micro-batch is smaller, and after updates."""
    eager, compiled = (
        engine_of(model, micro=4, device=DEVICE, compiled=compiled) for compiled in (False, True)
    )
    expected, actual = (engine.gradients(batch(), 1 / (B * T)) for engine in (eager, compiled))
    assert_near(actual, expected, 1e-4)
    np.testing.assert_allclose(train(compiled, 3), train(eager, 3), rtol=1e-3)
    tokens, targets, *_ = batch()
    np.testing.assert_allclose(
        compiled.losses(tokens, targets), eager.losses(tokens, targets), rtol=1e-2
    )


def test_full_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        engine_of(device=DEVICE).new_cache(1 << 40, T)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_deterministic_runs_have_the_same_bits(text: Path, tmp_path: Path) -> None:
    """Each runs in its own process, because --deterministic affects a whole process."""
    flags = ["--engine", "torch", "--device", DEVICE, "--precision", "bf16", "--deterministic"]
    results = []
    for name in ("one", "other"):
        result = run_program(
            *train_command(text, tmp_path / name, dropout=0.2, attention_dropout=0.1), *flags
        )
        assert result.returncode == 0, result.stderr
        results.append(comparable_results(tmp_path / name, 20))
    assert results[0] == results[1]


def test_a_run_is_trained_interrupted_resumed_and_generates(text: Path, tmp_path: Path) -> None:
    """In float64, so that the varying order of a GPU's sums does not show."""
    compute = ComputeConfig(engine="torch", device=DEVICE, precision="fp64", threads=1)
    config = small_config(text, dropout=0.2, attention_dropout=0.1, sample_interval=0)
    with without_report():
        uninterrupted = launch.train(
            config, compute, tmp_path / "whole", notify=ignore_message
        ).run_dir
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(8, patch)
            assert (
                launch.train(config, compute, tmp_path / "run", notify=ignore_message).status
                == "interrupted"
            )
        assert (
            launch.resume(tmp_path / "run", ComputeConfig(), notify=ignore_message).status
            == "finished"
        )
    record = run_folder.Run(tmp_path / "run").record
    assert (record["engine"], record["device"], record["precision"]) == ("torch", DEVICE, "fp64")
    losses = [
        [line["loss"] for line in logged_lines(run, "eval")]
        for run in (uninterrupted, tmp_path / "run")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    texts = {
        glasslm.load(tmp_path / "run", engine="torch", device=device, precision="fp64").generate(
            "the old ", 80
        )
        for device in ("cpu", DEVICE)
    }
    assert len(texts) == 1
    by_numpy = glasslm.load(tmp_path / "run", engine="numpy", precision="fp64")
    assert texts == {by_numpy.generate("the old ", 80)}


def test_numpy_continues_a_run_in_narrow_precision(text: Path, tmp_path: Path) -> None:
    """NumPy resumes a bfloat16 run of a GPU in float32, and the loss still falls."""
    compute = ComputeConfig(engine="torch", device=DEVICE, precision="auto", threads=1)
    with without_report(), pytest.MonkeyPatch.context() as patch:
        interrupt_at(10, patch)
        run = launch.train(
            small_config(text, sample_interval=0), compute, tmp_path / "run", notify=ignore_message
        ).run_dir
        patch.undo()
        assert (
            launch.resume(
                run, ComputeConfig(engine="numpy", threads=1), notify=ignore_message
            ).status
            == "finished"
        )
    losses = [line["loss"] for line in logged_lines(run, "eval")]
    assert losses[-1] < losses[2] < losses[0]
