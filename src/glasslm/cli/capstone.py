"""glasslm capstone: a course project in one folder, within a time budget."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from glasslm import files
from glasslm.cli.flag_groups import REFUSED_IN_STUDIES, RecipeFlags, compute_config
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import DeviceConfig
from glasslm.config.units import parse_duration
from glasslm.errors import InputError, require
from glasslm.text import notify, print_result

DESCRIPTION = """A course project in one command and one folder, on any text, within a time
budget.

It trains a model, compares design choices over three seeds, fits a scaling law
and checks its prediction, and answers the checkpoint questions of a course with
the numbers of this run. index.html is the page to hand in. --quiz asks you the
questions first and shows your answers beside the right ones. To continue an
interrupted capstone, give the same command with --out.

Examples:
  glasslm capstone --budget 30m
  glasslm capstone --budget 3h --corpus arxiv --quiz
  glasslm capstone --budget overnight --text-file book.txt --preset medium"""

OVERNIGHT = "8h"
SMALL_PRESETS = ((3600.0, "tiny"), (4 * 3600.0, "small"))  # (budget in seconds, preset below it)
LARGE_PRESET = "medium"  # for larger budgets
MIN_BUDGET_S = 300.0  # a shorter study has too few steps for a result


@dataclass(frozen=True, kw_only=True)
class Flags(RecipeFlags):
    """The budget, the text and the recipe of a capstone."""

    hidden_fields = REFUSED_IN_STUDIES | {"max_steps", "ops"}

    budget: Annotated[str, tyro.conf.arg(metavar="TIME")] = "30m"
    """Time for the whole capstone: 30m, 3h, or overnight (8h).
    It chooses the preset: tiny, small from one hour, medium from four hours."""
    quiz: bool = False
    """Ask the checkpoint questions before training, and store the answers."""
    out: Annotated[Path | None, optional_flag("PATH", "a new one under ./runs")] = None
    """Folder of the capstone. An interrupted capstone in it continues."""
    redo: Literal["run", "ablation", "scaling"] | None = None
    """Delete this part of the capstone in --out and make it again."""
    zip: bool = False
    """Write the hand-in as one .zip beside the folder, without paths of this machine."""
    compute: DeviceConfig = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import given_fields
    from glasslm.course.capstone import answers, build, hand_in, handout, quiz
    from glasslm.runs import run_folder

    flags = parse(argv)
    budget_s = _parse_budget(flags.budget)
    require(budget_s >= MIN_BUDGET_S, "--budget", flags.budget, "at least 5m, and better 30m")
    if flags.train.epochs is not None or flags.train.max_time is not None:
        raise InputError("--budget is the time of a capstone: leave out --epochs and --max-time")
    if "max_steps" in given_fields(argv):
        raise InputError("--budget fixes the steps of a capstone's runs: leave out --max-steps")
    if flags.operations.ops:
        raise InputError(
            "--ops does not go with a capstone, whose questions are about the engine's own "
            "operations: leave it out"
        )
    folder = run_folder.study_folder(flags.out, "capstone", flags.preset)
    compute, base = compute_config(flags.compute), flags.config
    command = shlex.join(["glasslm", "capstone", *argv])
    record = build.open_record(folder, base, flags.preset, budget_s)
    notify(f"capstone: {folder} ({run_folder.continuation_hint(folder)})")
    if flags.redo:
        record.redo(flags.redo)
    if flags.quiz:
        quiz.ask_questions(build.list_quiz_questions(base, notify), folder)
        record.restart_clock()
    build.plan_times(record, base, compute, notify)
    outcome = build.train_model(record, base, flags.preset, compute, command, notify)
    if outcome and outcome.status == "interrupted":
        return outcome.exit_code
    capstone = build.run_studies(record, base, compute, command, notify)
    notify("answering the questions and writing the page")
    page = handout.write(capstone, answers.answer_questions(capstone.run.path))
    handed_in = hand_in.write_zip(folder) if flags.zip else page
    print_result(f"hand in: {handed_in}\ncapstone: {folder}")
    return 3 if capstone.run.history.status == "diverged" else int(capstone.is_incomplete)


def parse(argv: list[str]) -> Flags:
    """The flags, over the preset that they name or the largest one that the budget allows."""
    from glasslm.cli import parsing

    budget_s = _parse_budget(parsing.flag_value("--budget", argv, default=Flags.budget))
    out = parsing.flag_value("--out", argv, default="")
    record = Path(out, "capstone.json")
    if out and record.exists() and not parsing.flag_value("--preset", argv, default=""):
        settings = files.read_json(record)  # a larger budget keeps the preset of the folder
        argv = [*argv, "--preset", str(settings["asked"][1])] if _has_preset(settings) else argv
    preset = next((name for limit_s, name in SMALL_PRESETS if budget_s < limit_s), LARGE_PRESET)
    return parsing.parse_over_preset(Flags, argv, "glasslm capstone", DESCRIPTION, preset)


def _has_preset(record: Any) -> bool:
    """Whether the content of capstone.json names a preset; build.py judges the rest."""
    asked = record.get("asked") if isinstance(record, dict) else None
    return isinstance(asked, list) and len(asked) > 2 and isinstance(asked[1], str)


def _parse_budget(budget: str) -> float:
    """The budget in seconds."""
    return parse_duration(OVERNIGHT if budget == "overnight" else budget)
