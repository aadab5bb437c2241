"""Tables with a row for each value of a metric, as trackers export them, made wide."""

from __future__ import annotations

import re
from typing import Any

from glasslm.errors import InputError
from glasslm.lab.tables.numbers import is_number
from glasslm.lab.tables.rows import Row, Table

METRIC_NAMES = {"metric", "metricname", "key", "name", "tag", "variable", "series", "measure"}
VALUE_NAMES = {"value", "metricvalue", "y", "scalar"}
STEP_NAMES = {"step", "x", "iteration", "epoch"}
RUN_NAMES = {"run", "runid", "runhash", "runname", "experiment", "experimentkey", "id"}


def widen(table: Table) -> Table:
    """A table with a column for each metric; any other table as it is.

    Raises InputError where the rows are of several runs.
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
    cells: dict[str, dict[str, Any]] = {}
    lines: dict[str, int] = {}
    for row in table.rows:
        key = str(row.cells.get(step))
        lines.setdefault(key, row.line)
        cells.setdefault(key, {step: row.cells.get(step)})[str(row.cells.get(metric))] = (
            row.cells.get(value)
        )
    rows = [Row(lines[key], wide) for key, wide in cells.items()]
    return table._replace(rows=rows, format=f"{table.format} with a row for each metric")
