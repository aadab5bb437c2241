"""The columns of a training log: which is which, their values by step, and what was left out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import InputError
from glasslm.lab.diagnosis.curve_names import (
    GRAD_NORM_NAMES,
    LOSS_NAMES,
    LOSS_WORDS,
    NORM_PLAIN_WORDS,
    NORM_WORDS,
    PLAIN_WORDS,
    RATE_NAMES,
    RATE_PLAIN_WORDS,
    RATE_WORDS,
    VALIDATION_NAMES,
    VALIDATION_WORDS,
)
from glasslm.lab.diagnosis.curve_steps import StepFinder, Steps
from glasslm.lab.tables import columns
from glasslm.lab.tables.columns import Column, find_by_words, find_columns, normalize_name
from glasslm.lab.tables.rows import Row, Table
from glasslm.text import plural

Array = NDArray[np.float64]

LOSS_ROLES = ("loss", "val_loss")
ROLES = ("step", "loss", "val_loss", "grad_norm", "lr")  # that --columns can name
SINGLE_VALUE_NAMES = {"step", "value", "wall_time", "timestamp", "time", "relative_time"}
OTHER_METRICS = {
    "lr", "rate", "accuracy", "acc", "time", "throughput", "mfu", "memory", "epoch", "speed",
    "reward", "kl", "score", "f1", "bleu", "ppl", "perplexity",
}  # fmt: skip
NONFINITE_WORD = re.compile(r"-?1\.#\w+|#(?:NUM|DIV/0)!|[+-]?nan\(.*\)", re.I)


@dataclass(frozen=True)
class Series:
    """Values by step, in ascending order of steps; values may be NaN or infinite."""

    steps: Array = field(default_factory=lambda: np.zeros(0))  # (N,)
    values: Array = field(default_factory=lambda: np.zeros(0))  # (N,)
    unit: str = "step"  # of the steps: step, epoch, token, sample or row

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        """The finite values with their steps."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep], self.unit)

    def at(self, i: int) -> str:
        """Where value i is, such as "step 2,500" or "epoch 3"."""
        return f"{self.unit} {self.steps[i]:,g}"


class CurveTable:
    """The columns of a table and the step of each of its rows."""

    def __init__(self, table: Table, mapping: dict[str, Column]) -> None:
        self.table = table
        self.columns: dict[str, Column] = {}
        self.units: dict[str, str] = {}  # of the losses, by role
        self._notes: list[str] = []
        for role, candidates in self._find_candidates().items():
            if column := mapping.get(role) or self._choose(candidates):
                self.columns[role] = column
        self._read_single_value()
        self._take_perplexities()
        for role in LOSS_ROLES:
            if role in self.columns:
                self.columns[role], self.units[role] = columns.to_loss(self.columns[role])
        self._compare_with_perplexity()
        self._mapped_step = mapping.get("step")
        self.steps = Steps([], "")
        self._used: set[int] = set()  # indices of the rows that gave a value

    def _find_candidates(self) -> dict[str, list[Column]]:
        """The columns that may have each role, by their names, else by the words in these."""
        by_words = find_by_words(self.table, LOSS_WORDS, PLAIN_WORDS | VALIDATION_WORDS)
        validation = [column for column in by_words if _has_validation_word(column.name)]
        train = [column for column in by_words if column not in validation]
        norms = find_by_words(self.table, NORM_WORDS, NORM_PLAIN_WORDS)
        rates = find_by_words(self.table, RATE_WORDS, RATE_PLAIN_WORDS)
        return {
            "loss": find_columns(self.table, LOSS_NAMES) or train,
            "val_loss": find_columns(self.table, VALIDATION_NAMES) or validation,
            "grad_norm": find_columns(self.table, GRAD_NORM_NAMES) or norms,
            "lr": find_columns(self.table, RATE_NAMES) or rates,
            "clipped": find_columns(self.table, ("clipped",)),
        }

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
        """Take the values of a file with one metric, whose file name says which it is.

        TensorBoard and other trackers export such files. Raises InputError for a metric that is
        neither a loss nor a gradient norm.
        """
        names = {normalize_name(name): name for name in self.table.names}
        if self.columns or not {"step", "value"} <= set(names) <= SINGLE_VALUE_NAMES:
            return
        words = normalize_name(self.table.path.stem).split("_")
        column = Column(names["value"])
        if NORM_WORDS.intersection(words):
            self.columns["grad_norm"] = column
        elif OTHER_METRICS.intersection(words):
            raise InputError(
                f"{self.table.path} has another metric, by its name: expected the file of a loss. "
                f"--columns loss={column.name} takes its values as losses"
            )
        else:
            role = "val_loss" if VALIDATION_WORDS.intersection(words) else "loss"
            self.columns[role] = column
            if not LOSS_WORDS.intersection(words):
                self._notes.append(
                    "neither the column nor the name of the file says what the values are: they "
                    "are taken as losses"
                )

    def _take_perplexities(self) -> None:
        """Take the logarithms of perplexities where there are no losses."""
        if "loss" in self.columns or "val_loss" in self.columns:
            return
        for column in columns.find_perplexity(self.table):
            role = "val_loss" if _has_validation_word(column.name) else "loss"
            self.columns.setdefault(role, column)

    def _compare_with_perplexity(self) -> None:
        """Take losses as bits where a perplexity beside them is 2 to their power."""
        for role in list(self.units):
            column = self.columns[role]
            if column.factor != 1 or column.perplexity or self.units[role] != columns.NATS:
                continue
            for perplexity in columns.find_perplexity(self.table):
                if self._is_power_of_two(column, perplexity):
                    self.columns[role] = Column(column.name, math.log(2))
                    self.units[role] = f"bits per token, converted to {columns.NATS}"
                    self._notes.append(
                        f"`{perplexity.name}` is 2 to the power of `{column.name}`, so the losses "
                        "are in bits"
                    )
                    break

    def _is_power_of_two(self, loss: Column, perplexity: Column) -> bool:
        """Whether log2 of the perplexity is the loss, in most rows that have both."""
        ratios = []
        for row in self.table.rows:
            x, y = self._number(loss, row), self._number(perplexity, row)
            if x is not None and y is not None and x > 0.1 and 1 < y < math.inf:
                ratios.append(math.log(y) / x)
        close = sum(abs(ratio / math.log(2) - 1) < 0.02 for ratio in ratios)
        return close > 0.8 * len(ratios) > 0

    def find_steps(self) -> None:
        """Find the step of each row."""
        finder = StepFinder(
            self.table,
            lambda row: self._value("loss", row) is not None,
            lambda row: self._value("val_loss", row) is not None,
            self._mapped_step,
        )
        self.steps = finder.find()
        self._notes += self.steps.notes

    # -- values ------------------------------------------------------------------------------------

    def series(self, role: str) -> Series:
        """One column by step, without its missing cells; of a repeated step the last one counts."""
        values: dict[float, float] = {}
        lost: list[int] = []
        replaced: list[int] = []
        latest: float | None = None
        for i, row in enumerate(self.table.rows):
            value, step = self._value(role, row), self.steps.values[i]
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
            np.array([step for step, _ in ordered], float),
            np.array([value for _, value in ordered], float),
            self.steps.unit,
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

    def _value(self, role: str, row: Row) -> float | None:
        """The number of a row in the column of a role; None where it is missing or a word."""
        column = self.columns.get(role)
        return None if column is None else self._number(column, row)

    def _number(self, column: Column, row: Row) -> float | None:
        """The number of a row in a column; None where it is missing or a word."""
        if column.name not in row.cells:
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
        return self.units[role].rpartition("converted to ")[2]

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
        units = {words[role]: unit for role, unit in self.units.items()}
        if len(set(units.values())) == 1:
            unit = "losses taken as " + next(iter(units.values()))
        else:
            unit = ", ".join(f"{name} taken as {unit}" for name, unit in units.items())
            if len({self.unit(role) for role in self.units}) > 1:
                unit += ", so that the two are not compared"
        first = (
            f"{self.table.format}: steps from {self.steps.source}, {taken}; {unit}; "
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


def _has_validation_word(name: str) -> bool:
    return bool(VALIDATION_WORDS.intersection(normalize_name(name).split("_")))
