"""glasslm report: write a run's or a study's report.html, report.md and figures again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.cli.flag_groups import RunOpsFlag
from glasslm.cli.parsing import parse
from glasslm.errors import InputError
from glasslm.text import print_result

DESCRIPTION = """Write the report of a run, or of a study (ablate, scale), again: report.html,
report.md and figures. Nothing is trained. Prints the path of the page.

Example:
  glasslm report runs/shakespeare-quick-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    """The run or study to report."""

    run: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="RUN|STUDY",
            help="Folder of a run or of a study, or the name of a run under ./runs.",
        ),
    ]
    ops: RunOpsFlag = ""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm report", DESCRIPTION)
    from glasslm.lab.studies.stored_study import is_study, open_study
    from glasslm.report import run_report
    from glasslm.runs import recorded_operations
    from glasslm.runs.protection import open_run

    if is_study(Path(flags.run)):
        if flags.ops:
            raise InputError("--ops is for the report of a run: leave it out with a study")
        print_result(str(open_study(flags.run).write()))
        return 0
    run = open_run(flags.run, with_log=True)
    if flags.ops:
        recorded_operations.admit_run_operations(run, flags.ops)
    print_result(str(run_report.write(run.path)))
    return 0
