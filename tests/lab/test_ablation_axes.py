"""The axes of an ablation: a variant changes one thing, and its budget equals the baseline's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glasslm.config.conversion import to_dict
from glasslm.config.schema import RunConfig
from glasslm.errors import InputError
from glasslm.lab.studies.ablation_axes import AXES, Variant, match_budget, variants
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
        ("deep", "choose from depth"),
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


def test_a_variant_is_named_for_a_folder() -> None:
    assert Variant("norm", "rmsnorm/post", base()).name == "norm-rmsnorm-post"
