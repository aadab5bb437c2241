"""Checks of JSON values against the types that describe a file.

The TypedDicts of run.json, of the lines of metrics.jsonl and of state.json are their only schema:
what mypy checks in the code, `require_type` checks in the file.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from glasslm.errors import DamagedError

MAX_COUNT = 2**64 - 1  # the largest seed
MAX_FLOAT = 1.7976931348623157e308
MAX_SHOWN_CHARS = 40  # of a wrong value in a message

Count = Annotated[int, "from 0 on"]  # a number of steps, tokens, bytes or threads

Checker = Callable[[Any, str], str]  # (value, name) -> what is wrong with it, or ""


def require_type(value: Any, kind: Any, source: object) -> None:
    """Raise DamagedError, naming `source` and the field, unless `value` has the type `kind`.

    Keys that the type does not know are allowed.
    """
    if error := _checker(kind)(value, ""):
        raise DamagedError(
            f"{source} is damaged: {error}. Restore it from a copy, or use the glasslm that wrote "
            "it"
        )


def describe_mismatch(value: Any, kind: Any) -> str:
    """What is wrong with a value of the type `kind`; empty if nothing is."""
    return _checker(kind)(value, "")


def _wrong(value: Any, name: str, expected: str) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}..."
    return f"{f'{name!r}' if name else 'it'} is {shown}, expected {expected}"


@cache
def _checker(kind: Any) -> Checker:
    """The check of one type, made once for each."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, name: ""
    if kind is None or kind is types.NoneType:
        return _plain_checker(lambda value: value is None, "null")
    if kind is Count:
        return _plain_checker(
            lambda value: type(value) is int and 0 <= value <= MAX_COUNT, "a whole number from 0 on"
        )
    if kind is int:
        return _plain_checker(
            lambda value: type(value) is int and abs(value) <= MAX_COUNT, "a whole number"
        )
    if kind is float:
        return _plain_checker(
            lambda value: type(value) in (int, float) and -MAX_FLOAT <= value <= MAX_FLOAT,
            "a finite number",
        )
    if kind is bool:
        return _plain_checker(lambda value: type(value) is bool, "true or false")
    if kind is str:
        return _plain_checker(lambda value: type(value) is str, "a text")
    if origin is Literal:
        words = {(type(arg), arg) for arg in args}  # True equals 1
        return _plain_checker(
            lambda value: type(value) in (str, int, bool) and (type(value), value) in words,
            f"one of {', '.join(map(str, args))}" if len(args) > 1 else repr(args[0]),
        )
    if origin in (Union, types.UnionType):
        return _union_checker([_checker(arg) for arg in args])
    if origin is list:
        return _list_checker(_checker(args[0]))
    if origin in (dict, Mapping):
        return _dict_checker(_checker(args[1]))
    assert is_typeddict(kind), f"no check of {kind}"
    return _object_checker(kind)


def _plain_checker(is_right: Callable[[Any], bool], expected: str) -> Checker:
    return lambda value, name: "" if is_right(value) else _wrong(value, name, expected)


def _union_checker(checkers: list[Checker]) -> Checker:
    def check(value: Any, name: str) -> str:
        error = ""
        for checker in checkers:
            next_error = checker(value, name)
            if not next_error:
                return ""
            error = error or next_error
        return error

    return check


def _list_checker(check_item: Checker) -> Checker:
    def check(value: Any, name: str) -> str:
        if type(value) is not list:
            return _wrong(value, name, "a list")
        return next(filter(None, (check_item(item, f"{name}[]") for item in value)), "")

    return check


def _dict_checker(check_item: Checker) -> Checker:
    def check(value: Any, name: str) -> str:
        if type(value) is not dict:
            return _wrong(value, name, "an object")
        return next(
            filter(None, (check_item(item, f"{name}.{key}") for key, item in value.items())), ""
        )

    return check


def _object_checker(kind: Any) -> Checker:
    """The check of a TypedDict: all required keys are there, and each known one has its type."""
    checkers, required = {}, []
    for key, hint in get_type_hints(kind, include_extras=True).items():
        is_optional = get_origin(hint) is NotRequired
        checkers[key] = _checker(get_args(hint)[0] if is_optional else hint)
        if not is_optional and kind.__total__:
            required.append(key)

    def check(value: Any, name: str) -> str:
        if type(value) is not dict:
            return _wrong(value, name, "an object")
        prefix = f"{name}." if name else ""
        for key in required:
            if key not in value:
                return f"it lacks '{prefix}{key}'"
        for key, item in value.items():
            if key in checkers and (error := checkers[key](item, f"{prefix}{key}")):
                return error
        return ""

    return check
