"""Typed reading of the fields of a JSON object: each wrong value is an error that says what fits.

null means the default. A boolean is no integer, and 1.0 is one, as in JSON Schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from glasslm.serve.api_error import ApiError, describe_value, wrong_value


class Fields:
    """The fields of a request; `unknown` has the names of those that nothing has read."""

    def __init__(self, content: object) -> None:
        """`content`: the JSON of a request. Raises ApiError unless it is an object."""
        if not isinstance(content, dict):
            raise ApiError(400, f"the body is {describe_value(content)}: expected a JSON object")
        self._content: dict[str, Any] = content
        self._read: set[str] = set()
        self._unknown_inside: set[str] = set()

    @property
    def unknown(self) -> list[str]:
        return sorted((self._content.keys() - self._read) | self._unknown_inside)

    def note_unknown(self, name: str, inner: Iterable[str]) -> None:
        """Note that nothing has read the fields `inner` of the object or list `name`."""
        self._unknown_inside.update(f"{name}.{field}" for field in inner)

    def get(self, name: str) -> Any:
        """The value as it is; None where it is missing."""
        self._read.add(name)
        return self._content.get(name)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_value(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong_value(name, value, "a string")
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        expected = f"an integer from {low:,} to {high:,}"
        number = as_integer(value)
        if number is None or not low <= number <= high:
            raise wrong_value(name, value, expected)
        return number

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        number = as_number(value)
        if number is None or not low <= number <= high:
            raise wrong_value(name, value, f"a number from {low:g} to {high:g}")
        return number


def as_integer(value: object) -> int | None:
    """A JSON number without a fraction as an integer; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def as_number(value: object) -> float | None:
    """A finite JSON number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer above 1.8e308
        return None
    return number if math.isfinite(number) else None
