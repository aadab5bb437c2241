"""glasslm resume: continue a run from its latest checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glasslm.cli.flag_groups import JsonFlag, RunArgument, RunOpsFlag, TrackFlag
from glasslm.cli.outcome import report_outcome
from glasslm.config.schema import ComputeConfig

if TYPE_CHECKING:
    from pathlib import Path

    from glasslm.training.outcome import Outcome

DESCRIPTION = """Continue an interrupted run exactly, from its latest checkpoint. A finished run
whose report is missing gets its report.

Example:
  glasslm resume runs/shakespeare-quick-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    """The run to continue, and where it is computed."""

    run: RunArgument
    json: JsonFlag = False
    track: TrackFlag = ""
    ops: RunOpsFlag = ""
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.runs import run_folder
    from glasslm.training import launch, trackers

    flags = parse(Flags, argv, "glasslm resume", DESCRIPTION)
    trackers.parse_trackers(flags.track)
    run_dir = run_folder.find_run(flags.run)
    outcome = _outcome_without_report(run_dir) or launch.resume(
        run_dir, flags.compute, track=flags.track, ops=flags.ops
    )
    return report_outcome(outcome, flags.json)


def _outcome_without_report(run_dir: Path) -> Outcome | None:
    """The outcome of a completed run that was killed before its report; None for any other run."""
    from glasslm.runs import checkpoint, protection
    from glasslm.runs.metrics import COMPLETED_STATUSES, elapsed_s
    from glasslm.runs.run_folder import Run
    from glasslm.training.outcome import make_outcome

    run = Run(run_dir)
    status = run.history.status
    is_trained = status in COMPLETED_STATUSES and not {"imported", "merged_from"} & {*run.record}
    if status is None or not is_trained or (run_dir / "report.html").exists():
        return None
    latest = checkpoint.load(run_dir)
    if latest.step != max(run.history.eval_steps, default=0):
        return None  # its last checkpoint is made again
    checkpoint.require_identity(latest, run.identity)
    protection.require_unaltered_log(run, [latest])
    return make_outcome(run, status, None, elapsed_s(run.metrics()))
