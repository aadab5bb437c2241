"""The columns of a training log: which is which, the step of each row, and what was left out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.lab.diagnosis.curve_names import (
    EPOCH_NAMES,
    GRAD_NORM_NAMES,
    LOSS_NAMES,
    RATE_NAMES,
    STEP_NAMES,
    VALIDATION_NAMES,
    ends_with_step,
)
from glasslm.lab.tables import columns
from glasslm.lab.tables.columns import Column, find_columns, normalize_name
from glasslm.lab.tables.rows import Row, Table
from glasslm.text import plural

Array = NDArray[np.float64]

LOSS_ROLES = ("loss", "val_loss")
ROLES = ("step", "loss", "val_loss", "grad_norm", "lr")  # that --columns can name
NONFINITE_WORD = re.compile(r"-?1\.#\w+|#(?:NUM|DIV/0)!|[+-]?nan\(.*\)", re.I)


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


class CurveTable:
    """The columns of a table and the step of each of its rows."""

    def __init__(self, table: Table, mapping: dict[str, Column]) -> None:
        self.table = table
        self.columns: dict[str, Column] = {}
        self._notes: list[str] = []
        for role, known in (
            ("loss", LOSS_NAMES),
            ("val_loss", VALIDATION_NAMES),
            ("grad_norm", GRAD_NORM_NAMES),
            ("lr", RATE_NAMES),
            ("clipped", ("clipped",)),
        ):
            if column := mapping.get(role) or self._choose(find_columns(table, known)):
                self.columns[role] = column
        self._read_single_value()
        self._step_columns = [mapping["step"]] if "step" in mapping else self._choose_step_columns()
        self.source = ""  # of the steps, in words
        self.steps: list[float | None] = []  # of each row
        self._used: set[int] = set()  # indices of the rows that gave a value

    def _choose(self, candidates: Sequence[Column]) -> Column | None:
        """The candidate with the most values: a summary at the end may use another name."""
        if not candidates:
            return None
        counts = [
            sum(row.cells.get(column.name) not in (None, "") for row in self.table.rows)
            for column in candidates
        ]
        chosen = candidates[counts.index(max(counts))]
        twins = [
            column.name
            for column in candidates
            if column != chosen and normalize_name(column.name) == normalize_name(chosen.name)
        ]
        if twins:
            self._notes.append(
                f"the file has several runs: `{chosen.name}` is read, not {', '.join(twins[:5])}. "
                f"--columns 'loss={twins[0]}' reads another one"
            )
        return chosen

    def _read_single_value(self) -> None:
        """Take the values of a TensorBoard export, whose file name says what they are."""
        names = {normalize_name(name): name for name in self.table.names}
        if self.columns or set(names) != {"wall_time", "step", "value"}:
            return
        tag = normalize_name(self.table.path.stem)
        is_validation = re.search(r"(?:^|_)(?:val|valid|validation|eval|test)(?:_|$)", tag)
        self.columns["val_loss" if is_validation else "loss"] = Column(names["value"])

    # -- steps -------------------------------------------------------------------------------------

    def _choose_step_columns(self) -> list[Column]:
        """The columns of steps, the preferred one first; others give the steps of other rows.

        A column that counts something else, so that it differs in a row from a preferred one, is
        left out: fairseq's `update` counts epochs, beside `num_updates`.
        """
        chosen: list[Column] = []
        longer = [Column(name) for name in self.table.names if ends_with_step(name)]
        candidates = dict.fromkeys([*find_columns(self.table, STEP_NAMES), *longer])
        # `_step` of Weights & Biases counts the calls that logged something.
        for column in sorted(candidates, key=lambda column: column.name.startswith("_")):
            mine = self._read_steps([column])[0]
            preferred = self._read_steps(chosen)[0]
            if all(a == b for a, b in zip(mine, preferred) if a is not None and b is not None):
                chosen.append(column)
        return chosen

    def find_steps(self) -> None:
        """Find the step of each row: from a column of steps, from epochs, or by counting."""
        self.steps, broken = self._read_steps(self._step_columns)
        self.source = " or ".join(str(column) for column in self._step_columns[:2])
        if broken:
            line, cell = broken[0]
            self._notes.append(
                f"{plural(len(broken), 'step')} cannot be read, the first in line {line} "
                f"({cell!r}): these rows are left out"
            )
        if not self._has_losses_with_steps() and not self._place_losses():
            self._count_steps()
        else:
            self._place_validation()
            self._note_order()

    def _read_steps(
        self, candidates: Sequence[Column]
    ) -> tuple[list[float | None], list[tuple[int, Any]]]:
        """The step of each row, and line and cell of those that are no finite number."""
        steps: list[float | None] = []
        broken = []
        for row in self.table.rows:
            found: float | None = None
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
                    found = number
                    break
            steps.append(found)
        return steps, broken

    def _has_losses_with_steps(self) -> bool:
        return any(
            step is not None and self._has_loss(row)
            for row, step in zip(self.table.rows, self.steps)
        )

    def _place_losses(self) -> bool:
        """Give each loss the last step before it, if no two losses have the same one.

        Some programs write a line `[step=10]`, and below it a line for each value. Returns whether
        steps were given.
        """
        placed: dict[int, float] = {}
        latest: float | None = None
        for i, row in enumerate(self.table.rows):
            if self.steps[i] is not None:
                latest = self.steps[i]
            elif self._value("loss", row) is not None:
                if latest is None:
                    return False
                placed[i], latest = latest, None
        for i, step in placed.items():
            self.steps[i] = step
        if placed:
            self._notes.append(
                "no line has both a loss and a step: the step of the line before is taken for "
                f"{plural(len(placed), 'row')}"
            )
        return bool(placed)

    def _count_steps(self) -> None:
        """Use epochs that rise as steps, or number the rows that have a loss."""
        epochs, _ = self._read_steps(find_columns(self.table, EPOCH_NAMES))
        losses = [self._has_loss(row) for row in self.table.rows]
        main = "loss" if "loss" in self.columns else "val_loss"
        given = [
            epoch
            for epoch, row in zip(epochs, self.table.rows)
            if self._value(main, row) is not None
        ]
        rises = all(epoch is not None for epoch in given) and all(
            a < b for a, b in pairwise(given) if a is not None and b is not None
        )
        if given and rises:
            self.steps = epochs
            self.source = "epochs"
            self._notes.append("there is no column of steps: steps are epochs")
            return
        number = 0.0
        self.steps = []
        for has in losses:
            number += has
            self.steps.append(number if has else None)
        self.source = "the number of the row"
        self._notes.append(
            f"there is no column of steps: the {plural(int(number), 'row')} with a loss are "
            "numbered"
        )

    def _place_validation(self) -> None:
        """Give a validation loss on a line without a step the step of the line before it."""
        last, placed = None, 0
        for i, row in enumerate(self.table.rows):
            if self.steps[i] is not None:
                last = self.steps[i]
            elif self._value("val_loss", row) is not None and self._value("loss", row) is None:
                self.steps[i] = last
                placed += last is not None
        if placed:
            self._notes.append(
                f"the step of the line before is taken for {placed:,} validation loss"
                f"{'es' * (placed != 1)} without a step"
            )

    def _note_order(self) -> None:
        known = [(row.line, s) for row, s in zip(self.table.rows, self.steps) if s is not None]
        back = [(b[0], a[1], b[1]) for a, b in pairwise(known) if b[1] < a[1]]
        if len(back) > len(known) / 2:
            self._notes.append("the steps are not in order: they are sorted")
        elif back:
            line, before, after = back[0]
            self._notes.append(
                f"the steps go back {plural(len(back), 'time')}, first from {before:,g} to "
                f"{after:,g} in line {line}: of a repeated step the last value counts"
            )

    # -- values ------------------------------------------------------------------------------------

    def series(self, role: str) -> Series:
        """One column by step, without its missing cells; of a repeated step the last one counts."""
        values: dict[float, float] = {}
        lost: list[int] = []
        replaced: list[int] = []
        latest: float | None = None
        for i, row in enumerate(self.table.rows):
            value, step = self._value(role, row), self.steps[i]
            if value is None:
                continue
            if step is None:
                lost.append(row.line)
                continue
            if step == latest and values[step] != value:
                replaced.append(row.line)
            values[step], latest = value, step
            self._used.add(i)
        if lost and role in LOSS_ROLES:
            self._notes.append(
                f"{plural(len(lost), 'row')} with a loss and no step left out, the first in line "
                f"{lost[0]}"
            )
        if replaced and role in LOSS_ROLES:
            self._notes.append(
                f"{plural(len(replaced), 'row')} with another loss at the step of the row before, "
                f"the first in line {replaced[0]}: the last loss of a step counts"
            )
        self._note_impossible_losses(role, list(values.values()))
        ordered = sorted(values.items())
        return Series(
            np.array([step for step, _ in ordered], float), np.array([v for _, v in ordered], float)
        )

    def _note_impossible_losses(self, role: str, values: Sequence[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        if role not in LOSS_ROLES or not finite:
            return
        median = float(np.median(finite))
        if not 0 <= median <= columns.MAX_LOSS:
            self._notes.append(
                f"the losses from {self.columns[role]} are {median:,.4g} in the median, which "
                "cannot be nats per token: they may be sums, perplexities, another objective, or "
                "numbers with another decimal mark"
            )

    def _has_loss(self, row: Row) -> bool:
        return self._value("loss", row) is not None or self._value("val_loss", row) is not None

    def _value(self, role: str, row: Row) -> float | None:
        """The number of a row in the column of a role; None where it is missing or a word."""
        column = self.columns.get(role)
        if column is None or column.name not in row.cells:
            return None
        cell = row.cells[column.name]
        if isinstance(cell, bool):
            return float(cell)
        if isinstance(cell, str) and NONFINITE_WORD.fullmatch(cell.strip()):
            return math.nan
        try:
            return column.parse(cell, self.table.decimal_comma)
        except ValueError:
            return None

    def unit(self, role: str) -> str:
        """The unit of the losses of a role, "loss" or "val_loss", which must have a column."""
        return columns.loss_unit(self.columns[role])

    # -- what is said ------------------------------------------------------------------------------

    @property
    def rows_read(self) -> int:
        """Rows that gave a value."""
        return len(self._used)

    @property
    def rows_dropped(self) -> int:
        """Lines and rows that gave none."""
        return len(self.table.dropped) + len(self.table.rows) - len(self._used)

    def messages(self) -> list[str]:
        """What was taken for what, what was left out, and what is doubtful."""
        words = {
            "loss": "training loss",
            "val_loss": "validation loss",
            "grad_norm": "gradient norm",
        }
        taken = ", ".join(
            f"{words[role]} from {self.columns[role]}" for role in words if role in self.columns
        )
        units = {words[role]: self.unit(role) for role in LOSS_ROLES if role in self.columns}
        if len(set(units.values())) == 1:
            unit = "losses taken as " + next(iter(units.values()))
        else:
            unit = ", ".join(f"{name} taken as {unit}" for name, unit in units.items())
            unit += ", so that the two are not compared"
        first = (
            f"{self.table.format}: steps from {self.source}, {taken}; {unit}; "
            f"{plural(self.rows_read, 'row')} read, "
            f"{self.rows_dropped:,} without a step or a value left out"
        )
        return [first, *self._name_other_losses(), *dict.fromkeys(self._notes)]

    def _name_other_losses(self) -> list[str]:
        """A message where no training loss was found, but other columns may be it."""
        taken = {column.name for column in self.columns.values()}
        others = [
            name
            for name in self.table.names
            if name not in taken
            and re.search(r"(?:^|_)(?:loss|nll|cross_entropy)(?:_|$)", normalize_name(name))
            and "scale" not in normalize_name(name)
        ]
        if "loss" in self.columns or not others:
            return []
        return [
            f"no training loss was found. It could be {', '.join(others[:5])} "
            f"(--columns 'loss={others[0]}')"
        ]
