"""Strict JSON: what RFC 8259 allows, so without NaN and Infinity, as UTF-8."""

from __future__ import annotations

import json
from typing import Any


def json_bytes(value: Any, indent: int | None = 2, sort: bool = False) -> bytes:
    """`value` as strict JSON in UTF-8 with a final newline; ValueError for a non-finite number.

    A lone surrogate (in a file name that is not UTF-8, for example) is written as its JSON escape.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, sort_keys=sort)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def parse_json(text: bytes) -> Any:
    """The value of strict JSON in UTF-8; ValueError for NaN, Infinity and too deep nesting."""

    def refuse_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
