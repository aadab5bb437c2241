"""glasslm train: from raw text to a trained model, its run folder and its report."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasslm.config import ComputeConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from glasslm.errors import InputError
from glasslm.presets import PRESETS

DESCRIPTION = """Train a language model from raw text.

Examples:
  glasslm train                                    Shakespeare, two minutes on two cores
  glasslm train --text-file book.txt notes/ --tokenizer bpe --vocab-size 2048
  glasslm train --preset small --max-time 30m --position alibi

Flags beat the preset. Ctrl-C saves; `glasslm resume RUN` goes on exactly where it stopped."""


@dataclass(frozen=True)
class TrainFlags:
    """All that can be said about a run."""

    preset: str = "tiny"
    """A named model with its recipe: tiny, small, medium, nanogpt, capstone or capstone-10m."""
    run_dir: Path | None = None
    """The run's folder, which must not hold a run yet (default: a new one under ./runs)."""
    json: bool = False
    """Print one JSON object at the end."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    from glasslm import launch

    flags = parse(argv)
    config = RunConfig(flags.model, flags.data, flags.optimizer, flags.train)
    outcome = launch.train(config, flags.compute, flags.run_dir, preset=flags.preset)
    return finish(outcome, flags.json)


def parse(argv: list[str]) -> TrainFlags:
    """The flags over the preset that they name."""
    from glasslm.cli import parsing

    name = parsing.value_of("--preset", argv, default="tiny")
    if name not in PRESETS:
        raise InputError(f"there is no preset '{name}': choose from {', '.join(PRESETS)}")
    preset = PRESETS[name]()
    parts = {part.name: getattr(preset, part.name) for part in dataclasses.fields(preset)}
    return parsing.parse(TrainFlags, argv, "glasslm train", DESCRIPTION, default=TrainFlags(preset=name, **parts))


def finish(outcome: Any, as_json: bool) -> int:
    """The report, the summary and the exit code: what train and resume have in common at the end."""
    from glasslm import display, report

    interrupted = outcome.status == "interrupted"
    page = None if interrupted else report.write(outcome.run_dir)
    code = {"diverged": 3, "interrupted": 128 + (outcome.signal or signal.SIGINT)}.get(outcome.status, 0)
    text = display.summary_text(
        outcome.run_dir, outcome.status, outcome.best, outcome.sample, page, outcome.elapsed_s
    )  # fmt: skip
    if as_json:
        print(text, file=sys.stderr)
        best = outcome.best or {}
        facts = {"run": str(outcome.run_dir), "status": outcome.status, "report": str(page) if page else None}
        facts |= {f"best_{key}": best.get(key) for key in ("step", "loss", "perplexity", "bpb")}
        print(json.dumps(facts | {"elapsed_s": round(outcome.elapsed_s, 1)}))
    else:
        print(text)
        print(f"run: {outcome.run_dir}")
    return code
