"""Anyone's log of a training run, read into a curve: CSV, JSON lines (ours, nanoGPT's, Hugging Face's), or plain lines
such as `iter 100: loss 2.41, lr 1e-3`.

Columns are found by their names. What is not a number stays in the curve as NaN: it is part of what happened.
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

from glasslm.errors import InputError

Array = NDArray[np.float64]
Row = dict[str, Any]

# What a column may be called, once letters are small and all else is an underscore; the first ones before the others
STEP = ("step", "global_step", "trainer_global_step", "train_global_step", "iter", "iteration", "update", "batch",
        "steps", "iters", "iterations", "updates")  # fmt: skip
EPOCH = ("epoch", "train_epoch", "epochs")
LOSS = (
    "loss",
    "train_loss",
    "training_loss",
    "loss_train",
    "train_loss_step",
    "train_cross_entropy",
    "nll",
)
VALIDATION = ("val_loss", "eval_loss", "valid_loss", "validation_loss", "loss_val", "loss_eval", "dev_loss",
              "test_loss", "val_cross_entropy")  # fmt: skip
GRAD_NORM = (
    "grad_norm",
    "train_grad_norm",
    "gradient_norm",
    "gnorm",
    "grad_norm_total",
    "total_grad_norm",
)
RATE = ("lr", "learning_rate", "train_lr", "train_learning_rate")

_PAIR = re.compile(
    r"([a-z][a-z_/ ]*?)\s*[:= ]\s*([+-]?(?:\d[\d_]*\.?\d*(?:e[+-]?\d+)?|nan|inf(?:inity)?))", re.I
)


@dataclass(frozen=True)
class Series:
    """Values by step, ascending; values that are not finite among them."""

    steps: Array = field(default_factory=lambda: np.zeros(0))  # (N,)
    values: Array = field(default_factory=lambda: np.zeros(0))  # (N,)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class Curve:
    """What a log says, each column with the steps at which it was written. A column that is not there is empty."""

    name: str
    train: Series
    validation: Series = field(default_factory=Series)
    grad_norm: Series = field(default_factory=Series)
    clipped: Series = field(default_factory=Series)  # 1 where the gradient was clipped
    rate: Series = field(default_factory=Series)
    vocab_size: int | None = None


def read(path: Path) -> Curve:
    """The curve in a .csv, .jsonl or .json file, in a log's plain lines, or in a run folder's metrics.jsonl.

    Raises InputError, with the columns that were found, when there is no loss among them or nothing can be read.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give a .csv or .jsonl file, or a run"
        ) from error
    rows = _rows(text, path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = {key: _column(rows, known) for key, known in
             {"loss": LOSS, "val": VALIDATION, "norm": GRAD_NORM, "rate": RATE}.items()}  # fmt: skip
    if not rows or (found["loss"] is None and found["val"] is None):
        raise InputError(
            f"{path} has no column with a loss: found {', '.join(names[:20]) or 'nothing'}; expected one named "
            "loss, train_loss, train/loss, val_loss or the like, in a first line of names"
        )
    steps = _steps(rows)
    validation = _series(rows, steps, found["val"])
    return Curve(
        path.name,
        _series(rows, steps, found["loss"], beside=found["val"]) if found["loss"] else validation,
        validation if found["loss"] else Series(),
        _series(rows, steps, found["norm"]),
        _series(rows, steps, "clipped" if "clipped" in names else None),
        _series(rows, steps, found["rate"]),
        _vocab_size(path),
    )


# -- the rows of a file, as dictionaries ------------------------------------------------------------------------------


def _rows(text: str, path: Path) -> list[Row]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(
            f"{path} is empty: expected a line of column names and a line for each step"
        )
    if lines[0].lstrip().startswith(("{", "[")):
        return [
            _plain(row)
            for row in _json_rows(text, lines, path)
            if row.get("kind", "step") in ("step", "eval")
        ]
    prose = re.match(r"\W*(step|iter|epoch)\w*\W+\d", lines[0], re.I) or not re.search(
        "loss|nll", lines[0], re.I
    )
    told = [row for row in map(_log_line, lines) if len(row) > 1] if prose else []
    return told or list(_csv_rows(lines))


def _json_rows(text: str, lines: Sequence[str], path: Path) -> list[Row]:
    try:
        whole = json.loads(text)
    except ValueError:
        pass
    else:  # one value: a trainer_state.json, a list, or a single line
        if isinstance(whole, dict):
            whole = whole.get("log_history", [whole])
        return [row for row in whole if isinstance(row, dict)]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not text.endswith(
                "\n"
            ):  # cut short: it is being written, or was killed
                break
            raise InputError(
                f"line {number} of {path} is no JSON ({error}): expected one object a line"
            ) from None
        rows += [row] if isinstance(row, dict) else []
    return rows


def _plain(row: Row) -> Row:
    """A row with plain names; an eval line of ours, which has its split beside its loss, with that in the name."""
    row = {_name(key): value for key, value in row.items()}
    if row.get("kind") == "eval":
        split = "val" if row.get("split", "val") == "val" else f"other_{row['split']}"
        return {"step": row.get("step"), f"{split}_loss": row.get("loss")}
    return row


def _csv_rows(lines: Sequence[str]) -> Iterator[Row]:
    delimiter = max(",;\t|", key=lines[0].count)
    if delimiter not in lines[0]:
        lines = [",".join(line.split()) for line in lines]
        delimiter = ","
    table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    names = [_name(cell) for cell in next(table)]
    for cells in table:
        if delimiter == ";":
            cells = [
                cell.replace(",", ".") for cell in cells
            ]  # where the comma is the decimal point
        yield dict(zip(names, [*cells, *[""] * (len(names) - len(cells))]))


def _log_line(line: str) -> Row:
    """`step 250: train loss 2.41, val loss 2.45` as {"step": 250, "train_loss": 2.41, "val_loss": 2.45}."""
    return {_name(name): value for name, value in _PAIR.findall(line)}


def _name(column: object) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(column).strip().lower()).strip("_")


# -- columns ----------------------------------------------------------------------------------------------------------


def _column(rows: Sequence[Row], known: Sequence[str]) -> str | None:
    """Of the known names the one with the most values: a summary at the end may have another one."""
    counts = {name: sum(not _empty(row.get(name, "")) for row in rows) for name in known}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] or any(best in row for row in rows) else None


def _steps(rows: Sequence[Row]) -> Array:
    """The step of each row: what its column says, or an epoch that never repeats, or the row's number."""
    for known in (STEP, EPOCH):
        steps = np.array(
            [
                next((_number(row[n]) for n in known if not _empty(row.get(n, ""))), np.nan)
                for row in rows
            ]
        )
        rises = np.isfinite(steps).all() and (known is STEP or (np.diff(steps) > 0).all())
        if rises:
            return steps
    return np.arange(1.0, len(rows) + 1)


def _series(
    rows: Sequence[Row], steps: Array, name: str | None, beside: str | None = None
) -> Series:
    """One column. An empty cell is a value that was not written, and left out. In the loss it counts as not finite
    (so do tables write NaN) unless the row has the value `beside`, or most cells are empty.

    Of several values of a step the last one counts: the run went back and came by again.
    """
    if name is None:
        return Series()
    cells = [row.get(name, "") for row in rows]
    blank = [_empty(cell) for cell in cells]
    dense = beside is not None or name in LOSS
    if dense and sum(blank) <= len(blank) / 2:
        dropped = [name not in row or (empty and not _empty(row.get(beside or "", "")))
                   for row, empty in zip(rows, blank)]  # fmt: skip
    else:
        dropped = blank
    values = {
        float(step): _number(cell) for step, cell, out in zip(steps, cells, dropped) if not out
    }
    ordered = sorted(values.items())
    return Series(
        np.array([step for step, _ in ordered]), np.array([value for _, value in ordered])
    )


def _empty(cell: Any) -> bool:
    return isinstance(cell, str) and not cell.strip()


def _number(cell: Any) -> float:
    """A cell as a number; NaN for null, for words, and for what is missing."""
    try:
        return math.nan if cell is None else float(cell)
    except (TypeError, ValueError):
        return math.nan


def _vocab_size(path: Path) -> int | None:
    """Of our own run, whose run.json is beside its metrics.jsonl."""
    record = path.with_name("run.json")
    if path.name != "metrics.jsonl" or not record.is_file():
        return None
    try:
        return int(json.loads(record.read_text(encoding="utf-8"))["tokenizer"]["vocab_size"])
    except (ValueError, KeyError, TypeError):
        return None
