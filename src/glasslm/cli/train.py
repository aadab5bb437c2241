"""glasslm train: from raw text to a trained model, its run folder and its report.

Most flags are fields of the dataclasses in config/: a field there is a flag here.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.cli.flag_groups import JsonFlag, RecipeFlags, TrackFlag
from glasslm.cli.outcome import report_outcome
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import ComputeConfig
from glasslm.errors import InputError

DESCRIPTION = """Train a language model on raw text.

Examples:
  glasslm train                 Shakespeare, a few minutes on two cores
  glasslm train --max-time 10m  the time chooses the model
  glasslm train --text-file book.txt notes/ --tokenizer bpe --vocab-size 2048
  glasslm train --preset small --max-time 30m --position alibi

Flags override the preset. Ctrl-C saves a checkpoint; `glasslm resume RUN`
continues the run exactly."""


@dataclass(frozen=True, kw_only=True)
class Flags(RecipeFlags):
    """The settings of a run."""

    preset: Annotated[str, tyro.conf.arg(metavar="NAME")] = "quick"
    """Named model and recipe: quick, tiny, small, medium, nanogpt, capstone or capstone-10m.
    Without --preset, --init-from and a flag such as --d-model or --seq-len, --max-time of 10m or
    more chooses quick with a larger model."""
    run_dir: Annotated[Path | None, optional_flag("PATH", "a new one under ./runs")] = None
    """Folder of the run, which must not contain a run yet."""
    json: JsonFlag = False
    track: TrackFlag = ""
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    from glasslm.cli import parsing
    from glasslm.text import notify
    from glasslm.training import launch

    flags = parse(argv)
    if chosen := parsing.choose_recipe(argv).describe():
        notify(chosen)
    command = shlex.join(["glasslm", "train", *argv])
    outcome = launch.train(
        flags.config,
        flags.compute,
        flags.run_dir,
        preset=flags.preset,
        command=command,
        track=flags.track,
    )
    return report_outcome(outcome, flags.json)


def parse(argv: list[str]) -> Flags:
    """The flags, over the preset or over the recipe of --init-from."""
    from glasslm.cli import parsing

    base = parsing.flag_value("--init-from", argv, default="")
    if not base:
        recipe = parsing.choose_recipe(argv)
        return parsing.parse_over_recipe(Flags, argv, "glasslm train", DESCRIPTION, recipe)
    if parsing.flag_value("--preset", argv, default=""):
        raise InputError("both --preset and --init-from describe a model: give one of them")
    config = parsing.fine_tuning_recipe(base, argv)
    default = Flags(
        preset="finetuned",
        model=config.model,
        data=config.data,
        optimizer=config.optimizer,
        train=config.train,
    )
    return parsing.parse(Flags, argv, "glasslm train", DESCRIPTION, default=default)
