"""Flags as people type them: one line says what cannot be, and nothing is overridden in silence."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from glasslm.cli.parsing import parse, value_of
from glasslm.config.schema import ALIASES, ModelConfig, OptimizerConfig, TrainConfig
from glasslm.errors import InputError


@dataclass(frozen=True)
class Flags:
    """Some of the flags that there are."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mode: Literal["fast", "slow"] = "fast"
    stop: tuple[str, ...] = ()


def parsed(*argv: str, repeatable: tuple[str, ...] = ()) -> Flags:
    return parse(Flags, list(argv), "glasslm try", "What it does.", repeatable=repeatable)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--lr fast", "--lr: could not convert string to float: 'fast'"),
        ("--n-layers 2.5", "--n-layers: invalid literal for int() with base 10: '2.5'"),
        (
            "--mode slwo",
            "invalid choice 'slwo' for argument '--mode'. Expected one of ('fast', 'slow').",
        ),
        ("--lr", "Missing value for argument '--lr'. Expected 1 values."),
        ("--n-layer 2", "Unrecognized options: --n-layer, 2: did you mean --n-layers?"),
        (
            "--n-layer 2 --lrr 1",
            "Unrecognized options: --n-layer, 2, --lrr, 1: did you mean --lr and --n-layers?",
        ),
        ("--xyzzy", "Unrecognized options: --xyzzy: see glasslm try --help"),
        ("nothing", "Unrecognized options: nothing: see glasslm try --help"),
        ("--max-steps 0", "max_steps is 0: expected at least 1"),
    ],
)
@pytest.mark.parametrize("columns", ["30", "200"])
def test_what_cannot_be_is_one_line(
    argv: str, says: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(InputError) as caught:
        parsed(*argv.split())
    assert str(caught.value) == says


def test_colours_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(InputError) as caught:
        parsed("--lr", "fast")
    assert str(caught.value).isprintable()


def test_a_long_message_is_whole_and_one_line() -> None:
    with pytest.raises(InputError) as caught:
        parsed("--d-model", "130")
    assert str(caught.value) == (
        "d_model is 130, which 4 heads do not divide: choose --d-model as a multiple of --n-heads, for example 128"
    )


@pytest.mark.parametrize(
    "argv",
    [
        "--lr 1 --lr 2",
        "--lr=1 --lr 2",
        "--n-layers 2 --n_layers 3",
        "--seq-len 64 --block-size 128",
        "--block_size=64 --seq_len=128",
        "--tie-embeddings --no-tie-embeddings",
        "--no-tie-embeddings --no_tie_embeddings",
    ],
)
def test_a_setting_given_twice_is_refused_however_it_is_written(argv: str) -> None:
    words = argv.split()
    with pytest.raises(InputError, match="give it once") as caught:
        parsed(*words)
    for flag in (
        words[0].partition("=")[0],
        words[-2 if words[-1][0] != "-" else -1].partition("=")[0],
    ):
        assert flag in str(caught.value)


def test_what_may_be_repeated_and_what_only_looks_alike_pass() -> None:
    assert parsed("--stop", "a", "--stop", "b", repeatable=("--stop",)).stop == (
        "b",
    )  # as the field's type says
    flags = parsed("--norm", "layernorm", "--norm-position", "post", "--seq-len", "64", "--no-bias")
    assert (flags.model.norm, flags.model.block_size, flags.model.bias) == ("layernorm", 64, False)


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_a_flag(alias: str) -> None:
    assert getattr(parsed(f"--{alias.replace('_', '-')}", "7").model, ALIASES[alias]) == 7


def test_help_ends_the_program_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parsed("--help")
    assert not left.value.code
    assert "What it does." in capsys.readouterr().out


def test_one_value_before_the_rest_is_parsed() -> None:
    assert value_of("--preset", ["--lr", "1", "--preset", "small"], "tiny") == "small"
    assert value_of("--preset", ["--preset=small"], "tiny") == "small"
    assert value_of("--preset", ["--preset"], "tiny") == "tiny"


def test_a_forgotten_path_is_refused() -> None:
    for argv in (["--text-file"], ["--text-file", "--lr", "1e-3"]):
        with pytest.raises(InputError, match="--text-file has no value"):
            parse(Flags, argv, "glasslm train", "")
