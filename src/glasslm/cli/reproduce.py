"""glasslm reproduce: train a run again from its record, and compare the two bit by bit."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from glasslm.cli.flag_groups import JsonFlag, RunArgument, RunOpsFlag
from glasslm.config.config_fields import optional_flag
from glasslm.errors import require
from glasslm.runs.metrics import to_json_types
from glasslm.text import notify, print_escaped

if TYPE_CHECKING:
    from glasslm.lab.verification.reproduction import Reproduction

DESCRIPTION = """Train a run again, from run.json and the same text, into a new folder, and
compare every logged number except times, and every checkpoint that both runs
have, bit by bit. The exit code is 0 if all are equal, 1 if not. Where another
BLAS kernel or processor computes now than then, losses that differ by rounding
alone (2% of their value, 0.01% at the first logged step) count as equal.

Examples:
  glasslm reproduce runs/shakespeare-quick-20260314-153000
  glasslm reproduce RUN --steps 100    the first 100 steps, same schedule"""


@dataclass(frozen=True)
class Flags:
    """The run to reproduce, the number of steps, and the new run."""

    run: RunArgument
    run_dir: Annotated[Path | None, optional_flag("PATH", "RUN-reproduced, beside RUN")] = None
    """Folder of the new run, which must not contain one yet."""
    steps: Annotated[int | None, optional_flag("INT", "all steps of the run")] = None
    """Number of steps to train, from the first one."""
    ops: RunOpsFlag = ""
    json: JsonFlag = False


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.verification.reproduction import json_facts, reproduce
    from glasslm.runs.protection import open_run

    flags = parse(Flags, argv, "glasslm reproduce", DESCRIPTION)
    require(flags.steps is None or flags.steps >= 1, "--steps", flags.steps, "1 or more")
    run = open_run(flags.run, with_log=True)
    run_dir = flags.run_dir or run.path.with_name(f"{run.path.resolve().name}-reproduced")
    reproduction = reproduce(
        run, run_dir, flags.steps, shlex.join(["glasslm", "reproduce", *argv]), notify,
        flags.ops,
    )  # fmt: skip
    print_escaped(_format_result(reproduction), sys.stderr if flags.json else sys.stdout)
    if flags.json:
        print(json.dumps(to_json_types(json_facts(reproduction))))
    if reproduction.interrupted_by is not None:
        return 128 + reproduction.interrupted_by
    return 0 if reproduction.is_identical or reproduction.is_same_within_rounding else 1


def _format_result(reproduction: Reproduction) -> str:
    """The comparison as lines of text."""
    from glasslm.lab.verification.reproduction import LOSS_TOLERANCE, REPRODUCIBILITY

    lines = [
        f"compared: {reproduction.lines:,} lines and {len(reproduction.checkpoints)} checkpoints "
        f"up to step {reproduction.last_step:,}"
    ]
    if reproduction.is_identical:
        lines.append("the same, bit for bit")
    elif reproduction.first_difference:
        first = reproduction.first_difference
        difference = "" if first.difference is None else f", by {first.difference:.3g}"
        lines.append(f"first difference at step {first.step:,} ({first.where}){difference}")
        if not isinstance(first.recorded, str):
            lines.append(f"  then {first.recorded!r}, now {first.repeated!r}")
    elif reproduction.n_trained_results:
        lines.append("every logged number is equal, but checkpoints differ")
    else:
        lines.append("no step was compared: the runs may differ")
    if not reproduction.is_identical and reproduction.rounds_differently and reproduction.losses:
        recorded, repeated = reproduction.kernels
        verdict = "the same" if reproduction.is_same_within_rounding else "not the same"
        lines.append(
            f"{verdict} within rounding: losses differ by at most {max(reproduction.losses):.2g} "
            f"of their value (tolerance {LOSS_TOLERANCE:g})"
        )
        lines.append(f"  computed then by {recorded}, now by {repeated}")
    for pair in reproduction.checkpoints:
        if not pair.is_identical:
            lines.append(
                f"  checkpoint {pair.step:,}: largest difference {pair.difference:.3g} "
                f"({pair.where})"
            )
    lines += [f"note: {note}" for note in reproduction.notes]
    if reproduction.environment:
        lines.append("differences of program, machine or settings:")
        lines += [
            f"  {name}: {recorded} -> {repeated}"
            for name, recorded, repeated in reproduction.environment
        ]
    if not reproduction.is_identical and reproduction.n_trained_results:
        lines.append(REPRODUCIBILITY)
    if reproduction.interrupted_by is not None:
        lines.append(f"interrupted before step {reproduction.steps:,}")
    return "\n".join([*lines, f"run: {reproduction.new_run}"])
