"""Reads a table of runs: a CSV file with the columns N, D or C, and loss."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from glasslm.errors import InputError, explain_system_errors
from glasslm.lab.scaling.law import Observation

COLUMN_NAMES = {
    "N": ("n", "params", "parameters", "n_params", "model_size", "size"),
    "D": ("d", "tokens", "n_tokens", "training_tokens"),
    "C": ("c", "flops", "compute", "training_flops"),
    "loss": ("loss", "val_loss", "final_loss", "final_val_loss", "l"),
    "seed": ("seed",),
}


def read_runs(path: Path) -> tuple[list[Observation], list[str]]:
    """The runs of a table, and a message for each row without a finite loss, which is left out.

    Without a column D, D is C / 6N. Raises InputError for a cell that is not a number, with its
    line, and for a missing column, with the columns of the table.
    """
    with explain_system_errors(
        path, lambda why: InputError(f"{path} cannot be read as text: {why}"), UnicodeDecodeError
    ):
        text = path.read_text(encoding="utf-8-sig")
    dialect = (
        csv.Sniffer().sniff(text[:4096], ",;\t")
        if any(separator in text for separator in ",;\t")
        else csv.excel
    )
    reader = csv.DictReader(text.splitlines(), dialect=dialect)
    names = reader.fieldnames or []
    columns = {name: _find_column(name, names) for name in COLUMN_NAMES}
    has_compute = columns["D"] is not None or columns["C"] is not None
    if columns["N"] is None or columns["loss"] is None or not has_compute:
        raise InputError(
            f"{path} has the columns {', '.join(names) or 'none'}: expected N, D or C, and loss"
        )
    runs, messages = [], []
    for line, row in enumerate(reader, 2):
        values = {
            name: _parse_number(row[column], path, line)
            for name, column in columns.items()
            if column is not None
        }
        if not math.isfinite(values["loss"]):
            messages.append(f"line {line}: the loss is not finite, so the run is left out")
            continue
        N = values["N"]
        D = values["D"] if "D" in values else values["C"] / (6 * N)
        try:
            runs.append(
                Observation(N, D, values["loss"], values.get("C"), int(values.get("seed", 0)))
            )
        except InputError as error:
            raise InputError(f"line {line} of {path}: {error}") from None
    return runs, messages


def _find_column(name: str, columns: Sequence[str]) -> str | None:
    """The column for `name`: first the name itself, then another word for it in either case."""
    for column in columns:
        if column.strip() == name:
            return column
    return next(
        (column for column in columns if column.strip().lower() in COLUMN_NAMES[name]), None
    )


def _parse_number(cell: str | None, path: Path, line: int) -> float:
    text = (cell or "").strip()
    if not text or text.lower() in ("nan", "inf", "-inf", "none", "null"):
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise InputError(f"line {line} of {path}: '{text}' is not a number") from None
