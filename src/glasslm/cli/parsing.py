"""Flags into a dataclass, with the errors that every command shares."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from typing import Any, TypeVar

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ALIASES, RunConfig
from glasslm.errors import InputError

Flags = TypeVar("Flags")


def parse(
    kind: type[Flags],
    argv: list[str],
    program: str,
    description: str,
    default: Any = None,
    repeatable: tuple[str, ...] = (),
) -> Flags:
    """`argv` as a `kind` (a frozen dataclass); --help ends the program.

    Raises InputError, in one line, for an unknown flag (with what was meant), a value that cannot be, and a flag given
    twice unless it is `repeatable`: the parser would keep the last one in silence.
    """
    import tyro

    _refuse_repetition(argv, repeatable)
    _refuse_no_path(argv)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    given = {} if default is None else {"default": default}
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(
                kind, prog=program, description=description, args=argv, config=config, **given
            )
    except SystemExit as left:
        if not left.code:
            raise
        raise InputError(_one_line(framed.getvalue(), program)) from None


def value_of(flag: str, argv: list[str], default: str) -> str:
    """The value of one flag, before the rest can be parsed."""
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if equals:
            return value
        if index + 1 < len(argv):
            return argv[index + 1]
    return default


def over_preset(
    kind: type[Flags], argv: list[str], program: str, description: str, default: str = "tiny"
) -> Flags:
    """The flags over the preset that they name: `kind` has a field `preset` and one for each part of a config."""
    name, preset = preset_of(argv, default)
    parts = {part.name: getattr(preset, part.name) for part in dataclasses.fields(preset)}
    defaults: Callable[..., Flags] = kind
    return parse(kind, argv, program, description, default=defaults(preset=name, **parts))


def preset_of(argv: list[str], default: str = "tiny") -> tuple[str, RunConfig]:
    """The preset that the flags name, and its config, whose min_lr follows --lr. InputError if there is none."""
    name = value_of("--preset", argv, default)
    if name not in PRESETS:
        raise InputError(f"there is no preset '{name}': choose from {', '.join(PRESETS)}")
    config = PRESETS[name]()
    with contextlib.suppress(ValueError):  # the parser says better what is no number
        config = with_flags(config, {"lr": float(value_of("--lr", argv, default=""))})
    return name, config


def recipe_of(base: str, argv: list[str]) -> RunConfig:
    """How to go on from the run `base`, with adapters if the flags ask for some."""
    from glasslm.training.fine_tuning import RANK, Base, recipe

    adapted = value_of("--lora-rank", argv, default="0") != "0"
    return recipe(Base(base), rank=RANK if adapted else 0)


def _refuse_repetition(argv: list[str], repeatable: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}  # the field that a flag stands for -> the flag as it was written
    for word in argv:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag in repeatable:
            continue
        name = flag.removeprefix("--").replace("-", "_").removeprefix("no_")
        name = ALIASES.get(name, name)
        if name in seen:
            before = seen[name]
            what = (
                f"{flag} was given twice"
                if flag == before
                else f"{before} and {flag} are the same setting"
            )
            raise InputError(f"{what}: give it once, with all its values after it")
        seen[name] = flag


def _refuse_no_path(argv: list[str]) -> None:
    """--text-file takes any number of paths; none at all is a forgotten one (or an empty shell variable)."""
    for word, following in zip(argv, [*argv[1:], "--"]):
        if word in ("--text-file", "--text_file") and following.startswith("--"):
            raise InputError(
                "--text-file has no value: give files, folders or patterns after it, or - for standard input"
            )


def _one_line(framed: str, program: str) -> str:
    """tyro's message without its frame: what was wrong and, for an unknown flag, what was perhaps meant."""
    text = re.sub(r"\x1b\[[\d;]*m", "", framed)
    rows = [row.strip("│ ") for row in text.splitlines() if not row.startswith(("╭", "╰"))]
    text = " ".join(" ".join(rows).split())
    message = re.sub(
        r"^Error parsing (?:\w+: )?", "", text.partition(" ──")[0]
    )  # a word is a part of the config
    if not message.startswith("Unrecognized"):
        return message.replace("'None', ", "").replace(
            ", 'None'", ""
        )  # Python's word for a flag that is not given
    meant = sorted(
        set(re.findall(r"(?:Perhaps you meant|Arguments similar to \S+): (-[^\s,]+)", text))
    )
    return (
        f"{message}: did you mean {' and '.join(meant)}?"
        if meant
        else f"{message}: see {program} --help"
    )
