"""glasslm compare: runs side by side, as a table and as a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.config.config_fields import optional_flag
from glasslm.runs.metrics import to_json_types
from glasslm.text import (
    align_columns,
    collapse_whitespace,
    escape_control_chars,
    notify,
    print_escaped,
    wrap_lines,
)

MAX_COLUMNS = 8  # of runs side by side in the terminal
MAX_VALUE_WIDTH = 28  # characters of a value in a table

DESCRIPTION = """Compare runs side by side: their settings, their results and their loss curves.
Runs that differ in the seed alone are one group, with a mean and an interval;
groups are compared by t tests, paired by seed where both have the same seeds.
A run that cannot be read is named and left out.

Examples:
  glasslm compare shakespeare-tiny shakespeare-alibi
  glasslm compare runs/a runs/b runs/c --out abc
  glasslm compare shakespeare-tiny code-tiny --cross
      also scores each run on the validation text of the other"""


@dataclass(frozen=True)
class Flags:
    """The runs to compare, and the page."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN RUN...", help_behavior_hint="(required)"),
    ]
    """Two or more runs: their folders, or their names under ./runs."""
    out: Annotated[Path | None, optional_flag("PATH", "comparisons/A-B")] = None
    """Folder of comparison.html, comparison.md and figures."""
    cross: bool = False
    """Score every run on every validation text: a matrix of bits per byte.
    At most 128 kB of each text are used."""
    json: bool = False
    """Print one JSON object: runs (letter, path, results), differences, remarks, groups, left_out,
    page. With --cross also cross."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.verification import comparison, cross_evaluation
    from glasslm.lab.verification.run_groups import group_rows

    flags = parse(Flags, argv, "glasslm compare", DESCRIPTION)
    compared, errors = comparison.read_runs(flags.runs)
    for name, error in errors.items():
        notify(f"warning: {name} is left out: {error}")
    names = [side.name for side in compared]
    n_more = [f"and-{len(names) - 3}-more"] if len(names) > 3 else []
    matrix = cross_evaluation.evaluate_runs(compared, notify) if flags.cross else None
    sections = [cross_evaluation.section(matrix, compared)] if matrix else []
    folder = flags.out or Path("comparisons", "-".join([*names[:3], *n_more])[:120])
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
            "groups": [
                {
                    "runs": group.name,
                    "losses": group.losses,
                    "mean": group.mean,
                    "interval": group.interval,
                }
                for group in groups
            ],
            "left_out": {name: str(error) for name, error in errors.items()},
            "page": str(page),
            **({"cross": matrix.facts} if matrix else {}),
        }
        print(json.dumps(to_json_types(facts)))
    return 0


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
