"""The recipes of the cookbook change the named settings and are trained as a run would be."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm.config.conversion import to_dict
from glasslm.config.schema import ComputeConfig, DataConfig, EngineName, RunConfig
from glasslm.data.batch_sampler import BatchSampler
from glasslm.data.dataset import Dataset, prepare_dataset
from glasslm.data.sources import corpora
from glasslm.engines.protocol import Batch
from glasslm.lab.diagnosis import gradient_trials, trials
from glasslm.lab.diagnosis.experiments import (
    ALL_TRICKS,
    DEPTHS,
    INIT_SCHEMES,
    NO_TRICKS,
    NO_WARMUP,
    RATES,
    TRICKS,
)
from glasslm.lab.diagnosis.gradient_trials import (
    InitScheme,
    Recipe,
    run_trial,
    scaled_initial_weights,
    underflow_share,
)
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs.run_folder import Run
from glasslm.training import launch
from small_runs import ignore_message, without_report, write_text

NUMPY = ComputeConfig(engine="numpy", threads=1)
ENGINES: tuple[EngineName, ...] = ("numpy", "torch")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        text_file=(str(write_text(tmp_path_factory.mktemp("text") / "small.txt", 300)),)
    )


@pytest.fixture(scope="module")
def dataset(data: DataConfig) -> Dataset:
    return prepare_dataset(data, corpora.find_source(data, ignore_message), ignore_message)


def compute(engine: EngineName) -> ComputeConfig:
    if engine == "torch":
        pytest.importorskip("torch")
    return ComputeConfig(engine=engine, precision="fp32", threads=1)


# -- what is tried ---------------------------------------------------------------------------------


def changed_settings(recipe: Recipe) -> set[str]:
    """The settings in which a recipe's run differs from the good one, first weights included."""
    config, good = (to_dict(which.config(100, 0)) for which in (recipe, ALL_TRICKS))
    names = {key for part in config for key in config[part] if config[part][key] != good[part][key]}
    return names | ({"start"} if recipe.init != ALL_TRICKS.init else set())


def test_each_recipe_changes_what_it_says_and_nothing_else() -> None:
    assert [changed_settings(recipe) for recipe in TRICKS.values()] == [
        set(),
        {"norm"},
        {"start"},
        {"warmup_steps"},
        {"schedule"},
        {"grad_clip"},
        {"norm", "start", "warmup_steps", "schedule", "grad_clip"},
    ]
    for rate, recipe in RATES.items():
        assert changed_settings(recipe) == ({"lr"} if rate != 1 else set())
        assert recipe.config(100, 0).optimizer.lr == pytest.approx(rate * gradient_trials.BASE_LR)
    for recipe in NO_WARMUP.values():
        assert changed_settings(recipe) - {"lr"} == {"warmup_steps"}
    for depth, (pre, post) in DEPTHS.items():
        assert changed_settings(pre) == ({"n_layers"} if depth != ALL_TRICKS.n_layers else set())
        assert changed_settings(post) == changed_settings(pre) | {"norm_position"}
        assert pre.config(100, 0).model.n_layers == depth
    for start, (good, bare) in INIT_SCHEMES.items():
        assert changed_settings(good) | {"start"} == {"start"}
        assert dataclasses.replace(bare, init="unit") == NO_TRICKS
        assert bare.init == good.init == start


def test_without_a_trick_it_is_gone() -> None:
    optimizer = NO_TRICKS.config(100, 0).optimizer
    assert (optimizer.warmup_steps, optimizer.schedule, optimizer.grad_clip) == (0, "constant", 0.0)
    assert ALL_TRICKS.config(100, 0).optimizer.warmup_steps == 10


@pytest.mark.parametrize("start", INIT_SCHEMES)
def test_starts_have_the_variance_that_they_claim(start: InitScheme) -> None:
    config = ALL_TRICKS.config(100, 0).model
    table, first = (
        parameter_table(config, 65),
        dict(initial_weights(parameter_table(config, 65), 3)),
    )
    claimed: dict[str, Callable[[int, int], float]] = {
        "plain": lambda out, into: 0.02**2,
        "xavier": lambda out, into: 2 / (into + out),
        "he": lambda out, into: 2 / into,
        "unit": lambda out, into: 1.0,
    }
    for name, array in scaled_initial_weights(table, start, 3):
        assert array.dtype == np.float32
        assert array.shape == table[name].shape
        if start == "scaled" or array.ndim < 2:
            np.testing.assert_array_equal(array, first[name])
        else:
            assert array.var() == pytest.approx(claimed[start](*array.shape), rel=0.12), name
            assert np.corrcoef(array.ravel(), first[name].ravel())[0, 1] == pytest.approx(
                1
            )  # the same draws


def test_down_is_told_from_up() -> None:
    """He's variance is by what goes in, so that a matrix and its transpose differ."""
    assert gradient_trials.init_std("he", 64, 192) == pytest.approx(math.sqrt(2 / 192))
    assert (
        gradient_trials.init_std("xavier", 64, 192)
        == gradient_trials.init_std("xavier", 192, 64)
        == pytest.approx(math.sqrt(1 / 128))
    )


# -- how it is tried -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_an_attempt_is_the_run_that_its_config_describes(
    engine: EngineName, data: DataConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """Step for step the losses that `glasslm train` would log."""
    config = Recipe(n_layers=2).config(5, 7)
    train = dataclasses.replace(config.train, log_interval=1, sample_interval=0)
    with without_report():
        launch.train(
            RunConfig(config.model, data, config.optimizer, train),
            compute(engine),
            tmp_path / "run",
            notify=ignore_message,
        )
    logged = [line["loss"] for line in Run(tmp_path / "run").metrics() if line["kind"] == "step"]
    trial = run_trial(dataset, compute(engine), Recipe(n_layers=2), 5, 7)
    assert trial.losses == pytest.approx(logged, rel=1e-5)
    assert [snapshot.step for snapshot in trial.snapshots] == [0, 2, 5]
    best = [line["loss"] for line in Run(tmp_path / "run").metrics() if line["kind"] == "eval"]
    assert trial.val_loss == pytest.approx(
        best[-1], rel=1e-4
    )  # a small text is evaluated whole by both


@pytest.mark.parametrize("engine", ENGINES)
def test_divergence_is_an_outcome_and_leaves_nothing_behind(
    engine: EngineName, dataset: Dataset
) -> None:
    before = run_trial(dataset, compute(engine), ALL_TRICKS, 3, 1)
    sick = run_trial(dataset, compute(engine), NO_TRICKS, 3, 1)
    after = run_trial(dataset, compute(engine), ALL_TRICKS, 3, 1)
    assert sick.diverged
    assert sick.val_loss == math.inf
    assert len(sick.losses) < 3
    assert before.losses == after.losses
    assert before.val_loss == after.val_loss
    assert not after.diverged
    assert run_trial(dataset, compute(engine), ALL_TRICKS, 3, 2).losses != after.losses


def test_gradients_of_a_large_batch_are_smaller_and_else_the_same(dataset: Dataset) -> None:
    """The size hardly changes AdamW without clipping; the recorded losses are the mean's."""
    unclipped = Recipe(clip=False)
    small, large = (
        run_trial(dataset, NUMPY, unclipped, 4, 0, size)
        for size in (gradient_trials.ROWS * gradient_trials.BLOCK, 2.0**13)
    )
    assert large.losses[0] == pytest.approx(small.losses[0], rel=1e-6)
    assert large.losses == pytest.approx(small.losses, rel=1e-2)
    assert large.losses[-1] < large.losses[0]


@pytest.mark.parametrize("scale", [1.0, gradient_trials.NO_LOSS_SCALE])
def test_a_loss_scale_is_held_or_left_to_the_engine(
    dataset: Dataset, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    engines: list[Any] = []

    def engine_maker(vocab_size: int, compute: ComputeConfig) -> Callable[[RunConfig], Any]:
        make = real(vocab_size, compute)

        def remembered(config: RunConfig) -> Any:
            engines.append(make(config))
            return engines[-1]

        return remembered

    real = trials.engine_maker
    monkeypatch.setattr(trials, "engine_maker", engine_maker)
    half = ComputeConfig(engine="torch", precision="fp16", device="cpu", threads=1)
    run_trial(dataset, half, Recipe(n_layers=1), 2, 0, gradient_trials.LARGE_BATCH, scale)
    assert engines[0].precision == "fp16"
    assert engines[0].loss_scale == pytest.approx(1) if scale > 1 else engines[0].loss_scale > 1000


@pytest.mark.parametrize("engine", ENGINES)
def test_a_look_sees_the_gradients_that_training_sees(engine: EngineName, dataset: Dataset) -> None:
    config = dataclasses.replace(ALL_TRICKS.config(10, 0))
    table, vocab_size = (
        parameter_table(config.model, dataset.tokenizer.vocab_size),
        dataset.tokenizer.vocab_size,
    )
    machine = trials.engine_maker(vocab_size, compute(engine))(config)
    machine.load(initial_weights(table, 0))
    order, which = (
        BatchSampler(
            len(dataset.train.tokens), gradient_trials.BLOCK, gradient_trials.ROWS, 0, epochs=False
        ),
        np.arange(gradient_trials.ROWS),
    )
    batch = Batch(*order.batch(dataset.train.tokens, 4, which), 4, which)
    snapshot = gradient_trials.take_snapshot(machine, batch, config.model, table)
    others = machine.inspect(
        batch, [f"gradient/{name}" for name in table if not name.startswith("blocks.")]
    )
    stream = np.concatenate(
        [
            array.ravel()
            for array in machine.inspect(batch, [f"gradient/blocks.{i}" for i in range(4)]).values()
        ]
    )
    machine.accumulate(batch, 1 / batch.tokens.size)
    whole = machine.update(0.0).norm
    assert math.hypot(
        *snapshot.norms, *(np.linalg.norm(g) for g in others.values())
    ) == pytest.approx(whole, rel=1e-4)
    assert snapshot.step == 4
    assert snapshot.magnitudes.sum() == np.count_nonzero(stream)
    cast = stream.astype(np.float16)
    assert snapshot.underflow == np.count_nonzero(cast == 0) / stream.size
    assert (
        snapshot.underflow_large
        == np.count_nonzero((stream / np.float32(1024)).astype(np.float16) == 0) / stream.size
    )
    assert snapshot.underflow_large > snapshot.underflow_large_scaled


def test_what_float16_loses_is_what_a_cast_loses() -> None:
    edge = np.array([2.0**-25, 1.01 * 2.0**-25, 2.0**-24, -(2.0**-30), 0.0, 1.0], np.float32)
    assert underflow_share(edge, 1.0) == 2 / 5  # zeros do not count; ties go to even, which is 0
    assert underflow_share(edge, 2.0) == 1 / 5
    assert underflow_share(edge, gradient_trials.LOSS_SCALE) == 0
    assert underflow_share(np.zeros(3, np.float32), 1.0) == 0
    draw = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * np.float32(3e-8)
    assert underflow_share(draw, 1.0) == (draw.astype(np.float16) == 0).mean()
    assert underflow_share(np.array([1e6, np.inf, np.nan], np.float32), 1.0) == 0


def test_magnitudes_are_counted_by_powers_of_two() -> None:
    counts = gradient_trials.magnitude_histogram(
        np.array([1.0, -1.5, 2.0, 0.0, np.nan, 2.0**-20], np.float32)
    )
    counted = {
        int(gradient_trials.EXPONENT_EDGES[i]): int(counts[i]) for i in np.flatnonzero(counts)
    }
    assert counted == {-20: 1, 0: 2, 1: 1}


def test_the_guess_by_frequencies(dataset: Dataset) -> None:
    train, val = dataset.train.tokens[:].tolist(), dataset.val.tokens[:].tolist()
    V = dataset.tokenizer.vocab_size
    by_hand = -sum(math.log((train.count(token) + 1) / (len(train) + V)) for token in val) / len(
        val
    )
    assert gradient_trials.unigram_loss(dataset) == pytest.approx(by_hand)
