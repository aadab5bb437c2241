"""Losses by seed in tables with a column for each variant or for each seed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import median

from glasslm.errors import InputError
from glasslm.lab.diagnosis import curve_names
from glasslm.lab.tables import columns
from glasslm.lab.tables.columns import Column
from glasslm.lab.tables.numbers import is_missing, is_number
from glasslm.lab.tables.rows import Row, Table

LOSS_NAMES = (
    "final_val_loss", "val_loss", "loss", "eval_loss", "validation_loss", "final_loss", "test_loss",
    "best_val_loss", "val_bpb", "bpb", "train_loss", "val_ppl", "ppl", "perplexity",
)  # fmt: skip
DIVERGED = {"diverged", "diverges", "div", "failed"}  # words for a loss that is not finite
# Names of what grows within a run; S and it can be variants.
PROGRESS_NAMES = sorted(
    {*curve_names.STEP_NAMES, *curve_names.EPOCH_NAMES, *curve_names.TOKEN_NAMES} - {"s", "it"}
)
SETTING_NAMES = {
    *PROGRESS_NAMES, *curve_names.RATE_NAMES, "params", "parameters", "n_params", "num_params",
    "time", "seconds", "minutes", "hours", "wall_time", "runtime", "batch_size", "flops",
}  # fmt: skip
_SEED_COLUMN = re.compile(r"(?:seed|s|run|trial)?[-_ ]?\d+", re.I)
_INDEX_NAME = re.compile(r"|index|unnamed_\d+")  # the normalized name of the index of pandas
_COUNTER_NAMES = {"row", "run", "step"}
EXPECTED = (
    "variant, seed and loss, a row for each run; or seed and a column of losses for each variant"
)

Losses = dict[str, dict[str, float | None]]  # by variant, then by seed; None: not finite


def _seed_columns(table: Table, variant: Column) -> list[str]:
    """The columns beside that of the variants, without the index of pandas."""
    return [name for name in table.names if name != variant.name and not _is_index(name)]


def has_seed_columns(table: Table, variant: Column) -> bool:
    """Whether each column beside that of the variants has the name of a seed."""
    names = _seed_columns(table, variant)
    return len(names) > 1 and all(_SEED_COLUMN.fullmatch(name.strip()) for name in names)


def read_seed_columns(table: Table, variant: Column) -> Losses:
    """The losses of a table with a row for each variant and a column for each seed."""
    losses: Losses = {}
    names = _seed_columns(table, variant)
    for row in table.rows:
        variant_name = str(row.cells.get(variant.name)).strip()
        group = losses.setdefault(variant_name, {})
        for name in names:
            value = read_loss(row, Column(name), table)
            if value is not None:
                add_loss(group, variant_name, name, value, f"line {row.line} of {table.path}")
    return losses


def read_loss(row: Row, loss: Column, table: Table) -> float | None:
    """The loss of a row, NaN of a run that diverged, None where it is missing."""
    failure = columns.find_failure(row, loss)
    if failure and failure[1] in DIVERGED:
        return math.nan
    return loss.number(row, table)


def add_loss(
    group: dict[str, float | None], variant: str, seed: str, value: float, where: str
) -> None:
    """Add the loss of a seed. Raises InputError where the variant has one already."""
    if seed in group:
        raise InputError(
            f"{where}: variant {variant} has seed {seed} twice: expected one final loss for each "
            "run"
        )
    group[seed] = value if math.isfinite(value) else None


def read_wide(table: Table, seed: Column | None) -> tuple[Losses, list[str], str]:
    """The losses of the columns, the names of columns such as an index or steps, and the unit."""
    names = [name for name in table.names if seed is None or name != seed.name]
    numeric = [
        name
        for name in names
        if all(_is_loss_cell(row.cells.get(name, "")) for row in table.rows)
        and not all(is_missing(row.cells.get(name)) for row in table.rows)
    ]
    others = [
        name
        for name in numeric
        if _is_counter(table, name)
        or _is_setting(table, name)
        or _median(table, columns.to_loss(Column(name))[0]) > columns.MAX_LOSS
    ]
    numeric = [name for name in numeric if name not in others]
    if len(numeric) < 2 or len(numeric) + len(others) < len(names):
        raise columns.unreadable(table.path, table, EXPECTED)
    found, unit = _read_unit(table, numeric)
    losses: Losses = {name: {} for name in numeric}
    for i, row in enumerate(table.rows):
        key = str(row.cells.get(seed.name, "")).strip() if seed else str(i)
        for column in found:
            name, value = column.name, read_loss(row, column, table)
            if value is not None:
                add_loss(losses[name], name, key, value, f"line {row.line} of {table.path}")
    return losses, [name or "the column without a name" for name in others], unit


def _read_unit(table: Table, names: Sequence[str]) -> tuple[list[Column], str]:
    """The columns of losses and their one unit, by their names.

    Raises InputError for several units, and for columns that are all losses of the same run.
    """
    if all(
        columns.normalize_name(name)
        in {*LOSS_NAMES, *curve_names.LOSS_NAMES, *curve_names.VALIDATION_NAMES}
        for name in names
    ):
        raise InputError(
            f"{table.path} has {', '.join(names)}, losses of the same runs, and no variants: "
            f"expected {EXPECTED}"
        )
    found = [columns.to_loss(Column(name)) for name in names]
    units = sorted(
        {f"logarithms of perplexities in {unit}" if c.perplexity else unit for c, unit in found}
    )
    if len(units) > 1:
        raise InputError(
            f"{table.path} has {' and '.join(units)}, by the names of its columns: expected one "
            "unit; rename a column if its name tells no unit"
        )
    return [column for column, _ in found], units[0]


def _is_index(name: str) -> bool:
    """Whether a column is the index of pandas: without a name, "index" or "Unnamed: 0"."""
    normalized = columns.normalize_name(name)
    # A name in another alphabet is normalized to nothing.
    return _INDEX_NAME.fullmatch(normalized) is not None and (normalized != "" or not name.strip())


def _is_counter(table: Table, name: str) -> bool:
    """Whether a column of numbers counts the rows or steps, by its name or its values."""
    if _is_index(name) or columns.normalize_name(name) in _COUNTER_NAMES:
        return True
    numbers = _read_numbers(table, Column(name))
    return len(numbers) > 1 and any(
        numbers == list(range(start, start + len(numbers))) for start in (0, 1)
    )


def _is_setting(table: Table, name: str) -> bool:
    """Whether a column is a setting or a size, by its name or because it is one whole number."""
    if columns.split_unit(name)[0] in SETTING_NAMES:
        return True
    numbers = _read_numbers(table, Column(name))
    first = numbers[0]
    return first is not None and first % 1 == 0 and len(numbers) > 1 and set(numbers) == {first}


def _is_loss_cell(cell: object) -> bool:
    return is_number(cell) or str(cell).strip().lower() in DIVERGED


def _read_numbers(table: Table, column: Column) -> list[float | None]:
    """The numbers of a column, NaN for a word such as "diverged"."""
    return [read_loss(row, column, table) for row in table.rows]


def _median(table: Table, column: Column) -> float:
    """The median of the finite numbers of a column; NaN if it has none."""
    numbers = _read_numbers(table, column)
    finite = [number for number in numbers if number is not None and math.isfinite(number)]
    return median(finite) if finite else math.nan
