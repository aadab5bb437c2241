"""The axes of an ablation: a variant changes one thing, and its budget equals the baseline's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from glasslm.config.conversion import to_dict
from glasslm.config.schema import ModelConfig, OptimizerConfig, RunConfig
from glasslm.errors import InputError
from glasslm.lab.studies.ablation_axes import (
    AXES,
    Variant,
    find_axis,
    list_variants,
    match_budget,
    variants,
)
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table
from small_runs import small_config

V = 20


def base(**flags: Any) -> RunConfig:
    return small_config(Path("text.txt"), d_model=64, n_heads=4, n_layers=4, **flags).resolve()


def differing(first: RunConfig, second: RunConfig) -> set[str]:
    parts = [
        (to_dict(first)[part], to_dict(second)[part])
        for part in ("model", "data", "optimizer", "train")
    ]
    return {name for a, b in parts for name in a if a[name] != b[name]}


CHANGED = {
    "depth": {"n_layers"},
    "width": {"d_model", "n_heads", "n_kv_heads", "d_ff"},
    "heads": {"n_heads", "n_kv_heads"},
    "activation": {"feedforward", "d_ff"},
    "norm": {"norm", "norm_position"},
    "position": {"position"},
    "tying": {"tie_embeddings"},
    "optimizer": {"optimizer"},
    "qk_norm": {"qk_norm"},
    "dropout": {"dropout"},
}


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_changes_one_thing_and_leaves_the_baselines_own_value_out(axis: str) -> None:
    planned = variants([axis], base())
    assert len(planned) >= 1
    for variant in planned:
        assert variant.axis == axis
        assert differing(variant.config, base()) <= CHANGED[axis]
        assert variant.config != base()
    if axis == "width":
        assert {variant.config.model.head_size for variant in planned} == {base().model.head_size}
    if axis == "activation":  # a gated one is 8/3 wide, another one 4 times
        assert {variant.config.model.d_ff for variant in planned} == {256}
    assert len({variant.name for variant in planned}) == len(planned)


def test_values_of_ones_own_and_what_cannot_be() -> None:
    assert [variant.config.model.n_layers for variant in variants(["depth=1/3/4"], base())] == [
        1,
        3,
    ]
    assert [variant.value for variant in variants(["norm=none/pre|rmsnorm/post"], base())] == [
        "none/pre",
        "rmsnorm/post",
    ]
    assert "6" not in [
        variant.value for variant in variants(["heads"], base())
    ]  # which does not divide the width
    for wrong, message in (
        ("deep", "did you mean .depth"),
        ("xyz", "choose from depth"),
        ("heads=7", "heads=7"),
        ("depth=x", "depth=x"),
        ("tying=so", "tied"),
    ):
        with pytest.raises(InputError, match=message):
            variants([wrong], base())


def test_what_is_said_to_be_equal_is() -> None:
    start = base(max_steps=1000)
    (deep,) = variants(["depth=8"], start)
    assert match_budget(deep.config, start, "tokens", V, lambda config: 1.0) == deep.config
    by_flops = match_budget(deep.config, start, "flops", V, lambda config: 1.0)
    spent = [
        flops_per_token(config.model, V) * config.train.max_steps for config in (by_flops, start)
    ]
    assert spent[0] == pytest.approx(spent[1], rel=0.01)
    by_time = match_budget(
        deep.config, start, "time", V, lambda config: 0.1 * config.model.n_layers
    )
    assert by_time.train.max_steps == 500
    by_size = match_budget(deep.config, start, "parameters", V, lambda config: 1.0)
    sizes = [
        parameter_table(config.model.resolve(), V).total for config in (by_size, start, deep.config)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert sizes[2] > 1.8 * sizes[1]
    assert by_size.model.n_layers == 8
    (wide,) = variants(["width=128"], start)
    by_depth = match_budget(wide.config, start, "parameters", V, lambda config: 1.0)
    assert (by_depth.model.d_model, by_depth.model.n_layers) == (128, 1)


def test_values_that_cannot_have_equal_parameters_are_left_out_with_a_note() -> None:
    notes: list[str] = []
    planned = list_variants(["width=128/256"], base(), "parameters", V, notes.append)
    assert [variant.value for variant in planned] == ["128"]
    assert notes == [
        "note: width 256 is left out: with --match parameters it has 808,704 parameters at best, "
        "and the baseline 214,848"
    ]
    assert len(list_variants(["width=128/256"], base(), "tokens", V, notes.append)) == 2
    with pytest.raises(InputError, match="no value of --axes can have as many parameters"):
        list_variants(["width=256"], base(), "parameters", V, notes.append)


def test_a_variant_is_named_for_a_folder() -> None:
    assert Variant("norm", "rmsnorm/post", base()).name == "norm-rmsnorm-post"


# -- any flag --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "field", "values"),
    [
        ("n_kv_heads=1/2", "n_kv_heads", [1, 2]),
        ("--n-kv-heads=1/2", "n_kv_heads", [1, 2]),
        ("lr=1e-3/3e-4", "lr", [1e-3, 3e-4]),
        ("weight_decay=0/0.5", "weight_decay", [0.0, 0.5]),
        ("bias=on", "bias", [True]),
        ("bias", "bias", [True]),
        ("tie_embeddings=false", "tie_embeddings", [False]),
        ("qk_norm=true", "qk_norm", [True]),
        ("position=alibi/learned", "position", ["alibi", "learned"]),
        ("schedule=constant/wsd", "schedule", ["constant", "wsd"]),
        ("bias_targets=q/v", "bias_targets", ["q", "v"]),
        ("batch_size=4/16", "batch_size", [4, 16]),
        ("window=4", "window", [4]),
    ],
)
def test_any_flag_is_an_axis(axis: str, field: str, values: list[Any]) -> None:
    planned = variants([axis], base())
    configs = [to_dict(variant.config) for variant in planned]
    parts = next(part for part in ("model", "optimizer", "train") if field in configs[0][part])
    assert [config[parts][field] for config in configs] == values
    name = axis.partition("=")[0].removeprefix("--").replace("-", "_")
    assert {variant.axis for variant in planned} == {name}
    for variant in planned:
        assert field in differing(variant.config, base()) <= {field, "d_ff", "min_lr"}


def test_every_flag_of_the_model_and_optimizer_is_known() -> None:
    for part in (ModelConfig, OptimizerConfig):
        for field in dataclasses.fields(part):
            if field.name not in AXES:
                assert find_axis(field.name)[0] == field.name


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("n_kv_head=1", "no axis or flag 'n_kv_head': did you mean 'n_kv_heads'"),
        ("dept=2", "did you mean 'depth'"),
        ("n_kv_heads=3", "--axes n_kv_heads=3: .*choose --n-kv-heads from 1, 2, 4"),
        ("n_kv_heads=two", "--axes n_kv_heads=two: 'two' is not a number"),
        ("d_model=63", "--axes d_model=63: .*choose --d-model"),
        ("bias=maybe", "--axes bias=maybe: expected one of on, true"),
        ("position=rop", "--axes position=rop: .*expected one of"),
        ("lr=0", "--axes lr=0: lr is 0"),
        ("lr", "--axes lr needs values: give them as lr=A/B"),
        ("lr=", "--axes lr needs values"),
        ("lr=1e-3/1e-3", "was given twice"),
        ("seed=1/2", "cannot vary seed"),
        ("max_steps=10/20", "cannot vary max_steps"),
        ("eval_interval=1", "cannot vary eval_interval"),
        ("tokenizer=byte", "cannot vary tokenizer"),
        ("text_file=a/b", "cannot vary text_file"),
        ("experts_per_token=1/2", "--axes experts_per_token=1: --experts-per-token needs --n-exp"),
        ("lora_alpha=1/2", "--axes lora_alpha=1: --lora-alpha needs --lora-rank"),
        ("--balance-loss=0", "--balance-loss needs --n-experts"),
    ],
)
def test_a_flag_that_cannot_vary_is_named(axis: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        variants([axis], base())


def test_equal_tokens_are_equal_with_another_batch_or_context() -> None:
    start = base(max_steps=1000)
    for variant in variants(["batch_size=4/16", "block_size=8"], start):
        for match in get_args(Literal["tokens", "flops"]):
            matched = match_budget(variant.config, start, match, V, lambda config: 1.0)
            ratio = (
                flops_per_token(start.model, V) / flops_per_token(matched.model, V)
                if match == "flops"
                else 1.0
            )
            assert matched.total_tokens == pytest.approx(ratio * start.total_tokens, rel=0.01)
