"""Named numbers in a line of a training program's log.

Understood are pairs such as `step 250: train loss 2.41`, `lr=1e-3`, `iteration 100/ 5000 |`, the
dictionaries that transformers prints, and the progress bars of tqdm.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from glasslm.lab.tables.numbers import parse_number

STEP = "step"
EPOCH = "epoch"

_TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[()][A-Z0-9])")
_NUMBER = (
    r"[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?![\w.]*[a-df-z_]\w*\d)"
)
_VALUE = rf"(?:{_NUMBER}(?:[kmb]\b)?|[+-]?(?:nan|inf(?:inity)?)\b)"
_PAIR = re.compile(
    rf"(?<![\w.])(?P<name>[a-z][\w./-]*(?:[ \t]+[a-z(][\w./)-]*){{0,4}}?)[ \t]*(?:\([^()]*\))?"
    rf"[ \t]*(?:[:=][ \t]*|(?<=[\w)])[ \t]+)['\"]?(?P<value>{_VALUE})"
    r"[ \t]*(?:/[ \t]*(?P<total>\d[\d,]*))?",
    re.I,
)
_BAR = re.compile(r"\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+)")
# What a logging library writes before its message, with the level as its last word.
_PREFIX = re.compile(
    r"^.*?\b(?:INFO|DEBUG|WARN(?:ING)?|ERROR|CRITICAL)\b[\s:|\])-]*"
    r"(?:[\w./]+[.:]\w*:?\d+[\s:|\])-]*)?"
)
_VALIDATION = re.compile(r"\b(?:val|valid\w*|eval\w*|dev|test\w*)\b", re.I)
_FRACTION = re.compile(r"\[\s*(?P<done>\d+)\s*/\s*(?P<total>\d+)\s*\]")
_EPOCH = re.compile(r"\bepoch:?\s*\[\s*(?P<epoch>\d+)\s*(?P<total>/\s*\d+\s*)?\]", re.I)
_DICTIONARY = re.compile(r"\{[^{}]{1,20000}\}")


def strip_terminal_codes(text: str) -> str:
    """The text without the codes that colour it or move the cursor of a terminal."""
    return _TERMINAL_CODE.sub("", text).replace("\r\n", "\n")


def parse_log_line(line: str) -> dict[str, Any]:
    """The named numbers of a line; empty where it has none.

    >>> parse_log_line("step 250: train loss 2.41, val loss 2.45")
    {'step': '250', 'train loss': '2.41', 'val loss': '2.45'}
    """
    if dictionary := _read_dictionary(line):
        return dictionary
    line = _PREFIX.sub("", line)
    cells: dict[str, Any] = {}
    line = _EPOCH.sub(_write_epoch, line)
    bar = _BAR.search(line) or _FRACTION.search(line)
    if bar:
        line = line[: bar.start()] + " " + line[bar.end() :]
    for match in _PAIR.finditer(line):
        name = " ".join(match["name"].split())
        value = match["value"]
        if "," in value:
            value = value.replace(",", "")
        cells.setdefault(name, value)
    names = [name for name in cells if "loss" in name.lower()]
    if names == ["loss"] and _VALIDATION.search(line):  # as in "validate step: 10  loss: 3.2"
        cells["val loss"] = cells.pop("loss")
    if bar:
        cells = _with_bar_step(cells, int(bar["done"]), int(bar["total"]))
    return cells


def _write_epoch(match: re.Match[str]) -> str:
    """`Epoch: [0]` counts from 0, and `Epoch [1/5]` from 1."""
    return f"epoch: {int(match['epoch']) - bool(match['total'])} "


def _with_bar_step(cells: dict[str, Any], done: int, total: int) -> dict[str, Any]:
    """The cells with the step that a progress bar shows; it begins again in each epoch."""
    names = {name.lower(): name for name in cells}
    if not any("loss" in name for name in names) or STEP in names:
        return cells
    epoch = names.get(EPOCH)
    first = int(parse_number(cells[epoch]) or 0) * total if epoch else 0
    return {STEP: first + done, **cells}


def _read_dictionary(line: str) -> dict[str, Any]:
    """The dictionary of numbers in a line, as transformers' Trainer prints them; {} if none."""
    for match in _DICTIONARY.finditer(line):
        try:
            value = ast.literal_eval(re.sub(r"\b(nan|inf)\b", "'\\1'", match[0]))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: cell for key, cell in value.items() if isinstance(cell, (int, float, str))}
    return {}
