"""glasslm resume: continue a run from its latest checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from glasslm.cli.flag_groups import JsonFlag, RunArgument, TrackFlag
from glasslm.cli.outcome import report_outcome
from glasslm.config.schema import ComputeConfig

DESCRIPTION = """Continue an interrupted run exactly, from its latest checkpoint.

Example:
  glasslm resume runs/shakespeare-tiny-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    """The run to continue, and where it is computed."""

    run: RunArgument
    json: JsonFlag = False
    track: TrackFlag = ""
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.runs import run_folder
    from glasslm.training import launch

    flags = parse(Flags, argv, "glasslm resume", DESCRIPTION)
    return report_outcome(
        launch.resume(run_folder.find_run(flags.run), flags.compute, track=flags.track), flags.json
    )
