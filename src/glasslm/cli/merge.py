"""glasslm merge: merge adapters into frozen weights, as a new run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from glasslm.cli.flag_groups import RunArgument
from glasslm.config.config_fields import optional_flag
from glasslm.text import print_result

DESCRIPTION = """Merge the adapters of a fine-tuned run into its weights, as a run of its own.

Example:
  glasslm merge names-lora-8-20260314-153000"""


@dataclass(frozen=True)
class Flags:
    """The run with adapters, and the merged run."""

    run: RunArgument
    run_dir: Annotated[Path | None, optional_flag("PATH", "RUN-merged, beside RUN")] = None
    """Folder of the merged run."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.runs.protection import open_run
    from glasslm.training.merging import merge_run

    flags = parse(Flags, argv, "glasslm merge", DESCRIPTION)
    run = open_run(flags.run, with_log=True)
    adapted_dir = run.path.resolve()  # the name of "." is empty
    path = flags.run_dir or adapted_dir.with_name(f"{adapted_dir.name}-merged")
    print_result(f"run: {merge_run(run, path, shlex.join(['glasslm', 'merge', *argv]))}")
    return 0
