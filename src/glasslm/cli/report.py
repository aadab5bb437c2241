"""glasslm report RUN: make a run's report.html, report.md and figures again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from glasslm.cli.parsing import parse

DESCRIPTION = """Make a run's report again: report.html, report.md and figures. Prints the path of report.html.

Example:
  glasslm report runs/shakespeare-tiny-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run's folder, or its name under ./runs."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm report", DESCRIPTION)
    from glasslm.report import run_report
    from glasslm.runs import run_folder

    print(run_report.write(run_folder.find(flags.run)))
    return 0
