"""Reads a table of finished runs: size, tokens or compute, and loss, under any usual names.

What was taken for N, D, C and the loss, in which unit, and what was left out is in the messages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from glasslm.errors import InputError
from glasslm.lab.scaling.law import Observation, fit
from glasslm.lab.scaling.plan import repetition_warning
from glasslm.lab.scaling.table_columns import (
    ROLES,
    find_candidates,
    other_columns,
    read_sizes_in_names,
)
from glasslm.lab.tables import columns
from glasslm.lab.tables.columns import Column
from glasslm.lab.tables.long_tables import require_one_split
from glasslm.lab.tables.rows import Row, Table, read_table
from glasslm.text import plural

EXPECTED = (
    "N (parameters), D (training tokens) or C (training FLOPs), and a final loss, under these "
    "or usual names such as params, train_tokens, Training FLOP, val/loss"
)
MIN_N, MIN_D, MIN_C = 1e3, 1e4, 1e9  # below them a unit must be wrong
UNIT_ROLES = {  # the lowest number that can be, and a usual unit
    "N": ("parameters", MIN_N, "1e6"),
    "D": ("tokens", MIN_D, "1e9"),
    "C": ("FLOPs", MIN_C, "1e18"),
}
C_TOLERANCE = 0.1  # of C / (6 N D) around 1
SIZE_IN_NAME = "size in the name"


@dataclass(frozen=True)
class RunTable:
    """The runs of a table, and what is to be said of it, the most important first."""

    runs: list[Observation]
    messages: list[str]
    columns: dict[str, str] = field(default_factory=dict)  # role: Column.notation, for fit.json
    loss_unit: str = "nats per token"


def read_runs(path: Path, mapping: Sequence[str] = ()) -> RunTable:
    """The runs of a table of any program, without those that have no finite loss.

    `mapping` names columns, as in "N=size*1e6". Without D, D is C / 6 N. Raises InputError for a
    table without the columns, a cell that is a word, and units that cannot be.
    """
    table = read_table(path)
    named = columns.parse_mapping(mapping, ROLES, table)
    candidates = find_candidates(table)
    chosen = {role: options[0] for role, options in candidates.items() if options} | named
    notes = []
    if "N" not in chosen:
        name, sizes = read_sizes_in_names(table)
        if name:
            table = _with_sizes(table, sizes)
            chosen["N"] = Column(SIZE_IN_NAME)
            notes.append(
                f"N is the size in the names of `{name}`: it is rounded, and which parameters it "
                "counts is unknown"
            )
    if "D" in chosen:
        chosen.pop("ratio", None)
    if "N" not in chosen or "loss" not in chosen or not {"D", "C", "ratio"} & chosen.keys():
        raise columns.unreadable(path, table, EXPECTED)
    require_one_split(table)
    table, failed = _leave_out_failed(table, chosen["loss"])
    notes += failed
    if any("±" in str(row.cells.get(chosen["loss"].name)) for row in table.rows):
        notes.append(f"the errors after ± in {chosen['loss']} are not used")
    others = other_columns(candidates["loss"], chosen["loss"]) if "loss" not in named else []
    chosen["loss"], unit = columns.to_loss(chosen["loss"])
    _require_possible_units(table, chosen)
    runs, messages = _read_rows(table, chosen)
    if not runs:
        reason = next(iter([*messages, *notes]), "it has no rows")
        raise InputError(f"{path} ({table.format}) has no run that can be used: {reason}")
    messages = [
        f"{_describe_columns(table, chosen, unit)}; {plural(len(runs), 'run')}",
        *notes,
        *_explain_other_sizes(table, chosen, other_columns(candidates["N"], chosen["N"]), runs),
        *_name_other_losses(others),
        *messages,
        *_check_compute(runs),
        *_check_repetition(table, chosen, runs),
    ]
    taken = {role: column.notation for role, column in chosen.items()}
    return RunTable(runs, messages, taken, unit.rpartition("converted to ")[2])


def _leave_out_failed(table: Table, loss: Column) -> tuple[Table, list[str]]:
    """The table without runs whose loss or status is a word such as "diverged", and messages."""
    failures = [columns.find_failure(row, loss) for row in table.rows]
    messages = [
        f"line {row.line}: the {failure[0]} is '{failure[1]}', so the run is left out"
        for row, failure in zip(table.rows, failures)
        if failure
    ]
    rows = [row for row, failure in zip(table.rows, failures) if not failure]
    return table._replace(rows=rows), messages


def _with_sizes(table: Table, sizes: dict[int, str]) -> Table:
    """The table with a column of the sizes that are in the names of its models."""
    rows = [Row(row.line, {**row.cells, SIZE_IN_NAME: sizes[row.line]}) for row in table.rows]
    return table._replace(rows=rows)


def _describe_columns(table: Table, chosen: dict[str, Column], unit: str) -> str:
    """What was taken for N, D, C and the loss, in which unit."""
    taken = ", ".join(f"{role} from {chosen[role]}" for role in ROLES if role in chosen)
    text = f"{table.format}: {taken}; losses taken as {unit}"
    if "ratio" in chosen:
        text += "; D = N times the ratio"
    elif "D" not in chosen:
        text += "; D = C / (6 N)"
    if table.dropped:
        text += f"; {plural(len(table.dropped), 'other line')} left out"
    return text


def _name_other_losses(others: Sequence[Column]) -> list[str]:
    """A message where other columns could be the loss."""
    if not others:
        return []
    listed = ", ".join(f"`{column.name}`" for column in others[:5])
    return [f"the loss could also be {listed} (--columns 'loss={others[0].name}')"]


def _read_rows(table: Table, chosen: dict[str, Column]) -> tuple[list[Observation], list[str]]:
    """The runs, and a message for each row or kind of row that is left out."""
    runs, messages = [], []
    copies: list[int] = []
    first_lines: dict[tuple[str, ...], int] = {}
    for row in table.rows:
        cells = tuple(str(cell) for cell in row.cells.values())
        if first_lines.setdefault(cells, row.line) != row.line:
            copies.append(row.line)
            continue
        values = {role: column.number(row, table) for role, column in chosen.items()}
        reason = _find_reason_to_leave_out(values)
        if reason:
            messages.append(f"line {row.line}: {reason}, so the run is left out")
            continue
        runs.append(_make_run(values, row, table.path))
    if copies:
        messages.append(
            f"{plural(len(copies), 'line')} equal to an earlier one left out, the first is line "
            f"{copies[0]}"
        )
    return runs, messages


def _find_reason_to_leave_out(values: dict[str, float | None]) -> str:
    loss = values["loss"]
    if loss is None:
        return "the loss is missing"
    if not math.isfinite(loss):
        return "the loss is not finite"
    if values["N"] is None:
        return "N is missing"
    if all(values.get(role) is None for role in ("D", "C", "ratio")):
        return next(f"{role} is missing" for role in ("D", "ratio", "C") if role in values)
    return ""


def _make_run(values: dict[str, float | None], row: Row, path: Path) -> Observation:
    N, D, C, loss = (values.get(role) for role in ("N", "D", "C", "loss"))
    assert N is not None
    assert loss is not None
    if D is None and (ratio := values.get("ratio")) is not None:
        D = ratio * N
    if D is None:
        assert C is not None
        D = C / (6 * N) if N else math.nan
    seed = values.get("seed")
    if seed is None or not math.isfinite(seed):
        seed = 0
    try:
        return Observation(N, D, loss, C, int(seed))
    except InputError as error:
        raise InputError(f"line {row.line} of {path}: {error}") from None


# -- what cannot be, and what should be known ------------------------------------------------------


def _numbers(table: Table, column: Column) -> np.ndarray:
    """The finite numbers of a column, (n,)."""
    numbers = [column.number(row, table) for row in table.rows]
    return np.array([x for x in numbers if x is not None and math.isfinite(x)])


def _require_possible_units(table: Table, chosen: dict[str, Column]) -> None:
    for role, (unit, lowest, factor) in UNIT_ROLES.items():
        if role not in chosen:
            continue
        numbers = _numbers(table, chosen[role])
        positive = numbers[numbers > 0]
        if len(positive) and positive.max() < lowest:
            raise InputError(
                f"{role} from {chosen[role]} of {table.path} is {positive.max():g} at most, which "
                f"cannot be {unit}: say the unit, as in --columns "
                f"'{role}={chosen[role].name}*{factor}'"
            )
    losses = _numbers(table, chosen["loss"])
    if len(losses) and np.median(losses) > columns.MAX_LOSS:
        raise InputError(
            f"the losses from {chosen['loss']} of {table.path} are {np.median(losses):.4g} in the "
            "median, which cannot be nats per token: give the logarithm of perplexities, or name "
            "another column with --columns loss=COLUMN"
        )


def _explain_other_sizes(
    table: Table, chosen: dict[str, Column], others: Sequence[Column], runs: Sequence[Observation]
) -> list[str]:
    """A message for each other column that could be N: how far the exponent a changes with it."""
    messages = []
    for other in others[:3]:
        said = f"N could also be {other}"
        try:
            moved, _ = _read_rows(table, chosen | {"N": other})
            a, b = fit(runs).a, fit(moved).a
        except InputError:
            messages.append(f"{said}: --columns 'N={other.name}' takes it")
            continue
        messages.append(
            f"{said}: the exponent a of N_opt would be {b:.3f} instead of {a:.3f} "
            f"(--columns 'N={other.name}')"
        )
    return messages


def _check_compute(runs: Sequence[Observation]) -> list[str]:
    """A message where the table's C is not 6 N D."""
    ratios = [run.flops / (6 * run.N * run.D) for run in runs if run.flops is not None]
    if not ratios or max(abs(ratio - 1) for ratio in ratios) <= C_TOLERANCE:
        return []
    return [
        f"C is {min(ratios):.3g} to {max(ratios):.3g} times 6 N D (median "
        f"{float(np.median(ratios)):.3g}): it counts something else, such as attention or "
        "embeddings. Compute is taken from the table; N_opt(C) of the fitted law takes C = 6 N D"
    ]


def _check_repetition(
    table: Table, chosen: dict[str, Column], runs: Sequence[Observation]
) -> list[str]:
    if "unique" not in chosen or not runs:
        return []
    unique = _numbers(table, chosen["unique"])
    warning = repetition_warning(runs, float(unique.min())) if len(unique) else ""
    return [warning] if warning else []
