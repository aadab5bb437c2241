"""Flags to a dataclass, with one-line errors; presets and recipes as the defaults of flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from glasslm.config import recipe
from glasslm.config.conversion import with_flags
from glasslm.config.recipe import Recipe
from glasslm.config.schema import ALIASES, RunConfig
from glasslm.config.unused_flags import refuse_unread_settings, refuse_unused_flags
from glasslm.errors import GlasslmError, InputError

HELP_FLAGS = frozenset(["-h", "--help", "--help-all"])
Flags = TypeVar("Flags")


def parse(
    flags_class: type[Flags],
    argv: list[str],
    program: str,
    description: str,
    default: Any = None,
) -> Flags:
    """`argv` as an instance of `flags_class`, a frozen dataclass; --help and --help-all end it.

    `default` holds the value of every flag that is not given. Raises InputError, in one line, for
    an unknown flag, a setting given twice, a value that is missing or out of range, and a setting
    without effect.
    """
    import tyro

    from glasslm.cli.flag_groups import ConfigFlags
    from glasslm.cli.help_text import format_help
    from glasslm.cli.validation import check_words, list_arguments

    if HELP_FLAGS & set(argv):
        print(format_help(flags_class, program, description, default, "--help-all" in argv))
        raise SystemExit(0)
    check_words(list_arguments(flags_class), argv, program, default is not None)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    defaults = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            flags = tyro.cli(
                flags_class,
                prog=program,
                description="",
                args=argv,
                config=config,
                **defaults,
            )
    except SystemExit as exit_request:
        if not exit_request.code:
            raise
        raise _find_cause(exit_request, program) from None
    if isinstance(flags, ConfigFlags):
        given, init_from = given_fields(argv), flags.train.init_from
        refuse_unused_flags(given, flags.data, flags.preference, init_from)
        if not flags.varies_settings:
            refuse_unread_settings(given, [flags.config])
    return flags


def _find_cause(exit_request: SystemExit, program: str) -> GlasslmError:
    """The error of a config's own checks, which tyro turned into an exit of the program."""
    cause: BaseException | None = exit_request
    while cause is not None and not isinstance(cause, GlasslmError):
        cause = cause.__context__
    return cause or InputError(f"the flags cannot be read: see {program} --help")


def flag_value(flag: str, argv: list[str], default: str) -> str:
    """The value of one flag, for a default that others depend on."""
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if equals:
            return value
        if index + 1 < len(argv):
            return argv[index + 1]
    return default


def given_fields(argv: list[str]) -> set[str]:
    """The names of the fields whose flags `argv` has; --no-bias is bias, --seq-len block_size."""
    words = {word.partition("=")[0] for word in argv if word.startswith("--")}
    names = {word[2:].replace("-", "_") for word in words}
    names |= {name.removeprefix("no_") for name in names}
    return {ALIASES.get(name, name) for name in names}


def find_unread(argv: list[str], read_flags: Collection[str]) -> str | None:
    """The first flag of `argv` that is not among `read_flags`; None if all are.

    >>> find_unread(["--fit", "runs.csv", "--out=x"], {"--fit", "--json"})
    '--out'
    """
    words = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    return next((word for word in words if word.replace("--no-", "--") not in read_flags), None)


def require_read(mode: str, argv: list[str], read_flags: Collection[str]) -> None:
    """Raise InputError for a flag of `argv` that a command ignores with the flag `mode`."""
    if unread := find_unread(argv, read_flags):
        raise InputError(f"{mode} does not read {unread}: leave one of them out")


def require_png(flag: str, path: Path | None) -> None:
    """Raise InputError for a picture that could not be written after minutes of work."""
    if path is not None and (
        path.suffix.lower() != ".png" or not os.access(path.parent, os.W_OK) or path.is_dir()
    ):
        raise InputError(
            f"{flag} is {path}: expected a .png file in a folder that exists and can be written"
        )


def parse_over_preset(
    flags_class: type[Flags], argv: list[str], program: str, description: str, default: str = "tiny"
) -> Flags:
    """The flags, with the preset that they name for those that are not given.

    `flags_class` has the fields of RecipeFlags.
    """
    named = Recipe(flag_value("--preset", argv, default))
    return parse_over_recipe(flags_class, argv, program, description, named)


def parse_over_recipe(
    flags_class: type[Flags], argv: list[str], program: str, description: str, base: Recipe
) -> Flags:
    """The flags, with the settings of `base` for those that are not given.

    `flags_class` has the fields of RecipeFlags.
    """
    config = recipe_config(base, argv)
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    make_flags: Callable[..., Flags] = flags_class
    return parse(flags_class, argv, program, description, make_flags(preset=base.preset, **parts))


def choose_recipe(argv: list[str]) -> Recipe:
    """The recipe that `glasslm train` takes with these flags."""
    preset = flag_value("--preset", argv, default="") or None
    max_time = flag_value("--max-time", argv, default="")
    return recipe.choose_recipe(preset, max_time, given_fields(argv))


def recipe_config(base: Recipe, argv: list[str]) -> RunConfig:
    """The config of a recipe, whose min_lr follows --lr.

    Raises InputError if there is no such preset.
    """
    config = base.config
    with contextlib.suppress(ValueError):  # `parse` reports a value that is not a number
        config = with_flags(config, {"lr": float(flag_value("--lr", argv, default=""))})
    return config


def fine_tuning_recipe(base: str, argv: list[str]) -> RunConfig:
    """The recipe that continues the run `base`, with adapters if the flags ask for them."""
    from glasslm.training.fine_tuning import BaseRun, fine_tuning_config

    with_adapters = flag_value("--lora-rank", argv, default="0") != "0"
    return fine_tuning_config(BaseRun(base), with_adapters)
