"""Reads the log of any training program into a curve.

A log is CSV, JSON lines (of glasslm, nanoGPT or Hugging Face), or text lines such as `iter 100:
loss 2.41, lr 1e-3`. Columns are identified by their names. A value that is not a number becomes NaN
in the curve, because it may be the sign of a fault.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import InputError, explain_system_errors

Array = NDArray[np.float64]
Row = dict[str, Any]

# The names of a column in lower case, with underscores for all other characters. Earlier names are
# preferred.
STEP_NAMES = (
    "step",
    "global_step",
    "trainer_global_step",
    "train_global_step",
    "iter",
    "iteration",
    "update",
    "batch",
    "steps",
    "iters",
    "iterations",
    "updates",
)
EPOCH_NAMES = ("epoch", "train_epoch", "epochs")
LOSS_NAMES = (
    "loss",
    "train_loss",
    "training_loss",
    "loss_train",
    "train_loss_step",
    "train_cross_entropy",
    "nll",
)
VALIDATION_NAMES = (
    "val_loss",
    "eval_loss",
    "valid_loss",
    "validation_loss",
    "loss_val",
    "loss_eval",
    "dev_loss",
    "test_loss",
    "val_cross_entropy",
)
GRAD_NORM_NAMES = (
    "grad_norm",
    "train_grad_norm",
    "gradient_norm",
    "gnorm",
    "grad_norm_total",
    "total_grad_norm",
)
RATE_NAMES = ("lr", "learning_rate", "train_lr", "train_learning_rate")

_PAIR = re.compile(
    r"([a-z][a-z_/ ]*?)\s*[:= ]\s*([+-]?(?:\d[\d_]*\.?\d*(?:e[+-]?\d+)?|nan|inf(?:inity)?))", re.I
)


@dataclass(frozen=True)
class Series:
    """Values by step, in ascending order of steps; values may be NaN or infinite."""

    steps: Array = field(default_factory=lambda: np.zeros(0))  # (N,)
    values: Array = field(default_factory=lambda: np.zeros(0))  # (N,)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        """The finite values with their steps."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class Curve:
    """The columns of a log, each with its own steps. A missing column is empty."""

    name: str
    train: Series
    validation: Series = field(default_factory=Series)
    grad_norm: Series = field(default_factory=Series)
    clipped: Series = field(default_factory=Series)  # 1 where the gradient was clipped
    rate: Series = field(default_factory=Series)
    vocab_size: int | None = None


def read_curve(path: Path) -> Curve:
    """The curve in a log: .csv, .jsonl, .json, text, or the metrics.jsonl of a run folder.

    Raises InputError when the file cannot be read, and, with the names of its columns, when none of
    them is a loss.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    with explain_system_errors(
        path,
        lambda why: InputError(
            f"{path} cannot be read ({why}): give a .csv or .jsonl file, or a run folder"
        ),
    ):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    rows = _parse_rows(text, path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    loss, val, norm, rate = (
        _find_column(rows, known)
        for known in (LOSS_NAMES, VALIDATION_NAMES, GRAD_NORM_NAMES, RATE_NAMES)
    )
    if not rows or (loss is None and val is None):
        raise InputError(
            f"{path} has no column with a loss: found {', '.join(names[:20]) or 'nothing'}; "
            "expected a first line of names, one of them loss, train_loss, train/loss or val_loss"
        )
    steps = _step_numbers(rows)
    validation = _read_series(rows, steps, val)
    return Curve(
        path.name,
        _read_series(rows, steps, loss, beside=val) if loss else validation,
        validation if loss else Series(),
        _read_series(rows, steps, norm),
        _read_series(rows, steps, "clipped" if "clipped" in names else None),
        _read_series(rows, steps, rate),
        _read_vocab_size(path),
    )


# -- rows of a file --------------------------------------------------------------------------------


def _parse_rows(text: str, path: Path) -> list[Row]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(
            f"{path} is empty: expected a line of column names, then a line for each step"
        )
    if lines[0].lstrip().startswith(("{", "[")):
        return [
            _normalize_row(row)
            for row in _parse_json_rows(text, lines, path)
            if row.get("kind", "step") in ("step", "eval")
        ]
    # A text log starts with a step, or has no names in its first line.
    is_text_log = re.match(r"\W*(step|iter|epoch)\w*\W+\d", lines[0], re.I) or not re.search(
        "loss|nll", lines[0], re.I
    )
    rows = [row for row in map(_parse_log_line, lines) if len(row) > 1] if is_text_log else []
    return rows or list(_parse_csv_rows(lines))


def _parse_json_rows(text: str, lines: Sequence[str], path: Path) -> list[Row]:
    try:
        whole = json.loads(text)
    except ValueError:
        pass
    else:  # one JSON value: a trainer_state.json, a list, or a single line
        if isinstance(whole, dict):
            whole = whole.get("log_history", [whole])
        return [row for row in whole if isinstance(row, dict)]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            # A last line without a line break was cut short by a kill, or is still being written.
            if number == len(lines) and not text.endswith("\n"):
                break
            raise InputError(
                f"line {number} of {path} is not JSON ({error}): expected one object a line"
            ) from None
        rows += [row] if isinstance(row, dict) else []
    return rows


def _normalize_row(row: Row) -> Row:
    """A row with normalized names.

    In an eval line of glasslm the split becomes a part of the loss's name.
    """
    row = {_normalize_name(key): value for key, value in row.items()}
    if row.get("kind") == "eval":
        split = "val" if row.get("split", "val") == "val" else f"other_{row['split']}"
        return {"step": row.get("step"), f"{split}_loss": row.get("loss")}
    return row


def _parse_csv_rows(lines: Sequence[str]) -> Iterator[Row]:
    delimiter = max(",;\t|", key=lines[0].count)
    if delimiter not in lines[0]:
        lines = [",".join(line.split()) for line in lines]
        delimiter = ","
    table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    names = [_normalize_name(cell) for cell in next(table)]
    for cells in table:
        if delimiter == ";":
            cells = [cell.replace(",", ".") for cell in cells]  # the comma is the decimal point
        yield dict(zip(names, [*cells, *[""] * (len(names) - len(cells))]))


def _parse_log_line(line: str) -> Row:
    """The row of a text line.

    `step 250: train loss 2.41, val loss 2.45` gives {"step": 250, "train_loss": 2.41, "val_loss":
    2.45}.
    """
    return {_normalize_name(name): value for name, value in _PAIR.findall(line)}


def _normalize_name(column: object) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(column).strip().lower()).strip("_")


# -- columns ---------------------------------------------------------------------------------------


def _find_column(rows: Sequence[Row], known: Sequence[str]) -> str | None:
    """The known name with the most values. A summary at the end of a log may use another name."""
    counts = {name: sum(not _is_empty(row.get(name, "")) for row in rows) for name in known}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] or any(best in row for row in rows) else None


def _step_numbers(rows: Sequence[Row]) -> Array:
    """The step of each row, (N,).

    It is from the column of steps, from an epoch that never repeats, or the row's number.
    """
    for known in (STEP_NAMES, EPOCH_NAMES):
        steps = np.array(
            [
                next(
                    (_parse_number(row[n]) for n in known if not _is_empty(row.get(n, ""))), np.nan
                )
                for row in rows
            ]
        )
        rises = np.isfinite(steps).all() and (known is STEP_NAMES or (np.diff(steps) > 0).all())
        if rises:
            return steps
    return np.arange(1.0, len(rows) + 1)


def _read_series(
    rows: Sequence[Row], steps: Array, name: str | None, beside: str | None = None
) -> Series:
    """One column, without its empty cells.

    Of several values of a step the last one counts: the run was rolled back. An empty cell in the
    loss column is NaN, as some tables write it, unless the row has a value in the column `beside`
    or most cells of the loss are empty.
    """
    if name is None:
        return Series()
    cells = [row.get(name, "") for row in rows]
    blank = [_is_empty(cell) for cell in cells]
    is_loss = beside is not None or name in LOSS_NAMES
    if is_loss and sum(blank) <= len(blank) / 2:
        dropped = [
            name not in row or (empty and not _is_empty(row.get(beside or "", "")))
            for row, empty in zip(rows, blank)
        ]
    else:
        dropped = blank
    values = {
        float(step): _parse_number(cell)
        for step, cell, out in zip(steps, cells, dropped)
        if not out
    }
    ordered = sorted(values.items())
    return Series(
        np.array([step for step, _ in ordered]), np.array([value for _, value in ordered])
    )


def _is_empty(cell: Any) -> bool:
    return isinstance(cell, str) and not cell.strip()


def _parse_number(cell: Any) -> float:
    """A cell as a number; NaN for null and for words."""
    try:
        return math.nan if cell is None else float(cell)
    except (TypeError, ValueError):
        return math.nan


def _read_vocab_size(path: Path) -> int | None:
    """The vocabulary size in the run.json beside a metrics.jsonl of glasslm, or None."""
    record = path.with_name("run.json")
    if path.name != "metrics.jsonl" or not record.is_file():
        return None
    try:
        return int(json.loads(record.read_text(encoding="utf-8"))["tokenizer"]["vocab_size"])
    except (ValueError, KeyError, TypeError):
        return None
