"""glasslm compare: runs side by side, as a table and as a page."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.errors import InputError
from glasslm.runs.metrics import plain
from glasslm.text import harmless, tell

WIDEST = 28  # columns of a value

DESCRIPTION = """Runs side by side: what differs in what they were told, what came of it, and their loss curves.

Examples:
  glasslm compare shakespeare-tiny shakespeare-alibi
  glasslm compare runs/a runs/b runs/c --out abc
  glasslm compare shakespeare-tiny code-tiny --cross     each run on each other's validation text"""


@dataclass(frozen=True)
class Flags:
    """Which runs, and where the page goes."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN RUN...")]
    """Two or more runs: their folders, or their names under ./runs."""
    out: Path | None = None
    """Folder of comparison.html, comparison.md and figures (default: comparisons/A-B)."""
    cross: bool = False
    """Also score every run on every validation text (at most 128 kB of each): bits per byte as a matrix."""
    json: bool = False
    """Print one JSON object: runs (letter, path, results), differences, remarks, page, and with --cross cross."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.verification import comparison, cross_evaluation
    from glasslm.runs import run_folder
    from glasslm.runs.run_folder import Run

    flags = parse(Flags, argv, "glasslm compare", DESCRIPTION)
    if len(flags.runs) < 2:
        raise InputError(
            f"{len(flags.runs)} run was given: expected two or more, as in `glasslm compare RUN RUN`"
        )
    compared = comparison.sides([Run(run_folder.find(name)) for name in flags.runs])
    names = [side.name for side in compared]
    more = [f"and-{len(names) - 3}-more"] if len(names) > 3 else []
    matrix = cross_evaluation.measure(compared, tell) if flags.cross else None
    sections = [cross_evaluation.section(matrix, compared)] if matrix else []
    page = comparison.write(
        compared, flags.out or Path("comparisons", "-".join([*names[:3], *more])[:120]), sections
    )
    differences, remarks = comparison.differences(compared), comparison.remarks(compared)
    out = sys.stderr if flags.json else sys.stdout
    for side in compared:
        print(f"{side.letter}  {harmless(str(side.run.path))}", file=out)
    letters = [side.letter for side in compared]
    for title, rows in (
        ("what came of it", comparison.results(compared)),
        ("what differs", differences),
    ):
        print(f"\n{_table(title, letters, rows)}", file=out)
    print("\n" + _filled(remarks), file=out)
    if matrix:
        print(
            f"\n{_table('bits per byte', matrix.header, matrix.rows)}\n\n{_filled(matrix.remarks)}",
            file=out,
        )
    print(f"page: {page}", file=out)
    if flags.json:
        facts = {
            "runs": [
                {"letter": s.letter, "path": str(s.run.path), "results": s.results}
                for s in compared
            ],
            "differences": dict(differences),
            "remarks": remarks,
            "page": str(page),
            **({"cross": matrix.facts} if matrix else {}),
        }
        print(json.dumps(plain(facts)))
    return 0


def _filled(remarks: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(harmless(remark), 100) for remark in remarks)


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    """Aligned columns; of a long value the end, which is where paths and numbers of versions differ."""
    cells = [[title, *columns]]
    cells += [[name, *map(_cut, values)] for name, values in rows] or [
        ["nothing", *("" for _ in columns)]
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells
    )


def _cut(value: str) -> str:
    value = " ".join(harmless(value).split())
    return value if len(value) <= WIDEST else f"...{value[3 - WIDEST :]}"
