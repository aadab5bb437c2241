"""glasslm report: write a run's report.html, report.md and figures again."""

from __future__ import annotations

from dataclasses import dataclass

from glasslm.cli.flag_groups import RunArgument
from glasslm.cli.parsing import parse
from glasslm.text import print_result

DESCRIPTION = """Write the report of a run again: report.html, report.md and figures.
Prints the path of report.html.

Example:
  glasslm report runs/shakespeare-tiny-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    """The run to report."""

    run: RunArgument


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm report", DESCRIPTION)
    from glasslm.report import run_report
    from glasslm.runs import run_folder

    print_result(str(run_report.write(run_folder.find_run(flags.run))))
    return 0
