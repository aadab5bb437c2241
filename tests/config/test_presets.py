"""The presets' published sizes, at the 65 symbols of character Shakespeare."""

import dataclasses

import pytest

from glasslm.config.presets import PRESETS
from glasslm.config.recipe import LONG_RUN_CHANGES, choose_recipe
from glasslm.engines.choice import resolve_micro_batch_size
from glasslm.errors import InputError
from glasslm.model.parameters import parameter_table

SYMBOLS = 65


def total_parameters(name: str) -> int:
    return parameter_table(PRESETS[name]().model, SYMBOLS).total


def test_the_course_capstone_has_the_printed_parameter_count() -> None:
    """8 layers of 4 x 512² + 2 x 512 x 2048 and two gains; 65 symbols, 256 positions, a gain."""
    assert (
        total_parameters("capstone")
        == 8 * (4 * 512**2 + 2 * 512 * 2048 + 2 * 512) + (65 + 256 + 1) * 512
        == 25_338_880
    )


def test_tiny_at_the_course_settings() -> None:
    model = dataclasses.replace(PRESETS["tiny"]().model, position="none", d_ff=341)
    assert parameter_table(model, SYMBOLS).total == 795_392


def test_nanogpt_counts_what_nanogpt_prints() -> None:
    """`number of parameters: 10.65M`, without positions and with the tied head counted once."""
    model = PRESETS["nanogpt"]().model
    assert (
        f"{(total_parameters('nanogpt') - model.block_size * model.d_model) / 1e6:.2f}" == "10.65"
    )


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("quick", 0.5),
        ("tiny", 0.8),
        ("small", 3.2),
        ("medium", 12.4),
        ("nanogpt", 10.7),
        ("capstone-10m", 9.9),
    ],
)
def test_published_sizes(name: str, millions: float) -> None:
    assert round(total_parameters(name) / 1e6, 1) == millions
    summary = PRESETS[name].__doc__
    assert summary is not None
    assert f"{millions}M" in summary


@pytest.mark.parametrize("name", ["quick", "tiny"])
def test_the_default_stays_where_transformers_can_load_it(name: str) -> None:
    """The families of Llama and Qwen3: RMSNorm before, SwiGLU, rotation, no biases."""
    model = PRESETS[name]().model
    assert (model.norm, model.norm_position, model.feedforward, model.position) == (
        "rmsnorm",
        "pre",
        "swiglu",
        "rope",
    )
    assert not model.bias


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(name: str) -> None:
    run = PRESETS[name]().resolve()
    assert run.train.batch_size % resolve_micro_batch_size(run, "numpy") == 0


def test_the_time_limit_chooses_the_recipe_where_no_size_is_given() -> None:
    assert choose_recipe(None).describe() == ""
    short, long = choose_recipe(None, "2m"), choose_recipe(None, "1h")
    assert (short.preset, short.config) == ("quick", PRESETS["quick"]())
    assert long.preset == "quick"
    model = long.config.model
    assert (model.d_model, model.block_size, model.dropout) == (128, 256, 0.1)
    assert long.config.optimizer == short.config.optimizer
    assert "quick with --d-model 128 --block-size 256 --dropout 0.1" in long.describe()
    assert choose_recipe(None, "1h", ["d_model", "lr"]) == choose_recipe(None)
    assert choose_recipe(None, "1h", ["init_from"]) == choose_recipe(None)
    assert choose_recipe(None, "1h", ["lr"]) == long
    assert choose_recipe("nanogpt", "1h").describe() == ""
    with pytest.raises(InputError, match="90s"):
        choose_recipe(None, "soon")


def test_a_recipe_leaves_given_fields_alone_and_does_not_name_them() -> None:
    recipe = choose_recipe(None, "1h", ["dropout"])
    assert set(recipe.changes) == LONG_RUN_CHANGES.keys() - {"dropout"}
    assert "dropout" not in recipe.describe()
