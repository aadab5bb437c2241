"""The rows in a JSON value of any shape: its lists of objects, or its lists as columns."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from glasslm.lab.tables.numbers import is_number

TRAIN_WORDS = {"train", "training"}
VALIDATION_WORDS = {"val", "valid", "validation", "eval", "evaluation", "dev", "test"}


def parse_object(text: str) -> Any:
    """The value of JSON, also with a comma too many, or of a dictionary that Python printed."""
    try:
        return json.loads(text)
    except ValueError:
        if len(text.splitlines()) > 1 and text.count("\n{") > 0:  # JSON lines
            raise
        text = re.sub(r",(\s*[\]}])", r"\1", text)
        try:
            return json.loads(text)
        except ValueError:
            return ast.literal_eval(text.strip())


def list_shorter_columns(value: Any) -> str:
    """The names of lists that are shorter than the longest one beside them."""
    if not isinstance(value, dict):
        return ""
    lengths = {
        name: len(item)
        for name, item in value.items()
        if isinstance(item, list) and item and isinstance(item[0], (int, float))
    }
    return ", ".join(name for name, n in lengths.items() if n < max(lengths.values()))


def find_records(value: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a JSON value that are rows, and the names of other lists that are left out.

    The rows are the longest list of objects, or its columns. Lists for training and for validation
    are joined: `split` tells which list a row is from.
    """
    if isinstance(value, list):
        records = [item for item in value if isinstance(item, dict)]
        return records or [r for item in value for r in find_records(item)[0]], []
    if not isinstance(value, dict):
        return [], []
    entries = [item for item in value.values() if isinstance(item, dict)]
    is_flat = not any(isinstance(x, (list, dict)) for entry in entries for x in entry.values())
    if len(entries) == len(value) > 1 and len(set(map(frozenset, entries))) == 1 and is_flat:
        key = "step" if all(is_number(name) for name in value) else "name"
        return [{key: name, **entry} for name, entry in value.items()], []
    lists = [item for item in value.values() if isinstance(item, list) and item]
    nested = {
        name: find_records(item) for name, item in value.items() if isinstance(item, (list, dict))
    }
    longest = max(nested, key=lambda name: len(nested[name][0]), default=None)
    if longest is not None and len(nested[longest][0]) > (0 if lists else 1):
        splits = _find_splits({n: value[n] for n in nested if nested[n][0]})
        records = nested[longest][0]
        if longest in splits:
            records = [{"split": w, **record} for n, w in splits.items() for record in nested[n][0]]
        chosen = splits if longest in splits else {longest}
        others = [str(n) for n in nested if n not in chosen and _has_objects(value[n])]
        return records, [*others, *(other for name in chosen for other in nested[name][1])]
    columns = {
        name: item
        for name, item in value.items()
        if isinstance(item, list) and not any(isinstance(cell, (list, dict)) for cell in item)
    }
    if columns:
        length = max(map(len, columns.values()))
        full = {name: cells for name, cells in columns.items() if len(cells) == length}
        return [dict(zip(full, cells)) for cells in zip(*full.values())], []
    return [value], []


def _find_splits(value: Mapping[str, Any]) -> dict[str, str]:
    """Train, val or another word for a split, by key; none unless there are both kinds."""
    splits = {}
    for name, item in value.items():
        words = re.findall("[A-Z]?[a-z]+", str(name)) if isinstance(item, list) else [str(name)]
        for word in map(str.lower, words):
            if word in TRAIN_WORDS | VALIDATION_WORDS:
                splits[name] = word
    found = set(splits.values())
    return splits if found & TRAIN_WORDS and found & VALIDATION_WORDS else {}


def _has_objects(value: Any) -> bool:
    """Whether a list of objects is in a value."""
    if isinstance(value, dict):
        return any(_has_objects(item) for item in value.values())
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The cells of an object; those of an object inside it get the outer name before theirs."""
    cells: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict) and prefix.count("/") < 3:
            cells |= flatten(value, f"{prefix}{name}/")
        elif not isinstance(value, (list, dict)):
            cells[f"{prefix}{name}"] = value
    return cells
