"""glasslm reproduce: train a run again from its record, and compare the two bit by bit."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from glasslm.cli.flag_groups import JsonFlag, RunArgument
from glasslm.config.flag_values import optional_flag
from glasslm.errors import require
from glasslm.runs.metrics import to_json_types
from glasslm.text import notify

if TYPE_CHECKING:
    from glasslm.lab.verification.reproduction import Reproduction

DESCRIPTION = """Train a run again, from run.json and the same text, into a new folder, and
compare every logged number except times, and every checkpoint that both runs
have, bit by bit. The exit code is 0 if all are equal, 1 if not.

Examples:
  glasslm reproduce runs/shakespeare-tiny-20260314-153000
  glasslm reproduce RUN --steps 100    the first 100 steps, same schedule"""


@dataclass(frozen=True)
class Flags:
    """The run to reproduce, the number of steps, and the new run."""

    run: RunArgument
    run_dir: Annotated[Path | None, optional_flag("PATH", "RUN-reproduced, beside RUN")] = None
    """Folder of the new run, which must not contain one yet."""
    steps: Annotated[int | None, optional_flag("INT", "all steps of the run")] = None
    """Number of steps to train, from the first one."""
    json: JsonFlag = False


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.verification.reproduction import reproduce
    from glasslm.runs import run_folder
    from glasslm.runs.run_folder import Run

    flags = parse(Flags, argv, "glasslm reproduce", DESCRIPTION)
    require(flags.steps is None or flags.steps >= 1, "steps", flags.steps, "1 or more")
    path = run_folder.find_run(flags.run)
    run_dir = flags.run_dir or path.with_name(f"{path.resolve().name}-reproduced")
    reproduction = reproduce(
        Run(path), run_dir, flags.steps, shlex.join(["glasslm", "reproduce", *argv]), notify
    )
    print(_format_result(reproduction), file=sys.stderr if flags.json else sys.stdout)
    if flags.json:
        facts = dataclasses.asdict(reproduction) | {
            "run": str(reproduction.run),
            "again": str(reproduction.again),
            "same": reproduction.same,
        }
        print(json.dumps(to_json_types(facts)))
    if reproduction.interrupted_by is not None:
        return 128 + reproduction.interrupted_by
    return 0 if reproduction.same else 1


def _format_result(reproduction: Reproduction) -> str:
    """The comparison as lines of text."""
    from glasslm.lab.verification.reproduction import REPRODUCIBILITY

    lines = [
        f"compared: {reproduction.lines:,} lines and {len(reproduction.checkpoints)} checkpoints "
        f"up to step {reproduction.reached:,}"
    ]
    if reproduction.same:
        lines.append("the same, bit for bit")
    elif reproduction.parting:
        parting = reproduction.parting
        difference = "" if parting.difference is None else f", by {parting.difference:.3g}"
        lines.append(f"first difference at step {parting.step:,} ({parting.where}){difference}")
        if not isinstance(parting.then, str):
            lines.append(f"  then {parting.then!r}, now {parting.now!r}")
    elif reproduction.trained:
        lines.append("every logged number is equal, but checkpoints differ")
    else:
        lines.append("no step was compared: the runs may differ")
    for pair in reproduction.checkpoints:
        if not pair.same:
            lines.append(
                f"  checkpoint {pair.step:,}: largest difference {pair.difference:.3g} "
                f"({pair.where})"
            )
    lines += [f"note: {note}" for note in reproduction.notes]
    if reproduction.circumstances:
        lines.append("differences of program, machine or settings:")
        lines += [f"  {name}: {then} -> {now}" for name, then, now in reproduction.circumstances]
    if not reproduction.same and reproduction.trained:
        lines.append(REPRODUCIBILITY)
    if reproduction.interrupted_by is not None:
        lines.append(f"interrupted before step {reproduction.steps:,}")
    return "\n".join([*lines, f"run: {reproduction.again}"])
