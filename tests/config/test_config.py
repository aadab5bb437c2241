"""Configuration: which values are refused, the messages, and the way through JSON and flags."""

import dataclasses
import json
import math
import re
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.cli import help_text
from glasslm.cli.help_text import (
    IMPORTED_MODEL_FIELDS,
    IMPORTED_MODEL_TITLE,
    field_docstrings,
    format_help,
    list_groups,
)
from glasslm.cli.train import parse
from glasslm.config import schema
from glasslm.config.conversion import from_dict, to_dict, with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import (
    ComputeConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.config.units import parse_duration
from glasslm.errors import InputError

PARTS = (ModelConfig, DataConfig, OptimizerConfig, TrainConfig)

REFUSED: list[tuple[type[Any], dict[str, Any], str]] = [
    (ModelConfig, {"d_model": 0}, "at least 1"),
    (ModelConfig, {"n_layers": -1}, "at least 1"),
    (ModelConfig, {"d_model": 130}, "--d-model"),
    (ModelConfig, {"n_kv_heads": 3}, "1, 2, 4"),
    (ModelConfig, {"d_model": 12, "n_heads": 4}, "--position"),
    (ModelConfig, {"d_model": 15, "n_heads": 1, "position": "sinusoidal"}, "even"),
    (ModelConfig, {"dropout": 1.0}, "below 1"),
    (ModelConfig, {"attention_dropout": float("nan")}, "below 1"),
    (ModelConfig, {"norm": "batchnorm"}, "rmsnorm, layernorm"),
    (ModelConfig, {"bias": 1}, "bool"),
    (ModelConfig, {"d_model": 64.0}, "int"),
    (ModelConfig, {"d_model": True}, "int"),
    (ModelConfig, {"d_mdoel": 64}, "did you mean 'd_model'"),
    (DataConfig, {"val_fraction": 0.0}, "above 0"),
    (DataConfig, {"val_fraction": 0.5, "test_fraction": 0.5}, "left to train on"),
    (DataConfig, {"vocab_size": 256}, "257"),
    (DataConfig, {"special_tokens": ("<e>", " \n")}, "blanks"),
    (DataConfig, {"special_tokens": ("x" * 257,)}, "256"),
    (DataConfig, {"vocab_size": 2**31}, "at most 1,048,576"),
    (ModelConfig, {"window": 2**63}, "window"),
    (DataConfig, {"corpus": "python", "text_file": ["a"]}, "choose one"),
    (DataConfig, {"encoding_errors": "ignore"}, "strict, replace"),
    (OptimizerConfig, {"lr": float("nan")}, "above 0"),
    (OptimizerConfig, {"lr": -1e-3}, "above 0"),
    (OptimizerConfig, {"lr": 0}, "above 0"),
    (OptimizerConfig, {"lr": "fast"}, "float"),
    (OptimizerConfig, {"lr": math.inf}, "finite"),
    (OptimizerConfig, {"weight_decay": math.inf}, "finite"),
    (OptimizerConfig, {"grad_clip": math.inf}, "finite"),
    (OptimizerConfig, {"min_lr": 1.0}, "between 0 and lr"),
    (OptimizerConfig, {"betas": [0.9]}, "2 values"),
    (OptimizerConfig, {"betas": [0.9, 1.0]}, "below 1"),
    (OptimizerConfig, {"momentum": float("nan")}, "below 1"),
    (OptimizerConfig, {"weight_decay": float("nan")}, "0 or more"),
    (OptimizerConfig, {"grad_clip": -1.0}, "0 (off) or more"),
    (OptimizerConfig, {"warmup_steps": -1}, "0 or more"),
    (TrainConfig, {"batch_size": 0}, "at least 1"),
    (TrainConfig, {"seed": -1}, "0 or more"),
    (TrainConfig, {"seed": 2**64}, "below 2**64"),
    (TrainConfig, {"epochs": 0.0}, "above 0"),
    (TrainConfig, {"epochs": math.inf}, "finite"),
    (TrainConfig, {"stop_at_loss": math.inf}, "finite"),
    (TrainConfig, {"max_time": "9" * 400 + "h"}, "90s, 10m or 2h"),
    (TrainConfig, {"max_time": "1" * 100 + "x"}, "90s, 10m or 2h"),
    (TrainConfig, {"patience": 0}, "at least 1"),
    (TrainConfig, {"stop_at_loss": float("nan")}, "above 0"),
    (TrainConfig, {"max_time": "soon"}, "90s, 10m or 2h"),
    (TrainConfig, {"max_time": "0m"}, "90s, 10m or 2h"),
    (TrainConfig, {"max_time": "1m", "epochs": 1.0}, "choose one"),
    (RunConfig, {"model": {"d_mdoel": 64}}, "did you mean 'd_model'"),
    (RunConfig, {"training": {}}, "did you mean 'train'"),
    (ComputeConfig, {"threads": -1}, "automatic"),
    (ComputeConfig, {"precision": "fp8"}, "fp32"),
]


@pytest.mark.parametrize(("kind", "values", "cure"), REFUSED)
def test_impossible_values_are_refused_with_the_cure(
    kind: type[Any], values: dict[str, Any], cure: str
) -> None:
    with pytest.raises(InputError) as refusal:
        from_dict(kind, values)
    message = str(refusal.value)
    assert cure in message
    assert "\n" not in message
    assert refusal.value.exit_code == 2
    assert isinstance(refusal.value, ValueError)


def test_the_refusal_names_field_and_value() -> None:
    with pytest.raises(InputError, match=r"dropout is 1\.5"):
        ModelConfig(dropout=1.5)
    with pytest.raises(InputError, match=r"lr is nan"):
        OptimizerConfig(lr=float("nan"))


@pytest.mark.parametrize("name", PRESETS)
def test_json_gives_the_same_config_back(name: str) -> None:
    preset = PRESETS[name]()
    for run in (
        preset,
        preset.resolve(),
        with_flags(preset, {"text_file": ("a", "b"), "max_time": "2h"}),
    ):
        text = json.dumps(to_dict(run))
        assert from_dict(RunConfig, json.loads(text)) == run
        assert json.dumps(to_dict(from_dict(RunConfig, json.loads(text)))) == text


def test_an_older_run_that_lacks_a_field_still_reads() -> None:
    values = to_dict(RunConfig())
    del values["model"]["qk_norm"]
    assert from_dict(RunConfig, values) == RunConfig()


def test_field_names_are_unique_because_the_flags_are_flat() -> None:
    names = [field.name for part in (*PARTS, ComputeConfig) for field in dataclasses.fields(part)]
    assert len(names) == len(set(names))


def test_every_field_has_a_help_text() -> None:
    for part in (*PARTS, ComputeConfig):
        assert set(field_docstrings(part)) == {field.name for field in dataclasses.fields(part)}
        for text in field_docstrings(part).values():
            for line in text.split("\n"):  # --help breaks the line there, too
                assert line.strip()[0].isupper()


@pytest.mark.parametrize("part", [*PARTS, ComputeConfig])
def test_help_shows_choices_and_defaults_as_values(part: type[Any]) -> None:
    shown = format_help(part, "glasslm", "", None, every_flag=True)
    for field in dataclasses.fields(part):
        is_shown = f"--{field.name.replace('_', '-')}" in re.split("[ ,\n]", shown)
        assert is_shown != (field.name == "document_end_id")  # is set at launch; no flag
    for word in ("{None}", "default: None", "default: )"):
        assert word not in shown


def test_a_choice_that_may_be_left_out_shows_its_words() -> None:
    """Literal | None is a typing.Union, and int | None a types.UnionType."""

    @dataclasses.dataclass
    class Flags:
        part: Literal["run", "ablation"] | None = None
        steps: int | None = None

    shown = {name: help_text._metavar(hint) for name, hint in get_type_hints(Flags).items()}
    assert shown == {"part": "run|ablation", "steps": "INT"}


def test_flags_of_imported_models_stand_below_their_own_heading() -> None:
    groups = {group.title: group.flags for group in list_groups(ModelConfig)}
    imported = {flag.field for flag in groups[IMPORTED_MODEL_TITLE]}
    assert imported == IMPORTED_MODEL_FIELDS
    assert len(groups) == 2


def test_flags_by_flat_names() -> None:
    run = with_flags(
        RunConfig(), {"lr": 1, "d_model": 64, "text_file": "a.txt", "betas": [0.9, 0.99], "seed": 7}
    )
    assert run.optimizer.lr == 1.0
    assert isinstance(run.optimizer.lr, float)
    assert run.model.d_model == 64
    assert run.data.text_file == ("a.txt",)
    assert run.optimizer.betas == (0.9, 0.99)
    assert run.train == TrainConfig(seed=7)
    with pytest.raises(InputError, match="did you mean 'n_layers'"):
        with_flags(RunConfig(), {"n_layer": 2})


def test_the_order_of_flags_does_not_matter() -> None:
    """Six heads do not divide the width of 128 that stands there before."""
    for flags in ({"n_heads": 6, "d_model": 384}, {"d_model": 384, "n_heads": 6}):
        assert with_flags(RunConfig(), flags).model == ModelConfig(d_model=384, n_heads=6)
    assert with_flags(RunConfig(), {"min_lr": 0.02, "lr": 0.1}).optimizer.min_lr == 0.02


def test_numbers_of_numpy_and_aliases_of_fields_are_accepted() -> None:
    flags = {
        "seq_len": np.int64(64),
        "lr": np.float32(0.5),
        "qk_norm": np.bool_(True),
        "betas": np.array([0.5, 0.75]),
    }
    run = with_flags(RunConfig(), flags)
    assert run == with_flags(
        RunConfig(), {"block_size": 64, "lr": 0.5, "qk_norm": True, "betas": (0.5, 0.75)}
    )
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    with pytest.raises(InputError, match="block_size was given twice"):
        with_flags(RunConfig(), {"seq_len": 64, "block_size": 64})
    hints = get_type_hints(ModelConfig, include_extras=True)
    for alias, field in schema.ALIASES.items():
        assert hints[field].__metadata__[0].aliases == ("--" + alias.replace("_", "-"),)


def test_the_min_lr_of_a_preset_scales_down_with_lr() -> None:
    for lr in (5e-5, 1e-6):
        by_name = with_flags(PRESETS["nanogpt"](), {"lr": lr}).optimizer
        assert by_name.min_lr == pytest.approx(lr / 10)
        assert by_name == parse(["--preset", "nanogpt", "--lr", str(lr)]).optimizer
        assert by_name == parse([f"--lr={lr}", "--preset=nanogpt"]).optimizer
    assert with_flags(PRESETS["nanogpt"](), {"lr": 2e-4}).optimizer.min_lr == 1e-4  # no need
    assert (
        parse(["--preset", "nanogpt", "--lr", "5e-5", "--min-lr", "4e-5"]).optimizer.min_lr == 4e-5
    )
    with pytest.raises(InputError, match="between 0 and lr"):
        with_flags(PRESETS["nanogpt"](), {"lr": 5e-5, "min_lr": 1e-4})


def test_explicit_flags_beat_the_preset_and_leave_the_rest_of_it() -> None:
    flags = parse(["--n-layers", "2", "--preset", "nanogpt", "--lr", "0.002"])
    preset = PRESETS["nanogpt"]()
    assert flags.model == dataclasses.replace(preset.model, n_layers=2)
    assert flags.optimizer == dataclasses.replace(preset.optimizer, lr=0.002)
    assert flags.train == preset.train


def test_aliases_of_the_course() -> None:
    course = "--seq-len 64 --epochs 50 --lr 3e-4 --d-model 256 --n-layers 6 --text-file a.txt b.txt"
    flags = parse(
        [
            *course.split(),
            "--sample-interval",
            "5",
            "--log-interval",
            "1",
            "--no-tie-embeddings",
            "--qk-norm",
        ]
    )
    assert flags.model.block_size == 64
    assert flags.train.epochs == 50
    assert flags.data.text_file == ("a.txt", "b.txt")
    assert flags.model.qk_norm
    assert not flags.model.tie_embeddings


def test_every_switch_of_the_model_is_a_flag() -> None:
    for field, hint in get_type_hints(ModelConfig).items():
        for value in get_args(hint):
            if isinstance(value, str):
                extra_flags = (
                    ["--rope-factor", "2"] if field == "rope_scaling" and value != "none" else []
                )
                assert (
                    getattr(
                        parse(["--" + field.replace("_", "-"), value, *extra_flags]).model, field
                    )
                    == value
                )


@given(st.floats(0.001, 1e5), st.sampled_from("smh"))
def test_durations(number: float, unit: str) -> None:
    text = f"{number:.6f}"
    assert parse_duration(text + unit) == float(text) * {"s": 1, "m": 60, "h": 3600}[unit]
    assert parse_duration(f" {text} ") == float(text)


def test_durations_in_every_notation() -> None:
    durations = {"1h30m": 5400, "10min": 600, ".5m": 30, "2h 5m 3s": 7503, "1.5h": 5400, "5.m": 300}
    assert {text: parse_duration(text) for text in durations} == durations
    for text in ("1h30", "h", "", "-5m", "1m-2s", "1e3s", "nan", "0h0m"):
        with pytest.raises(InputError, match="90s, 10m"):
            parse_duration(text)


def test_resolve_writes_out_derived_sizes() -> None:
    assert ModelConfig().resolve().d_ff == 352  # 8/3 of 128 is 341.3
    assert ModelConfig(feedforward="gelu").resolve().d_ff == 512
    assert ModelConfig().resolve().n_kv_heads == 4
    assert ModelConfig(d_ff=100, n_kv_heads=2).resolve() == ModelConfig(d_ff=100, n_kv_heads=2)
    run = RunConfig(model=ModelConfig(block_size=64), train=TrainConfig(batch_size=4)).resolve()
    assert run.resolve() == run
