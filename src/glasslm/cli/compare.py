"""glasslm compare: runs side by side, as a table and as a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from glasslm.config.config_fields import optional_flag
from glasslm.errors import InputError
from glasslm.runs.metrics import to_json_types
from glasslm.text import (
    align_columns,
    collapse_whitespace,
    escape_control_chars,
    notify,
    print_escaped,
    wrap_lines,
)

if TYPE_CHECKING:
    from glasslm.lab.verification.run_groups import RunGroup

MAX_COLUMNS = 8  # of runs side by side in the terminal
MAX_VALUE_WIDTH = 28  # characters of a value in a table

DESCRIPTION = """Compare runs side by side: their settings, their results and their loss curves.
Runs that differ in the seed alone are one group, with a mean and an interval;
groups are compared by t tests, paired by seed where both have the same seeds.
A run that cannot be read is named and left out. Logs of other programs (CSV,
JSON, TensorBoard events, text) are compared by their losses alone.

Examples:
  glasslm compare shakespeare-quick shakespeare-alibi
  glasslm compare runs/a runs/b runs/c --out abc
  glasslm compare shakespeare-quick code-quick --cross
      also scores each run on the validation text of the other
  glasslm compare runs/a train.log    a run beside the log of another program"""


@dataclass(frozen=True)
class Flags:
    """The runs to compare, and the page."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN RUN...", help_behavior_hint="(required)"),
    ]
    """Two or more runs: their folders, their names under ./runs, or logs of other programs."""
    out: Annotated[Path | None, optional_flag("PATH", "comparisons/A-B")] = None
    """Folder of comparison.html, comparison.md and figures."""
    cross: bool = False
    """Score every run on every validation text: a matrix of bits per byte.
    At most 128 kB of each text are used."""
    columns: Annotated[tuple[str, ...], optional_flag("NAME=COLUMN...", "known names")] = ()
    """Columns of logs: step, loss, val_loss, grad_norm or lr, as in loss=total."""
    json: bool = False
    """Print one JSON object: runs (letter, path, results), differences, remarks, groups, left_out,
    page. With --cross also cross."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.verification import comparison, cross_evaluation
    from glasslm.lab.verification.run_groups import group_rows

    flags = parse(Flags, argv, "glasslm compare", DESCRIPTION)
    if any(Path(name).is_file() for name in flags.runs):
        return _compare_logs(flags)
    if flags.columns:
        raise InputError("--columns is for logs of other programs: a run has known columns")
    compared, errors = comparison.read_runs(flags.runs)
    for name, error in errors.items():
        notify(f"warning: {name} is left out: {error}")
    matrix = cross_evaluation.evaluate_runs(compared, notify) if flags.cross else None
    sections = [cross_evaluation.section(matrix, compared)] if matrix else []
    folder = flags.out or _default_folder([side.name for side in compared])
    page = comparison.write(compared, folder, sections)
    differences, remarks = comparison.differences(compared), comparison.remarks(compared)
    groups = comparison.groups_of(compared)
    out = sys.stderr if flags.json else sys.stdout
    for side in compared:
        print(f"{side.letter}  {escape_control_chars(str(side.run.path))}", file=out)
    letters = [side.letter for side in compared]
    for title, rows in (
        ("result", comparison.results(compared)),
        ("difference", differences),
    ):
        print(f"\n{_format_results(title, letters, rows)}", file=out)
    if groups:
        rows = [(row[0], list(row[1:])) for row in group_rows(groups)]
        print(f"\n{_format_table('runs', ['seeds', 'mean', '95% interval'], rows)}", file=out)
    print("\n" + _wrap_remarks(remarks), file=out)
    if matrix:
        print(
            f"\n{_format_table('bits per byte', matrix.header, matrix.rows)}\n\n"
            f"{_wrap_remarks(matrix.remarks)}",
            file=out,
        )
    print_escaped(f"page: {page}", out)
    if flags.json:
        facts = {
            "runs": [
                {"letter": s.letter, "path": str(s.run.path), "results": s.results}
                for s in compared
            ],
            "differences": dict(differences),
            "remarks": remarks,
            "groups": [_group_facts(group) for group in groups],
            "left_out": {name: str(error) for name, error in errors.items()},
            "page": str(page),
            **({"cross": matrix.facts} if matrix else {}),
        }
        print(json.dumps(to_json_types(facts)))
    return 0


def _group_facts(group: RunGroup) -> dict[str, Any]:
    """What --json prints of runs that differ in the seed alone."""
    return {
        "runs": group.name,
        "losses": group.losses,
        "mean": group.mean,
        "interval": group.interval,
    }


def _compare_logs(flags: Flags) -> int:
    """Compare logs of any program, and runs among them, by their losses."""
    from glasslm.lab.verification import log_comparison

    if flags.cross:
        raise InputError("--cross scores models on texts, which a log does not have: leave it out")
    logs, errors = log_comparison.read_logs(flags.runs, flags.columns)
    for name, error in errors.items():
        notify(f"warning: {name} is left out: {error}")
    for log in logs:
        for message in log.curve.messages:
            notify(f"{log.letter}: {message}")
    names = [log.name.replace(".", "-") for log in logs]
    page = log_comparison.write(logs, flags.out or _default_folder(names))
    remarks = log_comparison.remarks(logs)
    out = sys.stderr if flags.json else sys.stdout
    for log in logs:
        print(f"{log.letter}  {escape_control_chars(str(log.path))}", file=out)
    letters = [log.letter for log in logs]
    table = _format_results("result", letters, log_comparison.results(logs))
    print(f"\n{table}\n\n{_wrap_remarks(remarks)}", file=out)
    print_escaped(f"page: {page}", out)
    if flags.json:
        facts = {
            "runs": [
                {
                    "letter": log.letter,
                    "path": str(log.path),
                    "kind": "run" if log.is_run else "log",
                    "results": log.results,
                    "read": log.curve.messages,
                }
                for log in logs
            ],
            "remarks": remarks,
            "left_out": {name: str(error) for name, error in errors.items()},
            "page": str(page),
        }
        print(json.dumps(to_json_types(facts)))
    return 0


def _default_folder(names: Sequence[str]) -> Path:
    more = [f"and-{len(names) - 3}-more"] if len(names) > 3 else []
    return Path("comparisons", "-".join([*names[:3], *more])[:120])


def _wrap_remarks(remarks: Sequence[str]) -> str:
    return "\n".join(
        line for remark in remarks for line in wrap_lines(escape_control_chars(remark))
    )


def _format_results(
    title: str, letters: Sequence[str], rows: Sequence[tuple[str, list[str]]]
) -> str:
    """A table with a column for each run, or with a row for each of many runs."""
    if len(letters) <= MAX_COLUMNS or not rows:
        return _format_table(title, letters, rows)
    names = [name for name, _ in rows]
    columns = [values for _, values in rows]
    by_run = [(letter, list(values)) for letter, *values in zip(letters, *columns)]
    return _format_table(title, names, by_run)


def _format_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    """Aligned columns. A long value is cut at its start: paths and versions differ at the end."""
    cells = [[title, *columns]]
    cells += [[name, *map(_shorten, values)] for name, values in rows] or [
        ["none", *("" for _ in columns)]
    ]
    return "\n".join(align_columns(cells))


def _shorten(value: str) -> str:
    value = collapse_whitespace(value)
    return value if len(value) <= MAX_VALUE_WIDTH else f"...{value[3 - MAX_VALUE_WIDTH :]}"
