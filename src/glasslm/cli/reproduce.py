"""glasslm reproduce: train a run again from its record and compare the two, to the bit."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from glasslm.errors import require
from glasslm.runs.metrics import plain
from glasslm.text import tell

if TYPE_CHECKING:
    from glasslm.lab.verification.reproduction import Reproduction

DESCRIPTION = """Train a run again, from run.json and the same text, into a new folder, and compare: every logged number
but the clock's, and the bits of every checkpoint that both have. Exit code 0 when all is the same, 1 when not.

Examples:
  glasslm reproduce runs/shakespeare-tiny-20260314-153000
  glasslm reproduce RUN --steps 100                the first 100 steps of the same schedule"""


@dataclass(frozen=True)
class Flags:
    """Which run, how much of it, and where to."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or its name under ./runs."""
    run_dir: Path | None = None
    """The new run's folder, which must not hold one yet (default: RUN-reproduced, beside it)."""
    steps: int | None = None
    """Only the first steps, so many (default: as many as the run made)."""
    json: bool = False
    """Print one JSON object at the end."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.verification.reproduction import reproduce
    from glasslm.runs import run_folder
    from glasslm.runs.run_folder import Run

    flags = parse(Flags, argv, "glasslm reproduce", DESCRIPTION)
    require(flags.steps is None or flags.steps >= 1, "steps", flags.steps, "1 or more")
    path = run_folder.find(flags.run)
    run_dir = flags.run_dir or path.with_name(f"{path.resolve().name}-reproduced")
    came = reproduce(
        Run(path), run_dir, flags.steps, shlex.join(["glasslm", "reproduce", *argv]), tell
    )
    print(_readable(came), file=sys.stderr if flags.json else sys.stdout)
    if flags.json:
        facts = dataclasses.asdict(came) | {
            "run": str(came.run),
            "again": str(came.again),
            "same": came.same,
        }
        print(json.dumps(plain(facts)))
    if came.interrupted_by is not None:
        return 128 + came.interrupted_by
    return 0 if came.same else 1


def _readable(came: Reproduction) -> str:
    from glasslm.lab.verification.reproduction import PROMISE

    compared = (
        f"{came.lines:,} lines and {len(came.checkpoints)} checkpoints up to step {came.reached:,}"
    )
    lines = [f"compared: {compared}"]
    if came.same:
        lines.append("the same, bit for bit")
    elif came.parting:
        parting, apart = came.parting, came.parting.apart
        how_far = "" if apart is None else f", {apart:.3g} apart"
        lines.append(f"they part at step {parting.step:,} ({parting.where}){how_far}")
        if not isinstance(parting.then, str):
            lines.append(f"  then {parting.then!r}, now {parting.now!r}")
    elif came.trained:
        lines.append("every logged number is the same, but checkpoints are not")
    else:
        lines.append("no step was compared: nothing is known")
    for pair in came.checkpoints:
        if not pair.same:
            lines.append(
                f"  checkpoint {pair.step:,}: up to {pair.difference:.3g} apart ({pair.where})"
            )
    lines += [f"note: {note}" for note in came.notes]
    if came.circumstances:
        lines.append("what differs around them:")
        lines += [f"  {name}: {then} -> {now}" for name, then, now in came.circumstances]
    if not came.same and came.trained:
        lines.append(PROMISE)
    if came.interrupted_by is not None:
        lines.append(f"interrupted before step {came.steps:,}")
    return "\n".join([*lines, f"run: {came.again}"])
