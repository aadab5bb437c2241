"""glasslm learn train: a small model trained with the operations of a file, beside the engine's."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.cli import parsing
from glasslm.cli.flag_groups import compute_config
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import DeviceConfig
from glasslm.course.learn import progress
from glasslm.course.learn.exercises import COURSE
from glasslm.text import notify, print_escaped

DESCRIPTION = """Train the tiny model twice, with the same seed and batches: with the engine's own
operations, and with those of your file. Prints both curves and how far they part.
The operations of a model can be trained (linear, softmax, rms_norm, attention, adamw,
...); exercises such as train_bpe or multi_head are none.

The exit code is that of glasslm train: 0, 2 for a file that cannot be used, 3 if
your operation makes training diverge, 130 after Ctrl-C.

Examples:
  glasslm learn train rms_norm.py
  glasslm learn train rms_norm.py --budget 3m --text-file book.txt --picture curves.png"""


@dataclass(frozen=True)
class Flags:
    """The file, the time and the text."""

    file: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE", help="Your Python file.")
    ]
    budget: Annotated[str, tyro.conf.arg(metavar="TIME")] = "60s"
    """Time for both runs together, such as 60s or 3m."""
    text_file: Annotated[tuple[str, ...], optional_flag("PATH...", "the default corpus")] = ()
    """Text to learn: files, folders or patterns."""
    picture: Annotated[Path | None, optional_flag("FILE.png", "none")] = None
    """Draw both curves into a PNG file."""
    out: Annotated[Path | None, optional_flag("PATH", "a new one under ./runs")] = None
    """Folder of the two runs, which must not contain them yet."""
    compute: DeviceConfig = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    flags = parsing.parse(Flags, argv, "glasslm learn train", DESCRIPTION)
    parsing.require_png("--picture", flags.picture)
    from glasslm.course.learn.training import train_with_file

    comparison = train_with_file(
        flags.file,
        flags.budget,
        text_file=flags.text_file,
        out=flags.out,
        compute=compute_config(flags.compute),
        command=shlex.join(["glasslm", "learn", "train", *argv]),
    )
    if comparison.exit_code > 128:  # an interruption: the runs say how to continue them
        return comparison.exit_code
    print_escaped(f"\n{comparison}")
    if flags.picture is not None:
        comparison.draw(flags.picture)
        notify(f"picture: {flags.picture}")
    learner = progress.load_progress(notify)
    for name in set(comparison.operations.functions) & set(COURSE):
        learner = learner.with_changes(name, trained=True)
    progress.save_progress(learner, notify)
    return comparison.exit_code
