"""Measurements against plain references, and verdicts on both sides of each threshold."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import planted
import pytest
from planted import config_of, planted_input

from glasslm.config.schema import FeedForward, RunConfig
from glasslm.engines.protocol import Batch, Engine
from glasslm.lab.diagnosis import measurements, signals
from glasslm.lab.diagnosis.measurements import Measurement, UnitStatistics
from glasslm.model.parameters import parameter_table

ENGINES = ["numpy", "torch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


def ready(
    folder: Path, config: RunConfig, engine: str = "numpy", weights: Any = None
) -> tuple[Engine, Batch, int]:
    if engine == "torch":
        pytest.importorskip("torch")
    target = planted_input(folder, config, weights or (lambda name, array: array), engine)
    return target.trial_setup.new_engine(config), target.batch(0, 4), target.vocab_size


def louder(name: str, array: Any) -> Any:
    """So that attention is far from uniform."""
    return array * np.float32(5) if "attention" in name and array.ndim == 2 else array


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "changes", [{}, {"window": 5}, {"norm_position": "post", "tie_embeddings": False}]
)
def test_a_reading_is_what_a_plain_reader_computes(
    engine: str, changes: dict[str, Any], folder: Path
) -> None:
    config = config_of(**changes)
    machine, batch, V = ready(folder, config, engine, louder)
    table = parameter_table(config.model, V)
    measurement = measurements.measure_model(machine, batch, config.model, table, step=7)
    assert measurement.loss == pytest.approx(
        float(machine.losses(batch.tokens, batch.targets).mean()), rel=1e-5
    )
    arrays = machine.inspect(
        batch, ["blocks.1.attention.weights", "blocks.1.attention.scores", "blocks.0", "logits"]
    )
    weights = arrays["blocks.1.attention.weights"].astype(np.float64)
    shares = []
    for t in range(1, weights.shape[2]):
        visible = min(t + 1, config.model.window or t + 1)
        p = weights[:, :, t, t + 1 - visible : t + 1]
        shares.append(-(p * np.log(p)).sum(-1) / math.log(visible))
    np.testing.assert_allclose(measurement.entropy[1], np.mean(shares, (0, 1)), rtol=1e-5)
    np.testing.assert_allclose(
        measurement.max_score[1], arrays["blocks.1.attention.scores"].max((0, 2, 3))
    )
    assert measurement.stream_rms[1] == pytest.approx(
        np.sqrt((arrays["blocks.0"].astype(np.float64) ** 2).mean())
    )
    assert measurement.logit_max == pytest.approx(np.abs(arrays["logits"]).max())
    whole = math.sqrt(sum(norm**2 for norm in measurement.gradient_norms.values()))
    machine.accumulate(
        batch, 1 / batch.targets.size
    )  # without dropout in this config, so the same gradient
    assert whole == pytest.approx(machine.update(0.0).norm, rel=1e-4)


def test_attention_that_sees_all_alike_has_the_whole_entropy(folder: Path) -> None:
    """Zero queries: every visible key weighs the same."""
    config = config_of(position="none")
    machine, batch, V = ready(
        folder, config, weights=lambda name, array: array * ("attention.q" not in name)
    )
    measurement = measurements.measure_model(
        machine, batch, config.model, parameter_table(config.model, V), 0
    )
    np.testing.assert_allclose(measurement.entropy, 1, rtol=1e-6)
    assert signals.judge_attention_entropy(measurement, V).verdict == "ok"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "changes", [{}, {"n_experts": 4}, {"window": 6}, {"position": "alibi", "attention": "flash"}]
)
def test_our_models_are_causal_and_a_leak_is_not(
    engine: str, changes: dict[str, Any], folder: Path
) -> None:
    machine, batch, V = ready(folder, config_of(**changes), engine, louder)
    assert signals.judge_causality(machine, batch, V).verdict == "ok"
    assert signals.judge_causality(planted.Leaky(machine), batch, V).verdict == "bad"  # type: ignore[arg-type]


def test_targets_are_the_next_tokens_or_named_as_what_they_are(folder: Path) -> None:
    batch = planted_input(folder, config_of()).batch(3, 5)
    assert signals.judge_targets(batch).verdict == "ok"
    masked = batch.targets.copy()
    masked[:, :9] = -1
    assert signals.judge_targets(batch._replace(targets=masked)).verdict == "ok"
    same = signals.judge_targets(batch._replace(targets=batch.tokens))
    assert (same.verdict, same.meaning) == ("bad", "the model learns to copy its input")
    assert (
        signals.judge_targets(batch._replace(targets=np.roll(batch.targets, 1, 0))).verdict == "bad"
    )


def test_the_first_loss_allows_for_a_tied_head_and_not_for_large_weights(folder: Path) -> None:
    """A wide, shallow, tied model repeats what it reads; that is mentioned, and is no fault."""
    config = config_of(d_model=192, n_layers=1)
    machine, batch, V = ready(folder, config)
    measurement = measurements.measure_model(
        machine, batch, config.model, parameter_table(config.model, V), 0
    )
    assert measurement.loss - measurement.loss_without_copy > 0.1
    finding = signals.judge_initial_loss(measurement, V, config.model, 0.02)
    assert (finding.verdict, "tied head" in finding.evidence) == ("ok", True)
    uniform = math.log(V)
    for over, verdict in (
        (0.0, "ok"),
        (0.3, "watch"),
        (0.7, "bad"),
        (-0.7, "bad"),
        (math.nan, "bad"),
    ):
        moved = dataclasses.replace(measurement, loss_without_copy=uniform + over)
        assert signals.judge_initial_loss(moved, V, config.model, 0.02).verdict == verdict


@pytest.mark.parametrize("engine", ENGINES)
def test_exactly_the_closed_units_are_dead(engine: str, folder: Path) -> None:
    config = config_of(feedforward="relu", bias=True)

    def close(name: str, array: Any) -> Any:
        if name == "blocks.1.feedforward.up.bias":
            array[:48] = -10
        return array

    machine, _, _ = ready(folder, config, engine, close)
    target = planted_input(folder, config)
    units, tokens = measurements.measure_units(
        machine, (target.batch(step, 8) for step in range(4)), config.model
    )
    assert tokens == 4 * 8 * 32  # to the end, because some never opened
    assert units["blocks.1.feedforward"].dead_share(0.0) == 48 / 192
    assert units["blocks.0.feedforward"].dead_share(0.0) == 0
    finding = signals.judge_dead_units(units, tokens, config.model, 5)
    assert finding.verdict == "watch"
    assert "25.0%" in finding.evidence
    machine, _, _ = ready(folder, config, engine)
    _, tokens = measurements.measure_units(
        machine, (target.batch(step, 8) for step in range(40)), config.model
    )
    assert tokens < 40 * 8 * 32  # all open: no need to go on


def test_every_feedforward_has_a_threshold_a_new_one_included() -> None:
    words = (*get_args(FeedForward), "a new one")
    assert {word: measurements.opening_threshold(word) for word in words} == {
        word: 0.0 if word.startswith("relu") else -3.0 for word in words
    }


def test_units_with_a_constant_value_are_saturated(folder: Path) -> None:
    config = config_of(feedforward="gelu")
    spread = np.r_[np.zeros(60), np.ones(40)]
    units = {"blocks.0.feedforward": UnitStatistics(np.full(100, 2.0), spread, 1.0)}
    assert signals.judge_dead_units(units, 99, config.model, 0).meaning.startswith("saturated")
    units = {"blocks.0.feedforward": UnitStatistics(np.full(100, 2.0), np.ones(100), 1.0)}
    assert signals.judge_dead_units(units, 99, config.model, 0).verdict == "ok"


@pytest.fixture(scope="module")
def measurement(folder: Path) -> Measurement:
    config = config_of()
    machine, batch, V = ready(folder, config)
    return measurements.measure_model(
        machine, batch, config.model, parameter_table(config.model, V), 100
    )


def test_verdicts_change_where_they_say(measurement: Measurement) -> None:
    c, table = config_of().model, parameter_table(config_of().model, 20)

    def changed(**fields: Any) -> Measurement:
        return dataclasses.replace(measurement, **fields)

    for largest, verdict in ((49, "ok"), (51, "watch"), (101, "bad"), (math.nan, "bad")):
        assert (
            signals.judge_attention_logits([changed(max_score=np.full((2, 3), largest))]).verdict
            == verdict
        )
    for entropy, loss, verdict in ((0.04, 3.0, "bad"), (0.04, 0.5, "watch"), (0.06, 3.0, "ok")):
        assert (
            signals.judge_attention_entropy(
                changed(entropy=np.full((2, 3), entropy), loss=loss), 20
            ).verdict
            == verdict
        )
    for end, step, verdict in (
        (0.3, 0, "ok"),
        (0.6, 0, "watch"),
        (0.6, 9, "ok"),
        (30, 9, "watch"),
        (300, 9, "bad"),
    ):
        stream = np.array([0.02, 0.02, end])
        assert (
            signals.judge_depth(
                changed(stream_rms=stream, added_rms=stream[1:, None] + [0, 0], step=step), c
            ).verdict
            == verdict
        )
    for std, verdict in ((0.3, "ok"), (1.5, "watch"), (3.0, "bad"), (0.01, "watch"), (0.0, "bad")):
        assert signals.judge_initialization(changed(logit_std=std)).verdict == verdict
    for factor, verdict in ((1, "ok"), (1e-2, "watch"), (1e-4, "bad")):
        norms = {
            name: norm * (factor if ".0." in name else 1)
            for name, norm in measurement.gradient_norms.items()
        }
        finding = signals.judge_gradients(changed(gradient_norms=norms), c, table)
        assert finding.verdict == verdict
        assert verdict == "ok" or "vanish" in finding.meaning
    for log_z, verdict in ((5, "ok"), (-40, "watch"), (101, "bad")):
        assert signals.judge_output_logits([changed(log_z=log_z)]).verdict == verdict


def test_a_block_that_adds_nothing_is_found(measurement: Measurement) -> None:
    added = measurement.added_rms.copy()
    added[1] = 0
    finding = signals.judge_depth(
        dataclasses.replace(measurement, added_rms=added), config_of().model
    )
    assert finding.verdict == "bad"
    assert "block 1" in finding.evidence


@pytest.mark.parametrize(("scale", "is_bad"), [(1e-6, False), (0.0, True)])
def test_the_norm_after_an_output_gives_it_another_size(
    measurement: Measurement, scale: float, is_bad: bool
) -> None:
    small = dataclasses.replace(measurement, added_rms=scale * measurement.added_rms)
    c = config_of(norm_position="sandwich").model
    assert (signals.judge_depth(small, c).verdict == "bad") == is_bad


def test_an_adapter_that_waits_for_its_other_half_is_not_cut_off(measurement: Measurement) -> None:
    config = config_of(lora_rank=2)
    table = parameter_table(config.model, 20)
    gradients = {name: float(name.endswith("lora_b")) for name, row in table.items() if row.trained}
    first = dataclasses.replace(measurement, gradient_norms=gradients, step=0)
    assert signals.judge_gradients(first, config.model, table).verdict == "ok"
    assert (
        signals.judge_gradients(dataclasses.replace(first, step=1), config.model, table).verdict
        == "bad"
    )
