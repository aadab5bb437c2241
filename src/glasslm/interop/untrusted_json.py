"""Read a JSON object from an untrusted source, value by value.

A key of the wrong type is an error that names it. Nothing is executed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.errors import DamagedError, InputError

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Values:
    """The values of a JSON object, read by type.

    Raises InputError for another type; null counts as absent.
    """

    path: Path
    values: dict[str, Any]

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self._type_error(name, value, "a whole number of 0 or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise self._type_error(name, value, "a finite number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._type_error(name, value, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if type(value) is not str:
            raise self._type_error(name, value, "a string")
        return value

    def array(self, name: str) -> list[Any]:
        """The list `name`; empty if it is absent."""
        value = self._get(name, [])
        if type(value) is not list:
            raise self._type_error(name, value, "a list")
        return value

    def object(self, name: str) -> Values:
        """The values of the object `name`; empty if it is absent."""
        value = self._get(name, {})
        if type(value) is not dict:
            raise self._type_error(name, value, "an object")
        return Values(self.path, value)

    def with_defaults(self, defaults: dict[str, Any]) -> Values:
        """The same values, with `defaults` for absent keys; a null stays null."""
        return Values(self.path, defaults | self.values)

    def with_value(self, name: str, value: Any) -> Values:
        """The same values, except for one."""
        return Values(self.path, self.values | {name: value})

    def __bool__(self) -> bool:
        return bool(self.values)

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise InputError(
                f"{self.path} has no '{name}': expected the config.json of a model that glasslm "
                "can import"
            )
        return value

    def _type_error(self, name: str, value: Any, expected: str) -> InputError:
        return InputError(f"{self.path} has {name} {repr(value)[:100]}: expected {expected}")


def require_supported(supported: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError unless glasslm supports the value of a setting in a configuration file."""
    if not supported:
        raise InputError(
            f"the model has {name} {value}, which glasslm cannot compute: expected {expected}"
        )


def read_values(path: Path) -> Values:
    """The values of a JSON object.

    Raises DamagedError for a missing file, and for anything else than an object.
    """
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is not a JSON object")
    return Values(path, content)
