"""The average of the weights (ema) in both engines: what it is, what it is used for, and how it comes and goes."""

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
from glasslm.data import shards
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch
from glasslm.inference.evaluation import evaluate
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.training import launch
from small_runs import COMPUTE, logged, no_report, quiet, small, words, write_text

Array = np.ndarray[Any, Any]
V, B, T = 11, 4, 6
MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, block_size=T)
ADAPTED = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, block_size=T, lora_rank=2)


@pytest.fixture(params=["numpy", "torch"])
def which(request: pytest.FixtureRequest) -> str:
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


def engine_of(
    which: str, ema: float = 0.6, precision: Precision = "fp64", model: ModelConfig = MODEL
) -> Any:
    config = RunConfig(
        model,
        optimizer=OptimizerConfig(ema=ema),
        train=TrainConfig(batch_size=B, micro_batch_size=2),
    )
    compute = ComputeConfig(engine=which, device="cpu", precision=precision, threads=1)  # type: ignore[arg-type]
    engine = make_engine(config, V, compute, training=True)
    engine.load(initial_weights(parameter_table(config.model, V), 0))
    return engine


def batch(step: int) -> Batch:
    text = np.random.default_rng(step).integers(0, V, (B, T + 1))
    return Batch(text[:, :-1], text[:, 1:], step, np.arange(B))


def train(engine: Any, steps: range) -> None:
    for step in steps:
        engine.accumulate(batch(step), 1 / (B * T))
        assert engine.update(0.01).applied


def copy(engine: Any) -> dict[str, Array]:
    return {name: array.copy() for name, array in engine.state()}


def weights_of(state: dict[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in state.items() if "/" not in name}


def averages_of(state: dict[str, Array]) -> dict[str, Array]:
    return {
        name.removeprefix("ema/"): array for name, array in state.items() if name.startswith("ema/")
    }


def assert_same_bits(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# -- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-14), ("fp32", 1e-6)])
def test_it_is_the_average_of_the_weights_after_each_update(
    which: str, precision: Precision, tolerance: float
) -> None:
    """Written out in float64. Its memory grows with the updates, 2/11, 3/12, 4/13 ..., until it is the one given."""
    engine = engine_of(which, 0.6, precision)
    expected = {name: array.astype(np.float64) for name, array in weights_of(copy(engine)).items()}
    assert_same_bits(averages_of(copy(engine)), weights_of(copy(engine)))
    for update in range(1, 16):  # 0.6 is reached at the 13th
        train(engine, range(update, update + 1))
        decay = (1 + update) / (10 + update) if update < 13 else 0.6
        state = copy(engine)
        for name, array in weights_of(state).items():
            expected[name] = decay * expected[name] + (1 - decay) * array
        assert averages_of(state).keys() == expected.keys()
        for name, array in averages_of(state).items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance, err_msg=name)
    apart = max(
        float(np.abs(expected[name] - array).max()) for name, array in weights_of(state).items()
    )
    assert apart > 1e-3


def test_a_skipped_update_does_not_count(which: str) -> None:
    engine = engine_of(which)
    train(engine, range(2))
    before = copy(engine)
    engine.accumulate(batch(2), 1 / (B * T))
    assert not engine.update(0.01, skip_above=0.0).applied
    assert_same_bits(copy(engine), before)


def test_without_it_nothing_is_kept(which: str) -> None:
    engine = engine_of(which, ema=0.0)
    train(engine, range(1))
    assert averages_of(copy(engine)) == {}


def test_of_frozen_weights_there_is_no_average(which: str) -> None:
    """They are as they were; adapters have one."""
    engine = engine_of(which, model=ADAPTED)
    train(engine, range(3))
    state = copy(engine)
    assert averages_of(state).keys() == weights_of(state).keys()
    assert all(".lora_" in name for name in averages_of(state))
    plain = engine_of(which, ema=0.0, model=ADAPTED)
    frozen = dict(initial_weights(parameter_table(ADAPTED, V), 0))
    plain.load((frozen | averages_of(state)).items())
    np.testing.assert_array_equal(
        engine.losses(batch(9).tokens, batch(9).targets),
        plain.losses(batch(9).tokens, batch(9).targets),
    )


def test_pytorch_remembers_nothing_of_how_it_came_about() -> None:
    """A graph of all updates so far would fill the memory, little by little."""
    pytest.importorskip("torch")
    engine = engine_of("torch")
    train(engine, range(2))
    assert engine.average is not None
    for parameter in [*engine.average.parameters(), *engine.parameters.values()]:
        assert parameter.grad_fn is None
    assert not any(parameter.requires_grad for parameter in engine.average.parameters())


# -- what it is used for ----------------------------------------------------------------------------------------------


def test_all_but_training_uses_the_average(which: str) -> None:
    """Losses and logits are those of a model with the average as its weights; gradients are those of the weights."""
    engine, averaged, raw = engine_of(which), engine_of(which, ema=0.0), engine_of(which, ema=0.0)
    train(engine, range(5))
    state = copy(engine)
    averaged.load(averages_of(state).items())
    raw.load(weights_of(state).items())
    data = batch(9)
    np.testing.assert_array_equal(
        engine.losses(data.tokens, data.targets), averaged.losses(data.tokens, data.targets)
    )
    assert not np.array_equal(
        engine.losses(data.tokens, data.targets), raw.losses(data.tokens, data.targets)
    )

    def logits(of: Any) -> Array:
        rows = np.tile(data.tokens, (5, 1))  # more than are read at once
        cache = of.new_cache(len(rows), T)
        return np.stack(
            [of.logits(rows[:, i : i + 1], cache, np.ones(len(rows), int)) for i in range(T)]
        )

    np.testing.assert_array_equal(logits(engine), logits(averaged))
    assert_same_bits(
        {name: array.copy() for name, array in engine.gradients(data, 0.1).items()},
        dict(raw.gradients(data, 0.1)),
    )
    assert engine.accumulate(data, 0.1).cross_entropy == raw.accumulate(data, 0.1).cross_entropy


# -- state and load ---------------------------------------------------------------------------------------------------


def test_state_and_load_are_a_round_trip(which: str) -> None:
    """The next updates, and with them the number of updates that the decay depends on, give the same bits."""
    engine, other = engine_of(which), engine_of(which)
    train(engine, range(4))
    other.load(copy(engine).items(), engine.updates)
    assert_same_bits(copy(other), copy(engine))
    for one in (engine, other):
        train(one, range(4, 6))
    assert_same_bits(copy(other), copy(engine))


def test_one_engine_goes_on_with_the_average_of_the_other() -> None:
    pytest.importorskip("torch")
    one, other = engine_of("numpy"), engine_of("torch")
    train(one, range(3))
    other.load(copy(one).items(), one.updates)
    for engine in (one, other):
        train(engine, range(3, 6))
    expected = averages_of(copy(one))
    for name, array in averages_of(copy(other)).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-9, err_msg=name)


def test_weights_without_an_average_begin_one(which: str) -> None:
    """Whatever was averaged before."""
    engine = engine_of(which)
    train(engine, range(4))
    begun = weights_of(copy(engine))
    engine.load(begun.items())
    assert_same_bits(averages_of(copy(engine)), begun)
    assert engine.updates == 0


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> run_folder.Run:
    """A run of 12 steps that keeps an average; its last step is its best."""
    folder = tmp_path_factory.mktemp("average")
    text = write_text(folder / "text.txt")
    config = small(
        text, max_steps=12, eval_interval=6, checkpoint_interval=6, sample_interval=12, ema=0.9
    )
    with no_report():
        assert launch.train(config, COMPUTE, folder / "run", say=quiet).status == "finished"
    return run_folder.Run(folder / "run")


def test_a_checkpoint_holds_both(run: run_folder.Run) -> None:
    """`weights` are for use, `state` is for going on."""
    held = checkpoint.load(run.path, 12)
    last = load_file(held.path / "model.safetensors")
    averages = averages_of(load_file(held.path / "optimizer.safetensors"))
    assert_same_bits(held.weights(), averages)
    state = dict(held.state())
    assert_same_bits(weights_of(state), last)
    assert_same_bits(averages_of(state), averages)
    assert any(not np.array_equal(last[name], averages[name]) for name in last)


def test_what_is_evaluated_and_written_is_the_average(run: run_folder.Run) -> None:
    """By a model without an average, which was given the files; and not what the last weights come to."""
    dataset = shards.of_run(run.config.data, run.record["data"], run.tokenizer, quiet)
    flags = small(Path("unused"), ema=0.0)
    config = RunConfig(run.config.model, run.config.data, flags.optimizer, flags.train)
    engine = make_engine(config, run.tokenizer.vocab_size, COMPUTE)
    folder = checkpoint.load(run.path, 12).path
    losses = []
    for weights in (
        averages_of(load_file(folder / "optimizer.safetensors")),
        load_file(folder / "model.safetensors"),
    ):
        engine.load(weights.items())
        score = evaluate(
            engine, dataset.val.tokens, dataset.tokenizer.byte_lengths, run.config.model.block_size
        )
        losses.append(score.loss)
    line = logged(run.path, "eval")[-1]
    assert (line["step"], line["whole"]) == (12, True)
    assert line["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-3
    model = glasslm.load(run.path, "latest", engine="numpy", threads=1)
    assert model.score(dataset.val.tokens).loss == pytest.approx(losses[0], rel=1e-6)
    sample = logged(run.path, "sample")[-1]
    assert sample["step"] == 12
    assert (
        model.generate("", 200, temperature=sample["temperature"], seed=sample["seed"])
        == sample["text"]
    )


def test_fsdp_refuses_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As rank 0 of two, before it waits for the other."""
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
    assert main(words(text, tmp_path / "run", **flags)) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("glasslm train: --ema")
    assert "--parallel ddp" in err[-1]
    assert not any("Traceback" in line for line in err)
    assert not (tmp_path / "run").exists()
