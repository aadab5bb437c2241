"""Conversion of configs from flags (flat names) and JSON (dictionaries), and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from glasslm.config.schema import (
    ALIASES,
    ComputeConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.errors import InputError
from glasslm.text import suggest_name

_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def with_flags(base: RunConfig, flags: dict[str, Any]) -> RunConfig:
    """`base` with fields replaced by flat names, as in with_flags(tiny(), {"lr": 1e-3}).

    A learning rate below the min_lr of `base` scales that min_lr down in proportion, unless min_lr
    is among the flags. Raises InputError for an unknown name and for a value of the wrong type.
    """
    parts = {part.name: getattr(base, part.name) for part in dataclasses.fields(base)}
    known = {f.name: name for name, part in parts.items() for f in dataclasses.fields(part)}
    changes: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for flag, value in flags.items():
        name = ALIASES.get(flag, flag)
        if name not in known:
            public = [field for field in known if _has_flag(type(parts[known[field]]), field)]
            raise InputError(f"there is no setting '{flag}'{_did_you_mean(flag, public)}")
        part_changes = changes[known[name]]
        if name in part_changes:
            raise InputError(f"{name} was given twice, by two of its names: give it once")
        part_changes[name] = _convert(value, _hints(type(parts[known[name]]))[name], flag)
    rates = changes["optimizer"]
    if "min_lr" not in rates and rates.get("lr", base.optimizer.lr) < base.optimizer.min_lr:
        rates["min_lr"] = rates["lr"] * (base.optimizer.min_lr / base.optimizer.lr)
    return RunConfig(
        **{name: dataclasses.replace(part, **changes[name]) for name, part in parts.items()}
    )


Config = TypeVar(
    "Config", ModelConfig, DataConfig, OptimizerConfig, TrainConfig, RunConfig, ComputeConfig
)


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """A config of class `kind` from the dictionaries of JSON.

    A missing key takes its default, so that runs of older versions stay readable. Raises InputError
    for an unknown key and for a value of the wrong type.
    """
    hints = _hints(kind)
    for key in values:
        if key not in hints:
            raise InputError(f"{kind.__name__} has no field '{key}'{_did_you_mean(key, hints)}")
    return kind(**{key: _convert(value, hints[key], key) for key, value in values.items()})


def to_dict(config: RunConfig | ComputeConfig | ModelConfig) -> dict[str, Any]:
    """The nested dictionaries of a config, as run.json has them.

    The part `operations` is there only if a file replaces operations, and `preference` only if the
    run is tuned to preferences.
    """
    values = dataclasses.asdict(config)
    if isinstance(config, RunConfig) and not config.operations.ops:
        del values["operations"]
    if isinstance(config, RunConfig) and not config.preference.is_active:
        del values["preference"]
    return values


def with_model(base: RunConfig, **changes: Any) -> RunConfig:
    """`base` with other fields of the model; derived sizes (d_ff, n_kv_heads) are derived again."""
    c = base.model
    derived = {
        "d_ff": 0 if c.resolve().d_ff == dataclasses.replace(c, d_ff=0).resolve().d_ff else c.d_ff
    }
    derived["n_kv_heads"] = 0 if c.n_kv_heads in (0, c.n_heads) else c.n_kv_heads
    model = from_dict(ModelConfig, to_dict(c) | derived | changes)
    return dataclasses.replace(base, model=model)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` in the type `hint`; raises InputError, which calls it `name`, if it has another type.

    Lists become tuples, whole numbers floats, and NumPy's numbers and arrays Python's.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_dict(hint, value)  # type: ignore[type-var]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{name} is {value!r}: expected one of {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), name)
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(items) != len(kinds):
            raise InputError(f"{name} is {value!r}: expected {len(kinds)} values")
        return tuple(_convert(item, kind, name) for item, kind in zip(items, kinds))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and hasattr(value, "__fspath__"):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{name} is {value!r}: expected {getattr(hint, '__name__', hint)}")
    return value


def _has_flag(kind: type, name: str) -> bool:
    """Whether a field of a config has a flag; a hash or an id is set when a run starts."""
    hint = get_type_hints(kind, include_extras=True)[name]
    return tyro.conf.Suppress not in get_args(hint)[1:]


def _did_you_mean(name: str, known: Any) -> str:
    return suggest_name(name, known) or f": known are {', '.join(sorted(known))}"
