"""Named numbers in a line of a training program's log.

Understood are pairs such as `step 250: train loss 2.41`, `lr=1e-3`, `iteration 100/ 5000 |`, the
dictionaries that transformers prints, and the progress bars of tqdm.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

STEP = "step"
EPOCH = "epoch"
# Cells that a reader may take for steps where the program names none.
LEADING_NUMBER = "number at the start"  # as in "250 | loss 3.1" or "[250] loss=3.1"
PROGRESS = "progress"  # of the bar beside a dictionary
STEPS_PER_EPOCH = "steps per epoch"  # the total of a progress bar
HELPERS = {LEADING_NUMBER, PROGRESS, STEPS_PER_EPOCH}

_TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[()][A-Z0-9])")
_NUMBER = (
    r"[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?![\w.]*[a-df-z_]\w*\d)"
)
_VALUE = rf"(?:{_NUMBER}(?:[kmb]\b)?|[+-]?(?:nan|inf(?:inity)?)\b)"
_PAIR = re.compile(
    rf"(?<![\w.])(?P<name>[a-z][\w./-]*(?:[ \t]+[a-z(][\w./)-]*){{0,4}}?(?:[ \t]*\([^()]*\))?)"
    rf"[ \t]*(?:[:=][ \t]*|(?<=[\w)])[ \t]+)['\"]?(?P<value>{_VALUE})"
    r"[ \t]*(?:/[ \t]*(?P<total>\d[\d,]*))?",
    re.I,
)
# Progress bars, and other counts of a total: of tqdm, Keras, PyTorch's examples, levanter.
_BARS = (
    re.compile(r"\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+)"),
    re.compile(r"\[\s*(?P<done>\d+)\s*/\s*(?P<total>\d+)\s*(?:\(\s*\d+%\))?\s*\]"),
    re.compile(r"^\s*(?P<done>\d+)/(?P<total>\d+)\s*(?=[\[━])"),
    re.compile(r"(?<![\w.])(?P<done>\d+)\s*/\s*(?P<total>\d+)\s+(?:batches|steps|iters)\b"),
    re.compile(r"\b(?P<done>[\d.]+[kM]?)it/(?P<total>[\d.]+[kM]?)it\b"),
)
# A step without a name before it and a colon: "after 100 iterations", "step_100:".
_COUNTED = re.compile(
    r"(?<![\w./])(\d+)\s+(?:iterations|steps|updates|iters)\b|\b(?:step|iter|iteration)[_-]?(\d+)\b",
    re.I,
)
_EPOCH_AND_BATCH = re.compile(r"^\s*\[\s*(\d+)\s*,\s*(\d+)\s*\]")  # of PyTorch's tutorials
_LEADING = re.compile(r"\s*(?:\[(\d+)\]|(\d+)(?=\s*/\s*\d+\b|\s*\||\s+[a-z]))", re.I)
# What a logging library writes before its message, with the level as its last word.
_PREFIX = re.compile(
    r"^.*?\b(?:INFO|DEBUG|WARN(?:ING)?|ERROR|CRITICAL)\b[\s:|\])-]*"
    r"(?:[\w./]+[.:]\w*:?\d+[\s:|\])-]*)?"
)
_GLOG_PREFIX = re.compile(r"^[IWEF]\d{4} [\d:.]+\s+\d+ [\w./]+:\d+\]")  # of absl
_THIN_SPACES = re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3})")  # between thousands
_VALIDATION = re.compile(r"\b(?:val|valid\w*|eval\w*|dev|test\w*)\b", re.I)
_BARE_LOSS = re.compile(r"(?:(?:average|avg|mean) )?loss", re.I)
_EPOCH = re.compile(r"\bepoch:?\s*\[\s*(?P<epoch>\d+)\s*(?P<total>/\s*\d+\s*)?\]", re.I)
_DICTIONARY = re.compile(r"\{[^{}]{1,20000}\}")
# Numbers as NumPy, PyTorch and JAX print them.
_SCALAR = re.compile(
    r"(?:\b\w+\.)?(?:float|int|bfloat)\d*\(([^()]*)\)|(?<=[:=])\s*\[\s*([-+.\de]+)\s*\]"
    r"|(?:\b\w+\.)?(?:tensor|array|devicearray)\(\[?([^(),\[\]]+)\]?(?:,[^()]*(?:\([^()]*\))?)*\)",
    re.I,
)
# A line of Python: some programs write their source into their log.
_CODE = re.compile(
    r"^\s*(?:(?:def|class|if|elif|for|while|with)\b.*:\s*(?:#.*)?$|(?:import|return|raise)\s|else:"
    r"|from\s+\S+\s+import\b|@\w|print\w*\(|#|[\w.]+(?:\s*:\s*\w+)? = (?![-+]?[\d.]|nan|inf)\S)"
    r"|\{[^{}'\"]*:[.,]?\d*[dfegs%]\}"
)


def strip_terminal_codes(text: str) -> str:
    """The text without the codes that colour it or move the cursor of a terminal."""
    return re.sub("\x08+", "\r", _TERMINAL_CODE.sub("", text).replace("\r\n", "\n"))


def parse_log_line(line: str) -> dict[str, Any]:
    """The named numbers of a line; empty where it has none.

    >>> parse_log_line("step 250: train loss 2.41, val loss 2.45")
    {'step': '250', 'train loss': '2.41', 'val loss': '2.45'}
    """
    if _CODE.search(line):
        return {}
    if "(" in line or "=[" in line:
        line = _SCALAR.sub(lambda match: " " + next(filter(None, match.groups())), line)
    line, dictionary = _read_dictionary(line) if "{" in line else (line, {})
    cells = _read_words(line, is_beside_dictionary=bool(dictionary)) | dictionary
    if any(name.startswith(("eval", "val")) for name in dictionary):
        cells.pop(PROGRESS, None)  # the bar of an evaluation counts its own batches
    return cells


def _read_words(line: str, is_beside_dictionary: bool) -> dict[str, Any]:
    """The named numbers of a line without its dictionary."""
    line = _GLOG_PREFIX.sub("", _PREFIX.sub("", _THIN_SPACES.sub("", line)))
    cells: dict[str, Any] = {}
    leading = _LEADING.match(line)
    bar = None
    if "[" in line or "/" in line:
        line = _EPOCH.sub(_write_epoch, line)
        bar = next(filter(None, (bar.search(line) for bar in _BARS)), None)
    if bar:
        line = line[: bar.start()] + " " + line[bar.end() :]
    for match in _PAIR.finditer(line):
        name = " ".join(match["name"].split())
        value = match["value"]
        if "," in value:
            value = value.replace(",", "")
        cells.setdefault(name, value)
    losses = [name for name in cells if "loss" in name.lower()]
    if len(losses) == 1 and _BARE_LOSS.fullmatch(losses[0]) and _is_validation(line, cells):
        cells["val loss"] = cells.pop(losses[0])  # as in "validate step: 10  loss: 3.2"
    if bar and is_beside_dictionary:
        cells[PROGRESS] = bar["done"]
    elif bar and losses and STEP not in map(str.lower, cells):
        cells = {STEP: bar["done"], STEPS_PER_EPOCH: bar["total"], **cells}
    elif losses and not any(re.search("step|iter|update", name, re.I) for name in cells):
        if counted := _COUNTED.search(line):
            cells[STEP] = counted[1] or counted[2]
        elif pair := _EPOCH_AND_BATCH.match(line):
            cells |= {EPOCH: pair[1], STEP: pair[2]}
    if leading and cells:
        cells.setdefault(LEADING_NUMBER, leading[1] or leading[2])
    return cells


def _is_validation(line: str, names: Iterable[str]) -> bool:
    """Whether a line with one loss is about validation, apart from other values such as val_acc."""
    if _VALIDATION.search(line) is None:
        return False
    for name in names:
        if not re.search("loss|step|iter|epoch", name, re.I):
            line = re.sub(r"\s+".join(map(re.escape, name.split())), " ", line)
    return _VALIDATION.search(line) is not None


def _write_epoch(match: re.Match[str]) -> str:
    """`Epoch: [0]` counts from 0, and `Epoch [1/5]` from 1."""
    return f"epoch: {int(match['epoch']) - bool(match['total'])} "


def _read_dictionary(line: str) -> tuple[str, dict[str, Any]]:
    """The line without the dictionary of numbers in it, as transformers prints them, and that."""
    for match in _DICTIONARY.finditer(line):
        try:
            value = ast.literal_eval(re.sub(r"\b(nan|inf)\b", "'\\1'", match[0]))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            numbers = {key: x for key, x in value.items() if isinstance(x, (int, float, str))}
            return line[: match.start()] + " " + line[match.end() :], numbers
    return line, {}
