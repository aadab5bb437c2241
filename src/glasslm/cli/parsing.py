"""Flags into a dataclass, with the errors that every command shares."""

from __future__ import annotations

from typing import Any, TypeVar

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
    """`argv` as a `kind` (a frozen dataclass); unknown flags end the program with exit code 2 and what was meant.

    Raises InputError for a flag given twice, unless it is `repeatable`: the parser would keep the last one in silence.
    """
    import tyro

    seen = set()
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag in seen and flag not in repeatable:
            raise InputError(f"{flag} was given twice: give it once, with all its values after it")
        seen.add(flag)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=program, description=description, args=argv, config=config, **given)


def value_of(flag: str, argv: list[str], default: str) -> str:
    """The value of one flag, before the rest can be parsed."""
    for index, word in enumerate(argv):
        if word == flag and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return default
