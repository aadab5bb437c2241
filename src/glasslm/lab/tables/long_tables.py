"""Tables with a row for each value of a metric, or for each split of the text, made wide."""

from __future__ import annotations

import re
from typing import Any

from glasslm.errors import InputError
from glasslm.lab.tables.json_records import TRAIN_WORDS, VALIDATION_WORDS
from glasslm.lab.tables.numbers import is_number
from glasslm.lab.tables.rows import Row, Table

METRIC_NAMES = {"metric", "metricname", "key", "name", "tag", "variable", "series", "measure"}
VALUE_NAMES = {"value", "metricvalue", "y", "scalar"}
STEP_NAMES = {"step", "x", "iteration", "epoch"}
RUN_NAMES = {"run", "runid", "runhash", "runname", "experiment", "experimentkey", "id"}


SPLIT_NAMES = ("split", "mode", "phase", "stage", "subset", "partition", "set")
SHARED_NAMES = re.compile(
    r"(?:^|_)(?:step|iter|iteration|epoch|batch|tokens|samples|update)s?(?:_|$)"
)


def separate_splits(table: Table) -> Table:
    """A table in which the values of validation rows have "val" before their names.

    A column such as `split` or `mode` tells which rows these are. Rows of a test text are left out
    if there are validation rows. Any other table is returned as it is.
    """
    for name in table.names:
        if name.strip().lower() not in SPLIT_NAMES:
            continue
        words = {str(row.cells.get(name)).strip().lower() for row in table.rows}
        if not words & TRAIN_WORDS or not words & VALIDATION_WORDS:
            continue
        validation = words & (VALIDATION_WORDS - {"test"}) or {"test"}
        rows, dropped = [], list(table.dropped)
        for row in table.rows:
            split = str(row.cells.get(name)).strip().lower()
            cells = {key: cell for key, cell in row.cells.items() if key != name}
            if split in validation:
                cells = {
                    key if SHARED_NAMES.search(key.lower()) else f"val {key}": cell
                    for key, cell in cells.items()
                }
            elif split not in TRAIN_WORDS:
                dropped.append(row.line)
                continue
            rows.append(Row(row.line, cells))
        return table._replace(rows=rows, dropped=dropped, format=f"{table.format} by `{name}`")
    return table


def require_one_split(table: Table) -> None:
    """Raise InputError for a table of runs with rows of training and of validation texts."""
    if separate_splits(table) is not table:
        raise InputError(
            f"{table.path} has rows of training and of validation losses: expected a row for each "
            "run; keep the rows of one split alone"
        )


def widen(table: Table) -> Table:
    """A table with a column for each metric; any other table as it is.

    Another value of a metric at the same step gets a row of its own. Raises InputError where the
    rows are of several runs.
    """
    by_word = {re.sub(r"[^a-z]", "", name.lower()): name for name in table.names}
    by_word |= {word.removeprefix("metric").removesuffix("name") or word: by_word[word]
                for word in list(by_word) if word.startswith("metric")}  # fmt: skip
    metric, value, step = (
        next((by_word[word] for word in by_word if word in words), None)
        for words in (METRIC_NAMES, VALUE_NAMES, STEP_NAMES)
    )
    if metric is None or value is None or step is None:
        return table
    if any(is_number(row.cells.get(metric)) for row in table.rows):
        return table
    run = next((by_word[word] for word in by_word if word in RUN_NAMES), None)
    runs = {str(row.cells.get(run)) for row in table.rows} if run else set()
    if len(runs) > 1:
        raise InputError(
            f"{table.path} has the values of {len(runs)} runs in `{run}`: expected those of one; "
            "keep its rows alone"
        )
    latest: dict[str, dict[str, Any]] = {}  # by step
    rows = []
    for row in table.rows:
        key, name = str(row.cells.get(step)), str(row.cells.get(metric))
        number = row.cells.get(value)
        cells = latest.get(key)
        if cells is None or (name in cells and cells[name] != number):
            latest[key] = {step: row.cells.get(step)}
            rows.append(Row(row.line, latest[key]))
        latest[key][name] = number
    return table._replace(rows=rows, format=f"{table.format} with a row for each metric")
