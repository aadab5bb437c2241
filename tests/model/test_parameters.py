"""The parameter table: its counts, weight decay, and initial values keyed by (seed, name)."""

import dataclasses

import numpy as np
import pytest

from glasslm.config.schema import ModelConfig
from glasslm.lab.checks.gradient_check import single_switches
from glasslm.model.parameters import INIT_STD, ParameterSpec, initial_weights, parameter_table

V = 65


@pytest.mark.parametrize(("name", "config"), list(single_switches()))
def test_a_switch_changes_no_row_that_two_models_share(name: str, config: ModelConfig) -> None:
    _, base = next(iter(single_switches()))
    ours, theirs = parameter_table(base, V), parameter_table(config, V)
    our_values, their_values = (
        dict(initial_weights(ours, seed=3)),
        dict(initial_weights(theirs, seed=3)),
    )
    shared = [
        key
        for key in ours
        if ours[key] == dataclasses.replace(theirs.get(key, ParameterSpec((0,))), trained=True)
    ]
    assert len(shared) >= 9
    for key in shared:
        np.testing.assert_array_equal(our_values[key], their_values[key])


def test_values_depend_on_seed_and_name() -> None:
    table = parameter_table(ModelConfig(), V)
    first, again, reseeded = (dict(initial_weights(table, seed)) for seed in (1, 1, 2))
    drawn = [key for key, row in table.items() if row.std]
    for key in drawn:
        np.testing.assert_array_equal(first[key], again[key])
        assert (first[key] != reseeded[key]).mean() > 0.99
    q, k = first["blocks.0.attention.q.weight"], first["blocks.0.attention.k.weight"]
    assert (q != k).mean() > 0.99


def test_the_values_are_normal_with_the_deviation_of_the_row() -> None:
    table = parameter_table(ModelConfig(), V)
    for key, array in initial_weights(table, 0, np.float64):
        std = table[key].std
        if std is None:
            assert (array == table[key].fill).all()
        else:
            assert abs(array.std() / std - 1) < 5 / np.sqrt(2 * array.size)
            assert abs(array.mean() / std) < 5 / np.sqrt(array.size)
            assert 3 < np.abs(array).max() / std < 6.5


def test_float32_values_are_the_rounded_float64_ones() -> None:
    table = parameter_table(ModelConfig(n_layers=1), V)
    narrow, wide = (dict(initial_weights(table, 0, dtype)) for dtype in (np.float32, np.float64))
    for key in table:
        assert narrow[key].dtype == np.float32
        np.testing.assert_array_equal(narrow[key], wide[key].astype(np.float32))


def test_residual_outputs_start_smaller_by_the_root_of_the_sublayers() -> None:
    table = parameter_table(ModelConfig(n_layers=8), V)
    for name in ("attention.o", "feedforward.down"):
        assert table[f"blocks.3.{name}.weight"].std == pytest.approx(INIT_STD / 4)
    assert table["blocks.3.attention.q.weight"].std == INIT_STD


@pytest.mark.parametrize(("name", "config"), list(single_switches()))
def test_matrices_decay_and_nothing_else_does(name: str, config: ModelConfig) -> None:
    for key, row in parameter_table(config, V).items():
        hidden = key.startswith("blocks.") and len(row.shape) == 2 and ".lora_" not in key
        assert row.decay == hidden
        assert row.group == ("muon" if hidden and "router" not in key else "adamw")


@pytest.mark.parametrize(("name", "config"), list(single_switches()))
def test_the_five_counts(name: str, config: ModelConfig) -> None:
    table = parameter_table(config, V)
    counts = table.counts()
    assert counts["total"] == sum(np.prod(row.shape) for row in table.values())
    inside = [row.size for key, row in table.items() if key.startswith(("blocks.", "norm."))]
    assert counts["non_embedding"] == sum(inside)
    share = config.experts_per_token / config.n_experts if config.n_experts else 1
    active = {key: row.size * (share if ".experts." in key else 1) for key, row in table.items()}
    assert counts["active"] == round(sum(active.values()))
    multiplied = [
        active[key]
        for key, row in table.items()
        if key.startswith("blocks.") and len(row.shape) == 2
    ]
    assert counts["matmul"] == round(sum(multiplied)) + V * config.d_model  # the head, tied or not
    trained = [row.size for key, row in table.items() if ".lora_" in key or not config.lora_rank]
    assert counts["trained"] == sum(trained)


def test_tying_removes_exactly_the_head() -> None:
    tied, untied = ModelConfig(), ModelConfig(tie_embeddings=False)
    assert set(parameter_table(untied, V)) - set(parameter_table(tied, V)) == {"head.weight"}
    assert parameter_table(untied, V).total - parameter_table(tied, V).total == V * tied.d_model


def test_grouped_queries_shrink_keys_and_values_only() -> None:
    table = parameter_table(ModelConfig(n_kv_heads=1), V)
    assert (
        table["blocks.0.attention.k.weight"].shape
        == table["blocks.0.attention.v.weight"].shape
        == (32, 128)
    )
    assert (
        table["blocks.0.attention.q.weight"].shape
        == table["blocks.0.attention.o.weight"].shape
        == (128, 128)
    )


def test_keys_never_have_a_bias() -> None:
    everything = dataclasses.replace(
        ModelConfig(), bias=True, norm="layernorm", qk_norm=True, position="learned"
    )
    names = set(parameter_table(everything, V))
    assert "blocks.0.attention.q.bias" in names
    assert not any(name.endswith("attention.k.bias") for name in names)
