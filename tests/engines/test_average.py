"""The average of the weights (ema) in both engines: its value, its use, saving and loading."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import glasslm
from glasslm.cli import main
from glasslm.config.schema import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch
from glasslm.inference.evaluation import evaluate
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.training import launch, sample_line
from small_runs import (
    COMPUTE,
    ignore_message,
    logged_lines,
    small_config,
    train_command,
    without_report,
    write_text,
)

Array = np.ndarray[Any, Any]
V, B, T = 11, 4, 6
MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, block_size=T)
ADAPTED = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, block_size=T, lora_rank=2)


@pytest.fixture(params=["numpy", "torch"])
def engine_name(request: pytest.FixtureRequest) -> str:
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


def build_engine(
    engine_name: str, ema: float = 0.6, precision: Precision = "fp64", model: ModelConfig = MODEL
) -> Any:
    config = RunConfig(
        model,
        optimizer=OptimizerConfig(ema=ema),
        train=TrainConfig(batch_size=B, micro_batch_size=2),
    )
    compute = ComputeConfig(engine=engine_name, device="cpu", precision=precision, threads=1)  # type: ignore[arg-type]
    engine = make_engine(config, V, compute, training=True)
    engine.load(initial_weights(parameter_table(config.model, V), 0))
    return engine


def make_batch(step: int) -> Batch:
    text = np.random.default_rng(step).integers(0, V, (B, T + 1))
    return Batch(text[:, :-1], text[:, 1:], step, np.arange(B))


def train(engine: Any, steps: range) -> None:
    for step in steps:
        engine.accumulate(make_batch(step), 1 / (B * T))
        assert engine.update(0.01).applied


def copy_state(engine: Any) -> dict[str, Array]:
    return {name: array.copy() for name, array in engine.state()}


def select_weights(state: dict[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in state.items() if "/" not in name}


def select_averages(state: dict[str, Array]) -> dict[str, Array]:
    return {
        name.removeprefix("ema/"): array for name, array in state.items() if name.startswith("ema/")
    }


def assert_same_bits(first: dict[str, Array], second: dict[str, Array]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


# -- its value -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-14), ("fp32", 1e-6)])
def test_it_is_the_average_of_the_weights_after_each_update(
    engine_name: str, precision: Precision, tolerance: float
) -> None:
    """In float64. The decay grows with the updates, 2/11, 3/12, ..., up to the configured one."""
    engine = build_engine(engine_name, 0.6, precision)
    expected = {
        name: array.astype(np.float64) for name, array in select_weights(copy_state(engine)).items()
    }
    assert_same_bits(select_averages(copy_state(engine)), select_weights(copy_state(engine)))
    for update in range(1, 16):  # 0.6 is reached at the 13th
        train(engine, range(update, update + 1))
        decay = (1 + update) / (10 + update) if update < 13 else 0.6
        state = copy_state(engine)
        for name, array in select_weights(state).items():
            expected[name] = decay * expected[name] + (1 - decay) * array
        assert select_averages(state).keys() == expected.keys()
        for name, array in select_averages(state).items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance, err_msg=name)
    difference = max(
        float(np.abs(expected[name] - array).max()) for name, array in select_weights(state).items()
    )
    assert difference > 1e-3


def test_a_skipped_update_does_not_count(engine_name: str) -> None:
    engine = build_engine(engine_name)
    train(engine, range(2))
    before = copy_state(engine)
    engine.accumulate(make_batch(2), 1 / (B * T))
    assert not engine.update(0.01, skip_above=0.0).applied
    assert_same_bits(copy_state(engine), before)


def test_without_it_nothing_is_kept(engine_name: str) -> None:
    engine = build_engine(engine_name, ema=0.0)
    train(engine, range(1))
    assert select_averages(copy_state(engine)) == {}


def test_of_frozen_weights_there_is_no_average(engine_name: str) -> None:
    """Frozen weights stay as they are; adapters have an average."""
    engine = build_engine(engine_name, model=ADAPTED)
    train(engine, range(3))
    state = copy_state(engine)
    assert select_averages(state).keys() == select_weights(state).keys()
    assert all(".lora_" in name for name in select_averages(state))
    plain = build_engine(engine_name, ema=0.0, model=ADAPTED)
    frozen = dict(initial_weights(parameter_table(ADAPTED, V), 0))
    plain.load((frozen | select_averages(state)).items())
    np.testing.assert_array_equal(
        engine.losses(make_batch(9).tokens, make_batch(9).targets),
        plain.losses(make_batch(9).tokens, make_batch(9).targets),
    )


def test_pytorch_keeps_no_graph_of_the_average() -> None:
    """A graph of all updates so far would slowly fill the memory."""
    pytest.importorskip("torch")
    engine = build_engine("torch")
    train(engine, range(2))
    assert engine.average is not None
    for parameter in [*engine.average.parameters(), *engine.parameters.values()]:
        assert parameter.grad_fn is None
    assert not any(parameter.requires_grad for parameter in engine.average.parameters())


# -- its use ---------------------------------------------------------------------------------------


def test_all_but_training_uses_the_average(engine_name: str) -> None:
    """Losses and logits are those of the average; gradients are those of the weights."""
    engine, averaged, raw = (
        build_engine(engine_name),
        build_engine(engine_name, ema=0.0),
        build_engine(engine_name, ema=0.0),
    )
    train(engine, range(5))
    state = copy_state(engine)
    averaged.load(select_averages(state).items())
    raw.load(select_weights(state).items())
    data = make_batch(9)
    np.testing.assert_array_equal(
        engine.losses(data.tokens, data.targets), averaged.losses(data.tokens, data.targets)
    )
    assert not np.array_equal(
        engine.losses(data.tokens, data.targets), raw.losses(data.tokens, data.targets)
    )

    def read(reader: Any) -> Array:
        rows = np.tile(data.tokens, (5, 1))  # more than are read at once
        cache, counts = reader.new_cache(len(rows), T), np.ones(len(rows), int)
        return np.stack([reader.logits(rows[:, i : i + 1], cache, counts) for i in range(T)])

    np.testing.assert_array_equal(read(engine), read(averaged))
    assert_same_bits(
        {name: array.copy() for name, array in engine.gradients(data, 0.1).items()},
        dict(raw.gradients(data, 0.1)),
    )
    assert engine.accumulate(data, 0.1).cross_entropy == raw.accumulate(data, 0.1).cross_entropy


# -- state and load --------------------------------------------------------------------------------


def test_state_and_load_are_a_round_trip(engine_name: str) -> None:
    """The next updates, whose decay depends on the number of updates, give the same bits."""
    engine, second = build_engine(engine_name), build_engine(engine_name)
    train(engine, range(4))
    second.load(copy_state(engine).items(), engine.updates)
    assert_same_bits(copy_state(second), copy_state(engine))
    for trained in (engine, second):
        train(trained, range(4, 6))
    assert_same_bits(copy_state(second), copy_state(engine))


def test_one_engine_goes_on_with_the_average_of_the_other() -> None:
    pytest.importorskip("torch")
    first, second = build_engine("numpy"), build_engine("torch")
    train(first, range(3))
    second.load(copy_state(first).items(), first.updates)
    for engine in (first, second):
        train(engine, range(3, 6))
    expected = select_averages(copy_state(first))
    for name, array in select_averages(copy_state(second)).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-9, err_msg=name)


def test_weights_without_an_average_begin_one(engine_name: str) -> None:
    """The average of before is replaced."""
    engine = build_engine(engine_name)
    train(engine, range(4))
    weights = select_weights(copy_state(engine))
    engine.load(weights.items())
    assert_same_bits(select_averages(copy_state(engine)), weights)
    assert engine.updates == 0


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> run_folder.Run:
    """A run of 12 steps that keeps an average; its last step is its best."""
    folder = tmp_path_factory.mktemp("average")
    text = write_text(folder / "text.txt")
    config = small_config(
        text, max_steps=12, eval_interval=6, checkpoint_interval=6, sample_interval=12, ema=0.9
    )
    with without_report():
        assert (
            launch.train(config, COMPUTE, folder / "run", notify=ignore_message).status
            == "finished"
        )
    return run_folder.Run(folder / "run")


def test_a_checkpoint_holds_both(run: run_folder.Run) -> None:
    """`weights` are the average, for inference; `state` is complete, for further training."""
    saved = checkpoint.load(run.path, 12)
    last = load_file(saved.path / "model.safetensors")
    averages = select_averages(load_file(saved.path / "optimizer.safetensors"))
    assert_same_bits(saved.weights(), averages)
    state = dict(saved.state())
    assert_same_bits(select_weights(state), last)
    assert_same_bits(select_averages(state), averages)
    assert any(not np.array_equal(last[name], averages[name]) for name in last)


def test_what_is_evaluated_and_written_is_the_average(run: run_folder.Run) -> None:
    """Evaluated by a model without an average that loads the averages, and the last weights."""
    dataset = run.dataset(ignore_message)
    flags = small_config(Path("unused"), ema=0.0)
    config = RunConfig(run.config.model, run.config.data, flags.optimizer, flags.train)
    engine = make_engine(config, run.tokenizer.vocab_size, COMPUTE)
    folder = checkpoint.load(run.path, 12).path
    losses = []
    for weights in (
        select_averages(load_file(folder / "optimizer.safetensors")),
        load_file(folder / "model.safetensors"),
    ):
        engine.load(weights.items())
        score = evaluate(
            engine, dataset.val.tokens, dataset.tokenizer.byte_lengths, run.config.model.block_size
        )
        losses.append(score.loss)
    line = logged_lines(run.path, "eval")[-1]
    assert (line["step"], line["whole"]) == (12, True)
    assert line["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-3
    model = glasslm.load(run.path, "latest", engine="numpy", threads=1)
    assert model.score(dataset.val.tokens).loss == pytest.approx(losses[0], rel=1e-6)
    sample = logged_lines(run.path, "sample")[-1]
    assert sample["step"] == 12
    assert (
        model.generate(
            "", sample_line.SAMPLE_TOKENS, temperature=sample["temperature"], seed=sample["seed"]
        )
        == sample["text"]
    )


def test_fsdp_refuses_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As rank 0 of two, before it waits for rank 1."""
    pytest.importorskip("torch")
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "::1",
    }.items():
        monkeypatch.setenv(name, value)
    text = write_text(tmp_path / "text.txt")
    flags = {"ema": 0.9, "parallel": "fsdp", "engine": "torch", "device": "cpu"}
    assert main(train_command(text, tmp_path / "run", **flags)) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("glasslm train: --ema")
    assert "--parallel ddp" in err[-1]
    assert not any("Traceback" in line for line in err)
    assert not (tmp_path / "run").exists()
