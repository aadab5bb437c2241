"""Checks of the words of a command line against the fields of a dataclass, with one-line errors.

tyro prints an error in a frame of several lines. These checks come before tyro and raise an
InputError instead, with the flag, its value and what was expected.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from glasslm.config.config_fields import refuse_empty_value
from glasslm.config.schema import ALIASES
from glasslm.errors import InputError
from glasslm.text import similar_names

# Words of transformers, nanoGPT and other programs for fields that have another name here.
SYNONYMS = {
    "activation": "feedforward", "hidden_act": "feedforward", "act": "feedforward",
    "activation_function": "feedforward", "mlp": "feedforward", "ffn": "feedforward",
    "learning_rate": "lr", "max_lr": "lr", "peak_lr": "lr", "warmup_iters": "warmup_steps",
    "warmup": "warmup_steps", "lr_schedule": "schedule", "lr_scheduler_type": "schedule",
    "hidden_size": "d_model", "n_embd": "d_model", "embed_dim": "d_model", "dim": "d_model",
    "width": "d_model", "num_hidden_layers": "n_layers", "num_layers": "n_layers",
    "n_layer": "n_layers", "layers": "n_layers", "depth": "n_layers",
    "num_attention_heads": "n_heads", "n_head": "n_heads", "num_heads": "n_heads",
    "heads": "n_heads", "num_key_value_heads": "n_kv_heads", "intermediate_size": "d_ff",
    "ffn_dim": "d_ff", "context": "block_size", "context_length": "block_size",
    "context_size": "block_size", "sequence_length": "block_size", "max_length": "block_size",
    "max_position_embeddings": "block_size", "n_positions": "block_size",
    "positional_encoding": "position", "pos_emb": "position", "normalization": "norm",
    "sliding_window": "window", "rope_theta": "rope_base", "num_experts": "n_experts",
    "steps": "max_steps", "iters": "max_steps", "max_iters": "max_steps",
    "num_steps": "max_steps", "num_train_epochs": "epochs", "n_epochs": "epochs",
    "time": "max_time", "time_limit": "max_time", "batch": "batch_size",
    "per_device_train_batch_size": "batch_size", "gradient_clipping": "grad_clip",
    "clip": "grad_clip", "max_grad_norm": "grad_clip", "max_norm": "grad_clip",
    "optim": "optimizer", "beta": "betas", "wd": "weight_decay", "dtype": "precision",
    "backend": "engine", "data": "text_file", "dataset": "text_file", "input": "text_file",
    "file": "text_file", "text": "text_file", "train_file": "text_file", "out": "run_dir",
    "out_dir": "run_dir", "output_dir": "run_dir", "output": "run_dir", "name": "run_dir",
    "save_interval": "checkpoint_interval", "save_steps": "checkpoint_interval",
    "eval_steps": "eval_interval", "eval_every": "eval_interval",
    "logging_steps": "log_interval", "save_total_limit": "keep", "model": "preset",
    "size": "preset", "resume": "init_from", "max_tokens": "max_new_tokens",
    "length": "max_new_tokens", "temp": "temperature", "n": "num_samples",
    "num_return_sequences": "num_samples", "format": "to",
}  # fmt: skip
MIN_SIMILARITY = 0.75  # of a flag that an error suggests, between 0 and 1

_FLAG = re.compile(r"--|-+[A-Za-z]")
_NEGATIVE_FLOAT = re.compile(r"-(inf|infinity|nan)", re.IGNORECASE)
_EXPECTED = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Argument:
    """A flag or a positional argument: a field of a flags dataclass."""

    name: str
    """The field's name: max_steps."""
    kind: Any
    """Type of one value: bool, int, float, str, Path or a Literal."""
    n_values: int | None
    """Number of values (None: one or more)."""
    is_positional: bool
    is_repeatable: bool
    is_required: bool
    accepts_none: bool
    metavar: str
    """Capitals that help shows for a value, such as RUN or [RUN]; may be empty."""
    default: Any

    @property
    def label(self) -> str:
        """The argument as help shows it: --max-steps, or RUN."""
        if self.is_positional:
            return self.metavar.strip("[]").partition(" ")[0] or self.name.upper()
        return f"--{self.name.replace('_', '-')}"

    @property
    def expected(self) -> str:
        """What a value must be, for an error."""
        if get_origin(self.kind) is Literal:
            return f"one of {', '.join(map(str, get_args(self.kind)))}"
        return _EXPECTED.get(self.kind, "a value")

    def check(self, value: str, label: str) -> None:
        """Raise InputError, which calls the argument `label`, for a value of another type."""
        if value == "None" and self.accepts_none:
            return
        if self.kind in (str, Path):
            refuse_empty_value(self.name, value, label, is_required=self.is_required)
        if get_origin(self.kind) is Literal:
            is_valid = value in map(str, get_args(self.kind))
        else:
            is_valid = self.kind not in _EXPECTED or _converts(self.kind, value)
        if not is_valid:
            raise InputError(f"{label} is '{value}': expected {self.expected}")


def list_arguments(flags_class: type) -> list[Argument]:
    """The arguments of a dataclass, and those of the dataclasses in its fields."""
    hints = get_type_hints(flags_class, include_extras=True)
    arguments: list[Argument] = []
    for field in dataclasses.fields(flags_class):
        hint, markers = split_markers(hints[field.name])
        if tyro.conf.Suppress in markers:  # not a flag
            continue
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            arguments += list_arguments(hint)
            continue
        accepts_none = type(None) in get_args(hint)
        if accepts_none:
            hint = next(kind for kind in get_args(hint) if kind is not type(None))
        is_repeatable = tyro.conf.UseAppendAction in markers
        n_values: int | None = 1
        if get_origin(hint) is tuple:
            kinds = get_args(hint)
            hint = kinds[0]
            if not is_repeatable:
                n_values = None if kinds[-1] is Ellipsis else len(kinds)
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        metavar = next((mark.metavar for mark in markers if hasattr(mark, "metavar")), None) or ""
        arguments.append(
            Argument(
                field.name,
                hint,
                0 if hint is bool else n_values,
                tyro.conf.Positional in markers,
                is_repeatable,
                not has_default,
                accepts_none,
                metavar if metavar.isupper() else "",
                field.default,
            )
        )
    return arguments


def check_words(
    arguments: list[Argument], words: list[str], program: str, has_default: bool
) -> None:
    """Raise InputError for the first fault of a command line.

    Faults are an unknown flag (the error names similar ones), a setting given twice (tyro would use
    the last one), a missing value, a value of the wrong type, and a word that no argument takes.
    With `has_default`, no argument is required.
    """
    flags = {argument.name: argument for argument in arguments if not argument.is_positional}
    positionals = [argument for argument in arguments if argument.is_positional]
    unknown: list[str] = []
    first_uses: dict[str, str] = {}  # name of a field: its flag as written
    free_words: list[str] = []
    for flag, values in _split_words(words, flags):
        if not flag:
            free_words += values
            continue
        argument = _find_argument(flag, flags)
        if argument is None:
            unknown.append(flag)
            continue
        if argument.name in first_uses and not argument.is_repeatable:
            _refuse_repetition(first_uses[argument.name], flag)
        first_uses[argument.name] = flag
        if (argument.n_values is None and not values) or len(values) < (argument.n_values or 0):
            raise InputError(_missing_value(argument, flag, len(values)))
        for value in values:
            argument.check(value, flag)
    if unknown:
        raise InputError(_describe_unknown(unknown, flags, program))
    for argument in positionals:
        count = len(free_words) if argument.n_values is None else argument.n_values
        for word in free_words[:count]:
            argument.check(word, argument.label)
        if argument.is_required and not free_words and not has_default:
            raise InputError(f"{argument.label} is missing: see {program} --help")
        free_words = free_words[count:]
    if free_words:
        word = free_words[0]
        cure = (
            f"did you mean --text-file {word}?"
            if "text_file" in flags and "text_file" not in first_uses
            else f"see {program} --help"
        )
        raise InputError(f"'{word}' is not expected here: {cure}")
    for argument in flags.values():
        if argument.is_required and argument.name not in first_uses and not has_default:
            raise InputError(f"{argument.label} is missing: expected {argument.expected}")


def split_markers(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its Annotated, and the marks that were in it."""
    if get_origin(hint) is typing.Annotated:
        return get_args(hint)[0], tuple(get_args(hint)[1:])
    return hint, ()


def _converts(kind: Any, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _is_flag(word: str) -> bool:
    return _FLAG.match(word) is not None and _NEGATIVE_FLOAT.fullmatch(word) is None


def _field_name(flag: str) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    return ALIASES.get(name, name)


def _find_argument(flag: str, flags: dict[str, Argument]) -> Argument | None:
    """The argument of a flag, which is --no-NAME as well for a switch."""
    if not flag.startswith("--"):
        return None
    name = _field_name(flag)
    if name in flags:
        return flags[name]
    switch = flags.get(name.removeprefix("no_"))
    return switch if switch is not None and switch.kind is bool else None


def _split_words(words: list[str], flags: dict[str, Argument]) -> Iterator[tuple[str, list[str]]]:
    """Each flag as it is written with its values; "" with each word that belongs to no flag."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            yield "", words[position:]
            return
        if not _is_flag(word):
            yield "", [word]
            continue
        flag, equals, value = word.partition("=")
        argument = _find_argument(flag, flags)
        if equals:
            if argument is not None and argument.kind is bool:
                raise InputError(f"{flag} takes no value: leave out ={value}")
            values = [value]
        else:
            values = []
        # A word after an unknown flag is taken for its value.
        n_values = 1 if argument is None else argument.n_values
        while (
            (n_values is None or len(values) < n_values)
            and position < len(words)
            and not _is_flag(words[position])
        ):
            values.append(words[position])
            position += 1
        yield flag, values


def _refuse_repetition(first: str, second: str) -> None:
    fault = (
        f"{second} was given twice"
        if first == second
        else f"{first} and {second} are the same setting"
    )
    raise InputError(f"{fault}: give it once, with all its values after it")


def _missing_value(argument: Argument, flag: str, n_given: int) -> str:
    if argument.n_values is None:
        return f"{flag} has no value: give at least one after it"
    if argument.n_values > 1:
        return f"{flag} has {n_given} of its {argument.n_values} values: give all of them after it"
    return f"{flag} has no value: expected {argument.expected}"


def _describe_unknown(unknown: Iterable[str], flags: dict[str, Argument], program: str) -> str:
    """An error that names the unknown flags, and the known ones that are most like them."""
    names = {argument.label for argument in flags.values()}
    names |= {f"--{alias.replace('_', '-')}" for alias, name in ALIASES.items() if name in flags}
    names |= {f"--no-{a.label.removeprefix('--')}" for a in flags.values() if a.kind is bool}
    unknown = list(dict.fromkeys(unknown))
    similar = [
        [flags[SYNONYMS[_field_name(flag)]].label]
        if SYNONYMS.get(_field_name(flag)) in flags
        else similar_names(flag, names, min_similarity=MIN_SIMILARITY)
        for flag in unknown
    ]
    suggestions = " and ".join(dict.fromkeys(names[0] for names in similar if names))
    fault = f"unknown flag{'s' * (len(unknown) > 1)} {' and '.join(unknown)}"
    return (
        f"{fault}: did you mean {suggestions}?" if suggestions else f"{fault}: see {program} --help"
    )
