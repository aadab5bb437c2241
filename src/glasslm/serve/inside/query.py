"""The query of an address as typed values: each wrong one is an error that says what fits."""

from __future__ import annotations

import math
import re

from starlette.datastructures import QueryParams

from glasslm.serve.api_error import ApiError

MAX_LIST = 256  # words: also the tokens of a branch of Write
INTEGER = re.compile(r"-?[0-9]{1,19}")


class Query:
    """The parameters after the question mark of an address."""

    def __init__(self, params: QueryParams) -> None:
        self._params = params

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from `low` to `high`; required unless there is a default."""
        text = self._params.get(name)
        if text is None and default is not None:
            return default
        expected = f"an integer from {low:,} to {high:,}"
        if text is None or not INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise _wrong(name, text, expected)
        return int(text)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A finite number from `low` to `high`."""
        text = self._params.get(name)
        if text is None:
            return default
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise _wrong(name, text, f"a number from {low:g} to {high:g}")
        return value

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """Integers, divided by commas; none where the parameter is missing or empty."""
        words = self.words(name)
        expected = f"integers from {low:,} to {high:,}, divided by commas"
        if not all(INTEGER.fullmatch(word) and low <= int(word) <= high for word in words):
            raise _wrong(name, self._params.get(name), expected)
        return [int(word) for word in words]

    def words(self, name: str) -> list[str]:
        """Words, divided by commas; none where the parameter is missing or empty."""
        text = self._params.get(name, "")
        words = text.split(",") if text else []
        if len(words) > MAX_LIST:
            raise _wrong(name, text, f"at most {MAX_LIST} words")
        return words

    def text(self, name: str) -> str:
        """A word that must be there."""
        value = self._params.get(name)
        if not value:
            raise _wrong(name, value, "a value")
        return value


def _wrong(name: str, value: str | None, expected: str) -> ApiError:
    given = "missing" if value is None else f"'{value[:60]}'"
    return ApiError(
        400, f"{name} is {given}: expected {expected}", param=name, code="invalid_value"
    )
