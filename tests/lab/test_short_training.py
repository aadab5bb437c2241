"""The short training loop: the steps of an engine, one after the other, on the batches of a run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from planted import config_of, planted_input

from glasslm.lab.short_training import mean_weight, sampled_batches, train_step, train_steps
from glasslm.training.learning_rate import lr_at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


def test_it_computes_what_the_engine_computes_by_itself(folder: Path) -> None:
    config = config_of(dropout=0.1)
    target = planted_input(folder, config)
    batch_of = sampled_batches(target.dataset, config.model.block_size, 8, config.train.seed)
    loop, by_hand = (target.trial_setup.new_engine(config) for _ in range(2))
    steps = train_steps(loop, batch_of, lambda step: lr_at(step, config.optimizer, 80), 3)
    for step, (losses, update) in enumerate(steps):
        batch = batch_of(step)
        expected = by_hand.accumulate(batch, 1 / batch.targets.size)
        assert losses.cross_entropy == expected.cross_entropy
        assert update == by_hand.update(lr_at(step, config.optimizer, 80))
    pairs = zip(loop.state(), by_hand.state())
    assert all(np.array_equal(ours[1], theirs[1]) for ours, theirs in pairs)


def test_its_batches_are_those_of_a_run(folder: Path) -> None:
    target = planted_input(folder, config_of())
    batch = sampled_batches(target.dataset, 32, 8, target.config.train.seed)(3)
    expected = target.batch(3, 8)
    np.testing.assert_array_equal(batch.tokens, expected.tokens)
    np.testing.assert_array_equal(batch.targets, expected.targets)
    assert (batch.step, batch.rows.tolist()) == (3, list(range(8)))


def test_the_weight_is_that_of_a_mean_over_the_targets(folder: Path) -> None:
    target = planted_input(folder, config_of())
    batch = target.batch(0, 2)
    masked = batch.targets.copy()
    masked[0, :30] = -1
    masked_batch = batch._replace(targets=masked)
    assert mean_weight(masked_batch) == 1 / (masked.size - 30)
    assert mean_weight(batch._replace(targets=np.full_like(masked, -1))) == 1
    config = dataclasses.replace(target.config)
    losses, _ = train_step(target.trial_setup.new_engine(config), masked_batch, 1e-3)
    nats = target.trial_setup.new_engine(config).losses(masked_batch.tokens, masked)
    assert losses.cross_entropy == pytest.approx(nats.sum() / (masked.size - 30), rel=1e-5)
