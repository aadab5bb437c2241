"""The help of a command: its description, and its flags with their values and defaults.

`--help` shows the flags that people use most, `--help-all` all of them. The text of a flag is the
docstring under its field.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from glasslm.cli.validation import split_markers
from glasslm.config.schema import ALIASES

MAX_SHORT_FLAGS = 30  # a command with more has a short help
MAX_WIDTH, NAME_WIDTH = 100, 26
METAVARS = {int: "INT", float: "FLOAT", Path: "PATH"}
# The fields of a run's configuration that the short help shows.
COMMON_FIELDS = frozenset(
    [
        *("preset", "corpus", "text_file", "tokenizer", "vocab_size"),
        *("d_model", "n_layers", "n_heads", "block_size", "dropout"),
        *("norm", "feedforward", "position", "optimizer", "lr", "warmup_steps", "schedule"),
        *("batch_size", "max_steps", "epochs", "max_time", "seed", "init_from"),
        *("eval_interval", "checkpoint_interval", "sample_interval"),
        *("preferences", "reward"),
        *("engine", "device", "precision", "threads"),
    ]
)
# The fields that give RoPE the settings of some published models; a new model needs none of them.
IMPORTED_MODEL_FIELDS = frozenset(
    [
        *("window_rope_base", "rope_original_context", "rope_attention_factor"),
        *("rope_low_rotations", "rope_high_rotations"),
    ]
)
IMPORTED_MODEL_TITLE = "RoPE as in imported models (`glasslm import` sets it; others need none)"


@dataclass(frozen=True)
class FlagHelp:
    """One flag or positional argument as help shows it."""

    field: str
    names: str  # --max-steps INT, or RUN
    text: str  # with the default
    is_common: bool


@dataclass(frozen=True)
class Group:
    """The flags of one dataclass, below the first sentence of its docstring."""

    title: str
    flags: tuple[FlagHelp, ...]


def format_help(
    flags_class: type, program: str, description: str, default: Any, every_flag: bool
) -> str:
    """The help of a command; with `every_flag` the rarely used flags as well."""
    groups = list(list_groups(flags_class, default))
    all_flags = [flag for group in groups for flag in group.flags]
    is_short = len(all_flags) > MAX_SHORT_FLAGS and not every_flag
    shown = [
        (group.title, [flag for flag in group.flags if flag.is_common or not is_short])
        for group in groups
    ]
    positionals = [flag.names for flag in all_flags if not flag.names.startswith("-")]
    usage = " ".join(["usage:", program, *positionals, "[FLAGS]"])
    parts = [description, usage]
    parts += [
        "\n".join([f"{title}:", *map(_format_flag, flags)]) for title, flags in shown if flags
    ]
    if is_short:
        parts.append(f"All {len(all_flags)} flags: {program} --help-all")
    return "\n\n".join(parts)


def list_groups(
    flags_class: type,
    default: Any = None,
    title: str = "Arguments",
    hidden: frozenset[str] = frozenset(),
) -> Iterator[Group]:
    """The flags of a dataclass, then those of the dataclasses in its fields.

    Fields in `hidden`, and in the class's `hidden_fields`, are left out. A value of `default` may
    be text that says what the default is.
    """
    hints = get_type_hints(flags_class, include_extras=True)
    texts = field_docstrings(flags_class)
    hidden |= getattr(flags_class, "hidden_fields", frozenset())
    own, nested = [], []
    for field in dataclasses.fields(flags_class):
        value = _default_value(field, default)
        kind, marks = split_markers(hints[field.name])
        if tyro.conf.Suppress in marks or field.name in hidden:  # not a flag
            continue
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            nested.append((kind, value))
        else:
            text = texts.get(field.name, "")
            own.append(_describe_field(field.name, hints[field.name], text, value))
    if flags_class.__module__.startswith("glasslm.config"):
        own = [dataclasses.replace(flag, is_common=flag.field in COMMON_FIELDS) for flag in own]
    imported = tuple(flag for flag in own if flag.field in IMPORTED_MODEL_FIELDS)
    if rest := tuple(flag for flag in own if flag not in imported):
        yield Group(title, rest)
    if imported:
        yield Group(IMPORTED_MODEL_TITLE, imported)
    for kind, value in nested:
        first_sentence = (inspect.getdoc(kind) or "").partition(".")[0]
        yield from list_groups(kind, value, " ".join(first_sentence.split()), hidden)


@functools.cache
def field_docstrings(flags_class: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(flags_class.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        assert isinstance(tree.body[0], ast.ClassDef)
        for field, text in zip(tree.body[0].body, tree.body[0].body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                texts[field.target.id] = inspect.cleandoc(str(text.value.value))
    return texts


def _default_value(field: dataclasses.Field[Any], default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _describe_field(name: str, hint: Any, text: str, value: Any) -> FlagHelp:
    hint, marks = split_markers(hint)
    settings = next((mark for mark in marks if hasattr(mark, "metavar")), None)
    text = (getattr(settings, "help", None) or text).replace("\n", " ")
    metavar = getattr(settings, "metavar", None) or _metavar(hint)
    if tyro.conf.Positional in marks:
        return FlagHelp(name, metavar if metavar.isupper() else name.upper(), text, True)
    flag = f"--{name.replace('_', '-')}"
    aliases = [f"--{alias.replace('_', '-')}" for alias, field in ALIASES.items() if field == name]
    names = ", ".join([flag, *aliases])
    if hint is bool:
        label = "on" if value is True else _format_value(value or None)
        names = f"{flag}, --no-{flag[2:]}" if label else flag
        return FlagHelp(name, names, f"{text} (default: {label})" if label else text, True)
    hint_text = getattr(settings, "help_behavior_hint", None)
    label = _format_value(value)
    if callable(hint_text):
        text += f" {hint_text(label or 'None')}"
    elif hint_text:
        text += f" {hint_text}"
    elif value is dataclasses.MISSING:
        text += " (required)"
    elif label:
        text += f" (default: {label})"
    return FlagHelp(name, f"{names} {metavar}", text, True)


def _metavar(hint: Any) -> str:
    """What stands for a value: its type, or the words to choose from."""
    if get_origin(hint) in (types.UnionType, typing.Union):  # a Literal | None is a typing.Union
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        one = _metavar(kinds[0])
        return f"{one}..." if kinds[-1] is Ellipsis else " ".join([one] * len(kinds))
    return METAVARS.get(hint, "TEXT")


def _format_value(value: Any) -> str:
    """A default as it is typed; empty for None and for nothing."""
    if value is None or value is dataclasses.MISSING or value == "" or value == ():
        return ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_flag(flag: FlagHelp) -> str:
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    lines = textwrap.wrap(flag.text, max(30, width - NAME_WIDTH - 2), break_on_hyphens=False)
    head = f"  {flag.names}"
    if len(head) >= NAME_WIDTH + 1:
        return "\n".join([head, *(" " * (NAME_WIDTH + 2) + line for line in lines)])
    first, *others = lines or [""]
    return "\n".join(
        [f"{head:<{NAME_WIDTH + 2}}{first}", *(" " * (NAME_WIDTH + 2) + line for line in others)]
    )
