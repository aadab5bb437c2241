"""Checks of config fields, and how optional flags look in a command's help."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import tyro

from glasslm.errors import InputError, require

# Texts whose empty value says something: no text, the same attention in all layers, no biases.
MAY_BE_EMPTY = frozenset(["prompt", "system", "attention_pattern", "bias_targets"])


def require_fields(
    config: object, names: Iterable[str], accepts: Callable[[Any], bool], expected: str
) -> None:
    """Raise InputError for the first of the fields `names` whose value `accepts` rejects.

    `expected` completes the message "NAME is VALUE: expected ...".
    """
    for name in names:
        value = getattr(config, name)
        require(accepts(value), name, value, expected)


def refuse_empty_value(name: str, value: object, label: str, *, is_required: bool = False) -> None:
    """Raise InputError for an empty text that was given for the field `name`, shown as `label`.

    An empty text, as of a variable of the shell that is not set, would count as left out.
    """
    if isinstance(value, str) and not value and name not in MAY_BE_EMPTY:
        cure = "give it a value" if is_required else "give it a value, or leave it out"
        raise InputError(f"{label} is empty: {cure}")


def optional_flag(metavar: str, default: str) -> Any:
    """Settings of a flag that may be left out: the name of its value, and its default in words.

    Without them tyro shows `{None}|INT` and `(default: None)`. A default that is a value (of a
    preset, for example) is shown as it is.
    """

    def hint(label: str) -> str:
        return f"(default: {default if label in ('None', '') else label})"

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)
