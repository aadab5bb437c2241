"""glasslm merge: one model of frozen weights and adapters."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

DESCRIPTION = """Make one model of a fine-tuned run's weights and adapters, as a run of its own.

Example:
  glasslm merge names-lora-8-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run with adapters: its folder, or its name under ./runs."""
    run_dir: Path | None = None
    """Where to put the merged run (default: the run's own path with -merged at its end)."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.runs import run_folder
    from glasslm.training import fine_tuning

    flags = parse(Flags, argv, "glasslm merge", DESCRIPTION)
    run = run_folder.Run(run_folder.find(flags.run))
    whole = run.path.resolve()  # of which "." has a name, too
    path = flags.run_dir or whole.with_name(f"{whole.name}-merged")
    print(f"run: {fine_tuning.merge(run, path, shlex.join(['glasslm', 'merge', *argv]))}")
    return 0
