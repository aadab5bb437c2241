"""glasslm finetune: go on from a trained model with other text, by adapters or with all weights."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.config.schema import (
    ComputeConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.errors import InputError

DESCRIPTION = """Go on from a trained model with other text: train adapters beside its frozen weights (LoRA), or all.

Examples:
  glasslm finetune shakespeare-tiny --text-file names.txt
  glasslm finetune shakespeare-tiny --text-file names.txt --lora-rank 4 --lora-targets q,k,v,o
  glasslm finetune shakespeare-tiny --text-file names.txt --full
  glasslm finetune shakespeare-tiny --text-file names.txt --study rank

It is `glasslm train` with other defaults, so that all its flags work here. What is forgotten of the old text is
measured along with what is learnt of the new one. `glasslm merge` makes one model of weights and adapters."""


@dataclass(frozen=True)
class Flags:
    """All that can be said about a fine-tuned run."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The trained model: its run's folder, or its name under ./runs."""
    full: bool = False
    """Train all weights instead of adapters."""
    study: Annotated[str | None, tyro.conf.arg(metavar="rank|targets")] = None
    """Train several models instead of one, to see what the rank (2 to 64), or the choice of matrices, is worth."""
    run_dir: Path | None = None
    """The new run's (or study's) folder, which must not hold one yet (default: a new one under ./runs)."""
    json: bool = False
    """Print one JSON object at the end."""
    track: Annotated[str, tyro.conf.arg(metavar="wandb|tensorboard")] = ""
    """Show the run there while it goes on, too: in one of them, or in both with a comma between."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    from glasslm.cli.train import finish
    from glasslm.training import launch

    flags = parse(argv)
    if not flags.data.chosen:
        raise InputError("there is no text to learn: give --text-file PATH, or --corpus NAME")
    config = RunConfig(flags.model, flags.data, flags.optimizer, flags.train)
    command = shlex.join(["glasslm", "finetune", *argv])
    if flags.study and flags.track:
        raise InputError("--track shows one run, and --study trains several: leave one of them out")
    if flags.study:
        from glasslm.lab.studies.adapter_study import study

        print(study(flags.study, config, flags.compute, flags.run_dir, command))
        return 0
    name = "full" if flags.full else f"lora-{config.model.lora_rank}"
    outcome = launch.train(
        config, flags.compute, flags.run_dir, preset=name, command=command, track=flags.track
    )
    return finish(outcome, flags.json)


def parse(argv: list[str]) -> Flags:
    """The flags over the recipe that the trained model gives."""
    from glasslm.cli import parsing
    from glasslm.training.fine_tuning import RANK, Base, recipe

    default = None
    if argv and not argv[0].startswith("-"):
        config = recipe(Base(argv[0]), rank=0 if "--full" in argv else RANK)
        default = Flags(
            argv[0],
            model=config.model,
            data=config.data,
            optimizer=config.optimizer,
            train=config.train,
        )
    flags = parsing.parse(Flags, argv, "glasslm finetune", DESCRIPTION, default=default)
    if default is None:
        raise InputError("RUN comes first: glasslm finetune RUN --text-file PATH")
    if flags.full and flags.model.lora_rank:
        raise InputError("both --full and --lora-rank were given: train all weights, or adapters")
    if not (flags.full or flags.model.lora_rank):
        raise InputError(
            "lora_rank is 0, which leaves nothing to train: expected 1 or more, or --full for all weights"
        )
    if flags.train.init_from != default.train.init_from:
        raise InputError("RUN says what to start from: leave out --init-from")
    return flags
