"""The step of each row of a training log: from a column, from a counter that begins again in each
epoch, from the line before, from epochs or tokens, or by counting the rows.

A step is never invented in silence: what was taken is in `source` and `notes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from glasslm.lab.diagnosis.curve_names import (
    EPOCH_NAMES,
    STEP_NAMES,
    TOKEN_NAMES,
    ends_with_step,
)
from glasslm.lab.tables.columns import Column, find_columns, normalize_name
from glasslm.lab.tables.log_lines import LEADING_NUMBER, PROGRESS, STEPS_PER_EPOCH
from glasslm.lab.tables.rows import Row, Table
from glasslm.text import plural

UNITS = {"epoch": "epoch", "token": "token", "sample": "sample", "example": "sample"}
MAX_LEADING_NUMBER = 1e9  # a larger one is a time


@dataclass
class Steps:
    """The step of each row (None: it has none), where they are from, and what is to be said."""

    values: list[float | None]
    source: str
    unit: str = "step"
    notes: list[str] = field(default_factory=list)


class StepFinder:
    """Finds the steps of the rows of a table.

    `has_loss` and `has_validation` tell whether a row has a training or a validation loss.
    """

    def __init__(
        self,
        table: Table,
        has_loss: Callable[[Row], bool],
        has_validation: Callable[[Row], bool],
        mapped: Column | None = None,
    ) -> None:
        self.table = table
        self._loss_rows = [has_loss(row) for row in table.rows]
        self._validation_rows = [has_validation(row) for row in table.rows]
        self._columns = [mapped] if mapped else self._choose_columns()

    def find(self) -> Steps:
        """The step of each row."""
        values, broken = self._read(self._columns)
        steps = Steps(values, " or ".join(str(column) for column in self._columns[:2]))
        steps.unit = _unit(self._columns[0].name) if self._columns else "step"
        if broken:
            line, cell = broken[0]
            steps.notes.append(
                f"{plural(len(broken), 'step')} cannot be read, the first in line {line} "
                f"({cell!r}): these rows are left out"
            )
        is_placed = any(
            step is not None and (loss or validation)
            for step, loss, validation in zip(values, self._loss_rows, self._validation_rows)
        )
        if not is_placed and not self._place_blocks(steps):
            self._take_other_steps(steps)
            return steps
        self._count_on(steps)
        self._place_validation(steps)
        self._note_order(steps)
        return steps

    def _choose_columns(self) -> list[Column]:
        """The columns of steps, the preferred one first; others give the steps of other rows.

        A column that counts something else, so that it differs in a row from a preferred one, is
        left out: fairseq's `update` counts epochs, beside `num_updates`. So is one that is never
        beside a loss, such as the number of iterations in a header, if another one is.
        """
        longer = [Column(name) for name in self.table.names if ends_with_step(name)]
        candidates = list(dict.fromkeys([*find_columns(self.table, STEP_NAMES), *longer]))
        beside = [column for column in candidates if self._is_beside_a_loss(column)]
        chosen: list[Column] = []
        # `_step` of Weights & Biases counts the calls that logged something.
        for column in sorted(beside or candidates, key=lambda column: column.name.startswith("_")):
            mine = self._read([column])[0]
            preferred = self._read(chosen)[0]
            if all(a == b for a, b in zip(mine, preferred) if a is not None and b is not None):
                chosen.append(column)
        return chosen

    def _is_beside_a_loss(self, column: Column) -> bool:
        return any(
            (loss or validation) and row.cells.get(column.name) not in (None, "")
            for row, loss, validation in zip(
                self.table.rows, self._loss_rows, self._validation_rows
            )
        )

    def _read(
        self, candidates: Sequence[Column]
    ) -> tuple[list[float | None], list[tuple[int, Any]]]:
        """The step of each row, and line and cell of those that are no finite number."""
        steps: list[float | None] = []
        broken = []
        for row in self.table.rows:
            step: float | None = None
            for column in candidates:
                cell = row.cells.get(column.name)
                try:
                    number = column.parse(cell, self.table.decimal_comma)
                except ValueError:
                    number = math.nan
                if number is not None and not math.isfinite(number):
                    broken.append((row.line, cell))
                    break
                if number is not None:
                    step = number
                    break
            steps.append(step)
        return steps, broken

    def _place_blocks(self, steps: Steps) -> bool:
        """Give the rows of a block the step in its first line, if no block has two losses.

        Some programs write a line `[step=10]`, and below it a line for each value. Returns whether
        steps were given.
        """
        placed: dict[int, float] = {}
        latest: float | None = None
        n_losses = 0  # of the block
        for i, step in enumerate(steps.values):
            if step is not None:
                latest, n_losses = step, 0
                continue
            n_losses += self._loss_rows[i]
            if n_losses > 1 or (latest is None and self._loss_rows[i]):
                return False
            if latest is not None:
                placed[i] = latest
        is_any = any(self._loss_rows[i] or self._validation_rows[i] for i in placed)
        if not is_any:
            return False
        for i, step in placed.items():
            steps.values[i] = step
        n_placed = sum(self._loss_rows[i] or self._validation_rows[i] for i in placed)
        steps.notes.append(
            "no line has both a loss and a step: the step of the line before is taken for "
            f"{n_placed:,} loss{'es' * (n_placed != 1)}"
        )
        return True

    def _take_other_steps(self, steps: Steps) -> None:
        """Take numbers at the start of lines, progress bars, epochs or tokens; or count rows."""
        for columns, unit, words in (
            ([Column(LEADING_NUMBER)], "step", "the numbers at the start of lines"),
            ([Column(PROGRESS)], "step", "the counts of the progress bars"),
            (find_columns(self.table, EPOCH_NAMES), "epoch", "epochs"),
            (find_columns(self.table, TOKEN_NAMES), "", ""),
        ):
            values, _ = self._read(columns)
            is_leading = columns == [Column(LEADING_NUMBER)]
            if not self._rises(values, MAX_LEADING_NUMBER if is_leading else math.inf):
                continue
            steps.values = values
            steps.unit = unit or _unit(columns[0].name)
            steps.source = words or str(columns[0])
            steps.notes.append(f"there is no column of steps: steps are {words or steps.source}")
            self._place_validation(steps)
            return
        number = 0.0
        steps.values = []
        for has_loss in map(max, self._loss_rows, self._validation_rows):
            number += has_loss
            steps.values.append(number if has_loss else None)
        steps.source, steps.unit = "the number of the row", "row"
        steps.notes.append(
            f"there is no column of steps: the {plural(int(number), 'row')} with a loss are "
            "numbered"
        )

    def _rises(self, values: Sequence[float | None], highest: float) -> bool:
        """Whether all training losses have a value, and these rise up to `highest`."""
        main = self._loss_rows if any(self._loss_rows) else self._validation_rows
        loss_steps = [value for value, is_main in zip(values, main) if is_main]
        known = [value for value in loss_steps if value is not None]
        return 0 < len(loss_steps) == len(known) and _is_rising(known) and known[-1] <= highest

    def _count_on(self, steps: Steps) -> None:
        """Count steps on that begin again in each epoch."""
        filled = _fill(self._read(find_columns(self.table, EPOCH_NAMES))[0])
        rows = [
            (i, epoch, step)
            for i, (epoch, step) in enumerate(zip(filled, steps.values))
            if epoch is not None and step is not None
        ]
        if not rows or len(rows) < sum(step is not None for step in steps.values):
            return
        first = rows[0][1]
        changes = [(a, b) for a, b in pairwise(rows) if a[1] != b[1] or b[2] < a[2]]
        if not changes or any(
            not (b[1] > a[1] and b[2] <= a[2] and float(b[1]).is_integer()) for a, b in changes
        ):
            return
        totals = [total for total in self._read([Column(STEPS_PER_EPOCH)])[0] if total]
        counts = sorted({step for _, _, step in rows})
        gap = min((b - a for a, b in pairwise(counts)), default=counts[0])
        length = max(totals) if totals else counts[-1] - counts[0] + gap
        for i, epoch, step in rows:
            steps.values[i] = (epoch - first) * length + step
        steps.notes.append(
            f"the steps begin again in each epoch: they are counted on, {length:,g} for an epoch"
        )

    def _place_validation(self, steps: Steps) -> None:
        """Give a validation loss on a line without a step the step of the line before it."""
        last, placed = None, 0
        for i, step in enumerate(steps.values):
            if step is not None:
                last = step
            elif self._validation_rows[i] and not self._loss_rows[i]:
                steps.values[i] = last
                placed += last is not None
        if placed:
            steps.notes.append(
                f"the step of the line before is taken for {placed:,} validation loss"
                f"{'es' * (placed != 1)} without a step"
            )

    def _note_order(self, steps: Steps) -> None:
        """Note where steps go back, of training rows and of validation rows by themselves."""
        known = [
            (validation and not loss, row.line, step)
            for row, loss, validation, step in zip(
                self.table.rows, self._loss_rows, self._validation_rows, steps.values
            )
            if step is not None
        ]
        known.sort(key=lambda entry: entry[0])  # validation rows may follow all training rows
        back = [(b[1], a[2], b[2]) for a, b in pairwise(known) if a[0] == b[0] and b[2] < a[2]]
        if len(back) > len(known) / 2:
            steps.notes.append("the steps are not in order: they are sorted")
        elif back:
            line, before, after = back[0]
            steps.notes.append(
                f"the steps go back {plural(len(back), 'time')}, first from {before:,g} to "
                f"{after:,g} in line {line}: of a repeated step the last value counts"
            )


def _unit(name: str) -> str:
    """The unit of the numbers in a column of steps."""
    words = [word.removesuffix("s") for word in normalize_name(name).split("_")]
    return next((UNITS[word] for word in words if word in UNITS), "step")


def _is_rising(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _fill(values: Sequence[float | None]) -> list[float | None]:
    """The values, with the last one before it in place of a missing one."""
    filled: list[float | None] = []
    for value in values:
        filled.append(value if value is not None or not filled else filled[-1])
    return filled
