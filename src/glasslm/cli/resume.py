"""glasslm resume: go on with a run exactly where its latest checkpoint stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from glasslm.config.schema import ComputeConfig

DESCRIPTION = """Go on with an interrupted run, exactly where it stopped.

Example:
  glasslm resume runs/shakespeare-tiny-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or its name under ./runs."""
    json: bool = False
    """Print one JSON object at the end."""
    track: Annotated[str, tyro.conf.arg(metavar="wandb|tensorboard")] = ""
    """Show the run there while it goes on, too: in one of them, or in both with a comma between."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.cli.train import finish
    from glasslm.runs import run_folder
    from glasslm.training import launch

    flags = parse(Flags, argv, "glasslm resume", DESCRIPTION)
    return finish(
        launch.resume(run_folder.find(flags.run), flags.compute, track=flags.track), flags.json
    )
