"""glasslm capstone: all that a course wants handed in, in one folder, within a budget of time."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.config.schema import (
    ComputeConfig,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.config.units import seconds
from glasslm.errors import InputError, require
from glasslm.text import quoted, tell

DESCRIPTION = """A whole capstone in one command and one folder, for any text, within a budget of time.

A model is trained, choices are compared over three seeds, a scaling law is fitted and its prediction checked, and the
checkpoint questions of a course are answered with the numbers of this very run. index.html is what to hand in. --quiz
asks the questions first, and sets your answers beside those. The same command with --out goes on with one that was
interrupted.

Examples:
  glasslm capstone --budget 30m
  glasslm capstone --budget 3h --corpus arxiv --quiz
  glasslm capstone --budget overnight --text-file book.txt --preset medium"""

OVERNIGHT = "8h"
PRESETS = (
    (3600.0, "tiny"),
    (4 * 3600.0, "small"),
)  # below these budgets; above, the one that a night is enough for
LARGE = "medium"
LEAST_S = 300.0  # below it neither study would say anything


@dataclass(frozen=True)
class Flags:
    """How long, about which text, and around which recipe."""

    budget: str = "30m"
    """Time for all of it: 30m, 3h, or overnight (8h)."""
    quiz: bool = False
    """Ask the checkpoint questions before anything is trained, and keep the answers."""
    out: Path | None = None
    """The capstone's folder (default: a new one under ./runs); an interrupted one there goes on."""
    preset: str = "tiny"
    """The model and its recipe (default: tiny, small from an hour, medium from four hours)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: Annotated[DeviceConfig, tyro.conf.arg(name="")] = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    from glasslm.course.capstone import answers, capstone, handout, quiz
    from glasslm.runs import run_folder

    flags = parse(argv)
    budget_s = _seconds(flags.budget)
    require(
        budget_s >= LEAST_S,
        "budget",
        flags.budget,
        "five minutes at least, and better half an hour",
    )
    if flags.train.epochs is not None or flags.train.max_time is not None:
        raise InputError(
            "--epochs and --max-time do not go with a capstone, whose --budget says how long"
        )
    folder = run_folder.study_folder(flags.out, "capstone", flags.preset)
    compute = ComputeConfig(**vars(flags.compute))
    base = RunConfig(flags.model, flags.data, flags.optimizer, flags.train)
    command = shlex.join(["glasslm", "capstone", *argv])
    ledger = capstone.begin(folder, base, flags.preset, budget_s)
    tell(
        f"the capstone is in {folder}: the same command with --out {quoted(folder)} goes on with it"
    )
    if flags.quiz:
        quiz.hold(capstone.questions(base, tell), folder)
        ledger.restart()
    outcome = capstone.train(ledger, base, flags.preset, compute, command, tell)
    if outcome and outcome.status == "interrupted":
        return outcome.exit_code
    made = capstone.study(ledger, base, compute, command, tell)
    page = handout.write(made, answers.answer(made.run.path))
    print(f"hand in: {page}\ncapstone: {folder}")
    return 3 if made.run.history.status == "diverged" else int(made.failed)


def parse(argv: list[str]) -> Flags:
    """The flags over the preset that they name, or that the budget has time for."""
    from glasslm.cli import parsing

    budget_s = _seconds(parsing.value_of("--budget", argv, default=Flags.budget))
    fitting = next((name for below, name in PRESETS if budget_s < below), LARGE)
    return parsing.over_preset(Flags, argv, "glasslm capstone", DESCRIPTION, fitting)


def _seconds(budget: str) -> float:
    return seconds(OVERNIGHT if budget == "overnight" else budget)
