"""Anybody's table of runs: a CSV file with columns N, D or C, and loss."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from glasslm.errors import InputError
from glasslm.lab.scaling.law import Observation

NAMES = {
    "N": ("n", "params", "parameters", "n_params", "model_size", "size"),
    "D": ("d", "tokens", "n_tokens", "training_tokens"),
    "C": ("c", "flops", "compute", "training_flops"),
    "loss": ("loss", "val_loss", "final_loss", "final_val_loss", "l"),
    "seed": ("seed",),
}


def read(path: Path) -> tuple[list[Observation], list[str]]:
    """The runs of a table, and what there is to say about rows that were left out, because they have no finite loss.

    Without D it is C / 6N. Raises InputError, with the line, for what is no number, and with the columns if one lacks.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    dialect = (
        csv.Sniffer().sniff(text[:4096], ",;\t")
        if any(mark in text for mark in ",;\t")
        else csv.excel
    )
    reader = csv.DictReader(text.splitlines(), dialect=dialect)
    columns = {name: _column(name, reader.fieldnames or []) for name in NAMES}
    if (
        columns["N"] is None
        or columns["loss"] is None
        or (columns["D"] is None and columns["C"] is None)
    ):
        raise InputError(
            f"{path} has the columns {', '.join(reader.fieldnames or []) or 'none'}: expected N, D or C, and loss"
        )
    found, lost = [], []
    for number, row in enumerate(reader, 2):
        values = {
            name: _number(row[column], path, number)
            for name, column in columns.items()
            if column is not None
        }
        if not math.isfinite(values["loss"]):
            lost.append(
                f"line {number}: no finite loss, so the run is left out; that it diverged is a result, too"
            )
            continue
        N = values["N"]
        D = values["D"] if "D" in values else values["C"] / (6 * N)
        try:
            found.append(
                Observation(N, D, values["loss"], values.get("C"), int(values.get("seed", 0)))
            )
        except InputError as error:
            raise InputError(f"line {number} of {path}: {error}") from None
    return found, lost


def _column(name: str, there: Sequence[str]) -> str | None:
    """The column that holds `name`; the letter itself, in either case, before other words for it."""
    for column in there:
        if column.strip() == name:
            return column
    return next((column for column in there if column.strip().lower() in NAMES[name]), None)


def _number(cell: str | None, path: Path, line: int) -> float:
    text = (cell or "").strip()
    if not text or text.lower() in ("nan", "inf", "-inf", "none", "null"):
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise InputError(f"line {line} of {path}: '{text}' is no number") from None
