"""Reads the log of any training program into a curve.

lab/tables reads the file into rows; here its columns are recognized by their names. A missing value
is left out. NaN and infinity stay in the curve, because they may be the sign of a fault. What was
taken for what, and what was left out, is in the curve's messages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glasslm.errors import DamagedError, InputError
from glasslm.lab.diagnosis.curve_table import ROLES, CurveTable, Series
from glasslm.lab.tables import columns
from glasslm.lab.tables.long_tables import separate_splits, widen
from glasslm.lab.tables.rows import Row, Table, read_table
from glasslm.report.report_tables import objective_unit
from glasslm.runs.protection import open_run
from glasslm.runs.run_folder import Run

EXPECTED = (
    "a loss: a column such as loss, train_loss, train/loss, lm loss or val_loss, and one of steps"
)


@dataclass(frozen=True)
class Curve:
    """The columns of a log, each with its own steps. A missing column is empty."""

    name: str
    train: Series  # the validation losses where the log has no training losses
    validation: Series = field(default_factory=Series)
    grad_norm: Series = field(default_factory=Series)
    clipped: Series = field(default_factory=Series)  # 1 where the gradient was clipped
    rate: Series = field(default_factory=Series)
    train_unit: str = "nats per token"
    validation_unit: str = "nats per token"
    train_is_validation: bool = False  # whether `train` holds the validation losses
    vocab_size: int | None = None
    step_unit: str = "step"  # of all series: step, epoch, token, sample or row
    rows_read: int = 0
    rows_dropped: int = 0  # lines and rows that gave no value
    messages: tuple[str, ...] = ()  # the first: which column was taken for what

    @property
    def training_losses(self) -> Series:
        """The training losses; empty where the log has none."""
        return Series(unit=self.train.unit) if self.train_is_validation else self.train

    @property
    def validation_losses(self) -> Series:
        """The validation losses, also of a log that has no other losses."""
        return self.train if self.train_is_validation else self.validation


def read_curve(path: Path, mapping: Sequence[str] = ()) -> Curve:
    """The curve in a log: a file of any program, or the metrics.jsonl of a run folder.

    A run.json beside a metrics.jsonl tells the unit of its losses, which depends on the objective.
    `mapping` names columns, as in "loss=total". Raises InputError when the file cannot be read,
    and, with the names of its columns, when none of them is a loss; DamagedError for an
    altered run.
    """
    if path.is_dir():
        if (path / "run.json").is_file():
            open_run(path, with_log=True)
        path /= "metrics.jsonl"
    table = _without_other_kinds(separate_splits(widen(read_table(path))))
    reader = CurveTable(table, columns.parse_mapping(mapping, ROLES, table))
    if "loss" not in reader.columns and "val_loss" not in reader.columns:
        raise columns.unreadable(path, table, EXPECTED)
    reader.find_steps()
    vocab_size, run_unit = _read_objective(path)
    reader.units = {
        role: run_unit if unit == columns.NATS else unit for role, unit in reader.units.items()
    }
    validation = reader.series("val_loss")
    has_loss = "loss" in reader.columns
    curve = Curve(
        name=path.name,
        train=reader.series("loss") if has_loss else validation,
        validation=validation if has_loss else Series(),
        grad_norm=reader.series("grad_norm"),
        clipped=reader.series("clipped"),
        rate=reader.series("lr"),
        train_unit=reader.unit("loss" if has_loss else "val_loss"),
        validation_unit=reader.unit("val_loss" if "val_loss" in reader.columns else "loss"),
        train_is_validation=not has_loss,
        vocab_size=vocab_size,
        step_unit=reader.steps.unit,
    )
    if not len(curve.train) and not len(curve.validation):
        chosen = " and ".join(str(reader.columns[role]) for role in reader.units)
        raise InputError(f"{path} ({table.format}) has no number in {chosen}: expected {EXPECTED}")
    return dataclasses.replace(
        curve,
        rows_read=reader.rows_read,
        rows_dropped=reader.rows_dropped,
        messages=tuple(reader.messages()),
    )


def _without_other_kinds(table: Table) -> Table:
    """The rows of steps and evaluations of a metrics.jsonl of glasslm; other tables as they are.

    In an eval line the split becomes a part of the loss's name, and null, which glasslm writes for
    a number that is not finite, becomes NaN.
    """
    if not any(row.cells.get("kind") == "plan" for row in table.rows):
        return table
    rows, dropped = [], list(table.dropped)
    for row in table.rows:
        cells = {name: math.nan if cell is None else cell for name, cell in row.cells.items()}
        if cells.get("kind") == "eval":
            split = "val" if cells.get("split", "val") == "val" else f"other_{cells['split']}"
            cells = {"step": cells.get("step"), f"{split}_loss": cells.get("loss")}
        elif cells.get("kind") != "step":
            dropped.append(row.line)
            continue
        rows.append(Row(row.line, cells))
    return table._replace(rows=rows, dropped=dropped)


def _read_objective(path: Path) -> tuple[int | None, str]:
    """The vocabulary size and the unit of the losses, by the run.json beside a metrics.jsonl.

    The vocabulary size is None without such a file, and where the losses are those of preferences:
    these are not compared with the loss of a uniform guess.
    """
    if path.name != "metrics.jsonl" or not path.with_name("run.json").is_file():
        return None, columns.NATS
    run = Run(path.parent)
    try:
        config, vocab_size = run.config, int(run.record["tokenizer"]["vocab_size"])
    except (DamagedError, OSError, ValueError, KeyError, TypeError):
        return None, columns.NATS
    return None if config.preference.is_active else vocab_size, objective_unit(config)
