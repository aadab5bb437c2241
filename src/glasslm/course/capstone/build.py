"""Build a capstone in one folder, within a budget: a trained model, an ablation, a scaling study.

    run/ an ordinary run    ablation/, scaling/ studies    capstone.json the time    index.html

Each part gets a share of the time that is left when it starts, so that a part that takes longer
than planned shortens the next one. Parts that are finished are not computed again.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from glasslm import files
from glasslm.config.conversion import to_dict, with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.course.capstone import time_plan
from glasslm.course.capstone.questions import Question, list_questions
from glasslm.course.capstone.study_sizes import ablation_spec, choose_design, list_sizes
from glasslm.errors import DamagedError, InputError
from glasslm.lab.studies import ablation, ablation_report, scaling_report, scaling_study
from glasslm.lab.studies.ladder import LADDER_SHAPES
from glasslm.lab.studies.scaling_study import ScalingStudy
from glasslm.lab.studies.study_plan import PLAN_FILE, prepare_recipe
from glasslm.lab.studies.sweep import Runner
from glasslm.report import run_report
from glasslm.runs.metrics import ENDED_STATUSES, to_json_types
from glasslm.runs.run_folder import Run
from glasslm.runs.run_lock import lock_run
from glasslm.text import Notify, format_duration
from glasslm.training import launch
from glasslm.training.outcome import Outcome

RECORD_NAME, FORMAT = "capstone.json", 1
RUN_NAME = "run"
# Fractions of the time that is left when a part starts. The remainder is for the pages.
TIME_SHARES = {"run": 0.32, "scaling": 0.48, "ablation": 0.9}


class CapstoneRecord:
    """capstone.json: the time spent, summed over interruptions, and the choices made once."""

    def __init__(self, folder: Path, settings: list[Any], budget_s: float) -> None:
        """Raises InputError if the folder contains a capstone of other settings.

        The budget of a capstone may be raised: studies that had no time are then planned again.
        """
        files.make_folder(folder)
        self.folder, self.settings, self.budget_s = folder, settings, budget_s
        self.clock_start, self.spent_s = time.monotonic(), 0.0
        self.choices: dict[str, Any] = {}
        path = folder / RECORD_NAME
        if path.exists():
            record = files.read_json(path)
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise DamagedError(
                    f"{path} is no record of format {FORMAT}: restore it, or choose another --out"
                )
            *earlier_settings, earlier_budget_s = record["asked"]
            if earlier_settings != settings:
                raise InputError(
                    f"{path} is of other settings: give the same flags, or choose another --out"
                )
            if budget_s < earlier_budget_s:
                raise InputError(
                    f"{path} has a budget of {format_duration(earlier_budget_s)}: it can be "
                    "raised, not lowered"
                )
            self.spent_s, self.choices = float(record["spent_s"]), dict(record["decided"])
            if budget_s > earlier_budget_s:
                self.forget_plan()

    def choose_once(self, name: str, choose: Callable[[], Any]) -> Any:
        """The stored choice, or a new one, which depends on the speed of the moment."""
        if name not in self.choices:
            self.choices[name] = choose()
        self.save()
        return self.choices[name]

    def forget_plan(self) -> None:
        """Plan the time again, of all parts that have not started."""
        self.choices.pop("times", None)
        for part in time_plan.PARTS:
            if not self.has_started(part):
                self.forget_choices(part)

    def has_started(self, part: str) -> bool:
        """Whether a part has a plan of its own, which fixes its size."""
        name = "run.json" if part == "run" else PLAN_FILE
        return (self.folder / part / name).exists()

    def forget_choices(self, part: str) -> None:
        """Forget the time of a part and what follows from it."""
        self.choices.pop(f"{part}_s", None)
        if part == "ablation":
            self.choices.pop("baseline", None)

    def redo(self, part: str) -> None:
        """Delete a part, to make it again in the time that it had, or, if it had none, in the rest.

        Raises InUseError if another process trains the run.
        """
        path = self.folder / part
        if part == "run" and path.exists():
            with lock_run(path):
                pass
        if path.exists():
            files.remove_folder(path)
        if not self.choices.get(f"{part}_s"):
            self.forget_plan()

    def allot_seconds(self, part: str) -> float:
        """The time for a part in seconds: its share of what was left when it first started.

        0 where the budget has no time for it.
        """
        self.save()
        left_s = self.budget_s - self.spent_s
        times: dict[str, float] = self.choices.get("times", {})
        if part in times:
            later = itertools.dropwhile(lambda name: name != part, time_plan.PARTS)
            planned_s = sum(times.get(name, 0.0) for name in later)
            share = times[part] / planned_s * sum(time_plan.SHARES.values()) if times[part] else 0
        else:
            share = TIME_SHARES[part]
        seconds = round(max(left_s * share, 1.0), 1) if share else 0.0
        return float(self.choose_once(f"{part}_s", lambda: seconds))

    @contextmanager
    def count_time(self) -> Iterator[None]:
        """Count the time of the block as spent, also if it raises."""
        try:
            yield
        finally:
            self.save()

    def restart_clock(self) -> None:
        """Leave out the time since the last count: the user was answering questions."""
        self.clock_start = time.monotonic()

    def save(self) -> None:
        """Add the time since the last count and write the record."""
        now = time.monotonic()
        self.spent_s, self.clock_start = self.spent_s + now - self.clock_start, now
        record = {
            "format": FORMAT,
            "asked": [*self.settings, self.budget_s],
            "spent_s": round(self.spent_s, 1),
            "decided": self.choices,
        }
        files.write_json(self.folder / RECORD_NAME, record)


class Ablation(NamedTuple):
    """An ablation and its results."""

    plan: ablation.Plan
    results: list[ablation.VariantResult]


@dataclass(frozen=True)
class Capstone:
    """All parts of a capstone. A study without a result is replaced by the reason, a string."""

    folder: Path
    run: Run
    ablation: Ablation | str
    scaling: ScalingStudy | str
    budget_s: float
    spent_s: float
    command: str

    @property
    def is_incomplete(self) -> bool:
        """Whether a study is missing or one of its runs failed."""
        if isinstance(self.ablation, str) or isinstance(self.scaling, str):
            return True
        return any(
            trial.status == "failed" for result in self.ablation.results for trial in result.trials
        )


def open_record(folder: Path, base: RunConfig, preset: str, budget_s: float) -> CapstoneRecord:
    """The record of a new or interrupted capstone."""
    return CapstoneRecord(folder, to_json_types([to_dict(base), preset]), budget_s)


def plan_times(
    record: CapstoneRecord, base: RunConfig, compute: ComputeConfig, notify: Notify
) -> None:
    """Divide the time that is left among the parts that have not started, and tell it.

    Each part gets at least the time that its smallest size needs at the measured speed.
    """
    waiting = [part for part in time_plan.PARTS if not record.has_started(part)]
    if "times" in record.choices or not waiting:
        return
    notify("measuring the speed of the studies, to divide the time")
    with record.count_time():
        sizes = list_sizes(base, Runner(compute), record.budget_s, notify)
    sizes = {part: sizes[part] for part in waiting}
    left_s = record.budget_s - record.spent_s
    times, chosen = time_plan.divide_time(left_s, sizes)
    record.choose_once("times", lambda: times)
    notify(time_plan.describe_times(times, chosen))
    smallest = {part: part_sizes[-1].seconds for part, part_sizes in sizes.items()}
    needed_s = time_plan.required_budget(smallest, record.spent_s)
    for part in (part for part, seconds in times.items() if not seconds):
        reason = time_plan.explain_missing(part, record.budget_s, needed_s)
        record.choices[f"{part}_missing"] = reason
        notify(f"warning: {reason}")
    record.save()


def list_quiz_questions(base: RunConfig, notify: Notify) -> list[Question]:
    """The questions of the quiz, before training. Reads the text for its vocabulary size."""
    base, dataset = prepare_recipe(base, notify)
    return list_questions(base, dataset.tokenizer.vocab_size)


def train_model(
    record: CapstoneRecord,
    base: RunConfig,
    preset: str,
    compute: ComputeConfig,
    command: str,
    notify: Notify,
) -> Outcome | None:
    """Train the capstone's run, or resume it. None if it has ended already."""
    path, time_s = record.folder / RUN_NAME, record.allot_seconds("run")
    with record.count_time():
        if (path / "run.json").exists():
            if Run(path).history.status in ENDED_STATUSES:
                return None
            outcome = launch.resume(path, compute, notify)
            run_report.write_after_training(outcome, notify)
            return outcome
        notify(f"part 1 of 3: the model, in {format_duration(time_s)}")
        config, _ = prepare_recipe(base, notify)
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, max_time=f"{time_s:g}s")
        )
        outcome = launch.train(config, compute, path, preset=preset, command=command, notify=notify)
        run_report.write_after_training(outcome, notify)
        return outcome


def run_studies(
    record: CapstoneRecord, base: RunConfig, compute: ComputeConfig, command: str, notify: Notify
) -> Capstone:
    """The ablation and the scaling study, after the run has ended.

    A signal ends the program, as in any study.
    """
    run, runner = Run(record.folder / RUN_NAME), Runner(compute)
    # The text is that of the run, which may be a fallback. Small models need no dropout.
    recipe = with_flags(
        dataclasses.replace(base, data=run.config.data), {"dropout": 0.0, "attention_dropout": 0.0}
    )
    scaling_part = _run_or_explain(
        lambda: _run_scaling(record, recipe, runner, command, notify), notify
    )
    ablation_part = _run_or_explain(
        lambda: _run_ablation(record, recipe, runner, command, notify), notify
    )
    record.save()
    return Capstone(
        record.folder, run, ablation_part, scaling_part, record.budget_s, record.spent_s, command
    )


Study = TypeVar("Study")


def _run_or_explain(run_study: Callable[[], Study], notify: Notify) -> Study | str:
    """The study, or the message of its InputError, so that the other parts can be handed in."""
    try:
        return run_study()
    except InputError as error:
        notify(f"warning: {error}")
        return str(error)


def _run_ablation(
    record: CapstoneRecord, recipe: RunConfig, runner: Runner, command: str, notify: Notify
) -> Ablation:
    folder, time_s = record.folder / "ablation", record.allot_seconds("ablation")
    _require_time(record, "ablation", time_s)
    notify(f"part 3 of 3: the ablation, in {format_duration(time_s)}")
    with record.count_time():

        def choose() -> list[int]:
            design = choose_design(recipe, time_s, runner, notify)
            return [*design.shape, design.level]

        design, spec = ablation_spec(record.choose_once("baseline", choose), time_s)
        plan = ablation.plan(design.baseline(recipe), spec, runner, folder, notify)
        results = ablation.run(plan, folder, runner, command, notify)
        ablation_report.write(folder, plan, results)
    return Ablation(plan, results)


def _require_time(record: CapstoneRecord, part: str, time_s: float) -> None:
    """Raise InputError where the plan has no time for a part."""
    if not time_s:
        raise InputError(record.choices.get(f"{part}_missing", f"no time for the {part}"))


def _run_scaling(
    record: CapstoneRecord, recipe: RunConfig, runner: Runner, command: str, notify: Notify
) -> ScalingStudy:
    folder, time_s = record.folder / "scaling", record.allot_seconds("scaling")
    _require_time(record, "scaling", time_s)
    notify(f"part 2 of 3: the scaling study, in {format_duration(time_s)}")
    with record.count_time():
        study = scaling_study.run_study(
            recipe, f"{time_s:g}s", runner, folder, notify, command, LADDER_SHAPES
        )
        scaling_report.write(folder, study)
    return study
