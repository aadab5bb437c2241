"""glasslm train: from raw text to a trained model, its run folder and its report."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from glasslm.runs.metrics import plain
from glasslm.text import tell

if TYPE_CHECKING:
    from glasslm.training.launch import Outcome

DESCRIPTION = """Train a language model from raw text.

Examples:
  glasslm train                                    Shakespeare, two minutes on two cores
  glasslm train --text-file book.txt notes/ --tokenizer bpe --vocab-size 2048
  glasslm train --preset small --max-time 30m --position alibi

Flags beat the preset. Ctrl-C saves; `glasslm resume RUN` goes on exactly where it stopped."""


@dataclass(frozen=True)
class Flags:
    """All that can be said about a run."""

    preset: str = "tiny"
    """A named model with its recipe: tiny, small, medium, nanogpt, capstone or capstone-10m."""
    run_dir: Path | None = None
    """The run's folder, which must not hold a run yet (default: a new one under ./runs)."""
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
    from glasslm.training import launch

    flags = parse(argv)
    config = RunConfig(flags.model, flags.data, flags.optimizer, flags.train)
    command = shlex.join(["glasslm", "train", *argv])
    outcome = launch.train(
        config,
        flags.compute,
        flags.run_dir,
        preset=flags.preset,
        command=command,
        track=flags.track,
    )
    return finish(outcome, flags.json)


def parse(argv: list[str]) -> Flags:
    """The flags over the preset that they name."""
    from glasslm.cli import parsing

    if base := parsing.value_of("--init-from", argv, default=""):
        if parsing.value_of("--preset", argv, default=""):
            raise InputError(
                "--preset describes a model, and --init-from brings one: give one of them"
            )
        config = parsing.recipe_of(base, argv)
        default = Flags(
            "finetuned", None, False, "", config.model, config.data, config.optimizer, config.train
        )
        return parsing.parse(Flags, argv, "glasslm train", DESCRIPTION, default=default)
    return parsing.over_preset(Flags, argv, "glasslm train", DESCRIPTION)


def finish(outcome: Outcome, as_json: bool) -> int:
    """The summary and the exit code: what train and resume have in common at the end."""
    from glasslm.report import run_report
    from glasslm.training import display

    path = run_report.write_after_training(outcome, tell)
    text = display.summary_text(
        outcome.run_dir, outcome.status, outcome.best, outcome.sample, path, outcome.elapsed_s
    )
    if as_json:
        tell(text)
        best = outcome.best or {}
        report = str(path) if path else None
        facts = {"run": str(outcome.run_dir), "status": outcome.status, "report": report}
        facts |= {f"best_{key}": best.get(key) for key in ("step", "loss", "perplexity", "bpb")}
        text = json.dumps(plain(facts | {"elapsed_s": round(outcome.elapsed_s, 1)}))
    else:
        text = f"{text}\nrun: {outcome.run_dir}"
    with suppress(BrokenPipeError):  # nobody reads it: the run is what it is all the same
        print(text, flush=True)
    return outcome.exit_code
