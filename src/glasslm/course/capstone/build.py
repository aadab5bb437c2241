"""A whole capstone in one folder: a trained model, an ablation, a scaling study, within a budget of time.

    run/ an ordinary run    ablation/ and scaling/ studies    capstone.json what each part may take    index.html

Each part gets its share of the time that is left when it begins, so that one which took longer than planned costs the
next one and not the person who waits. What is there already is not made again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from glasslm import files
from glasslm.config.conversion import to_dict, with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.course.capstone.questions import Question, ask
from glasslm.errors import DamagedError, InputError
from glasslm.lab.studies import ablation, ablation_report, scaling_report, scaling_study
from glasslm.lab.studies.axes import variants, with_model
from glasslm.lab.studies.scaling_study import Study
from glasslm.lab.studies.study_setting import measured, with_engine, with_text
from glasslm.lab.studies.sweep import OVER, Runner, cost
from glasslm.report import run_report
from glasslm.runs.metrics import plain
from glasslm.runs.run_folder import Run
from glasslm.text import Say, duration
from glasslm.training import launch
from glasslm.training.launch import Outcome

RECORD, FORMAT = "capstone.json", 1
RUN = "run"
SHARES = {
    "run": 0.32,
    "ablation": 0.45,
    "scaling": 0.9,
}  # of the time that is left; the rest is for the pages
SEEDS = 3
# The study that courses ask for, by layers, width and heads, and smaller ones like it: the largest that has time for
# ENOUGH_STEPS is taken. Depths are 1/3, 2/3, 4/3 and 2 times the baseline's, widths 1/6, 1/3, 2/3 and 4/3 times.
BASELINES = ((6, 384, 6), (6, 192, 6), (6, 96, 6), (3, 96, 6), (3, 48, 6))
ENOUGH_STEPS, ROWS, CONTEXT = 400, 16, 128


class Ledger:
    """capstone.json: the time spent so far, over all the times that the capstone went on, and what was decided once."""

    def __init__(self, folder: Path, asked: Any, budget_s: float) -> None:
        """Raises InputError where the folder holds a capstone of other settings."""
        files.make_folder(folder)
        self.folder, self.asked, self.budget_s = folder, asked, budget_s
        self.began, self.spent = time.monotonic(), 0.0
        self.decided: dict[str, Any] = {}
        path = folder / RECORD
        if path.exists():
            held = files.read_json(path)
            if not isinstance(held, dict) or held.get("format") != FORMAT:
                raise DamagedError(
                    f"{path} is no record of format {FORMAT}: restore it, or choose another --out"
                )
            if held["asked"] != asked:
                raise InputError(
                    f"{path} is of other settings: give the same flags, or choose another --out"
                )
            self.spent, self.decided = float(held["spent_s"]), dict(held["decided"])

    def once(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided when this was first asked: a clock would have it otherwise later."""
        if name not in self.decided:
            self.decided[name] = decide()
        self.keep()
        return self.decided[name]

    def seconds(self, part: str) -> float:
        """What a part may take: its share of what is left when it begins."""
        self.keep()
        left = self.budget_s - self.spent
        return float(self.once(f"{part}_s", lambda: round(max(left * SHARES[part], 1.0), 1)))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What is done in here takes time of the budget, however it ends."""
        try:
            yield
        finally:
            self.keep()

    def restart(self) -> None:
        """What passed since the last look was not the machine's: a person was asked."""
        self.began = time.monotonic()

    def keep(self) -> None:
        now = time.monotonic()
        self.spent, self.began = self.spent + now - self.began, now
        record = {
            "format": FORMAT,
            "asked": self.asked,
            "spent_s": round(self.spent, 1),
            "decided": self.decided,
        }
        files.write_json(self.folder / RECORD, record)


class Ablation(NamedTuple):
    plan: ablation.Plan
    results: list[ablation.Result]


@dataclass(frozen=True)
class Capstone:
    """All that there is to tell of; in place of a study that could not be made the reason."""

    folder: Path
    run: Run
    ablation: Ablation | str
    scaling: Study | str
    budget_s: float
    spent_s: float
    command: str

    @property
    def failed(self) -> bool:
        """Whether anything is missing."""
        if isinstance(self.ablation, str) or isinstance(self.scaling, str):
            return True
        return any(row.status == "failed" for one in self.ablation.results for row in one.rows)


def begin(folder: Path, base: RunConfig, preset: str, budget_s: float) -> Ledger:
    return Ledger(folder, plain([to_dict(base), preset, budget_s]), budget_s)


def questions(base: RunConfig, say: Say) -> list[Question]:
    """What the quiz asks, before anything is trained; the text is read for it, as the vocabulary's size is in it."""
    base, dataset = with_text(base, say)
    return ask(base, dataset.tokenizer.vocab_size)


def train(
    ledger: Ledger, base: RunConfig, preset: str, compute: ComputeConfig, command: str, say: Say
) -> Outcome | None:
    """The run, begun or gone on with; None where it is over already."""
    path, time_s = ledger.folder / RUN, ledger.seconds("run")
    with ledger.counting():
        if (path / "run.json").exists():
            if Run(path).history.status in OVER:
                return None
            outcome = launch.resume(path, compute, say)
            run_report.write_after_training(outcome, say)
            return outcome
        say(f"1 of 3: the model, in {duration(time_s)}")
        config, _ = with_text(base, say)
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, max_time=f"{time_s:g}s")
        )
        outcome = launch.train(config, compute, path, preset=preset, command=command, say=say)
        run_report.write_after_training(outcome, say)
        return outcome


def study(
    ledger: Ledger, base: RunConfig, compute: ComputeConfig, command: str, say: Say
) -> Capstone:
    """The ablation and the scaling study of a run that is over. A signal ends the program as it would end any study."""
    run, runner = Run(ledger.folder / RUN), Runner(compute)
    # The text as the run found it, which may be a fallback; and no dropout, which small models have no use for.
    recipe = with_flags(
        dataclasses.replace(base, data=run.config.data), {"dropout": 0.0, "attention_dropout": 0.0}
    )
    ablated = _or_why(lambda: _ablated(ledger, recipe, runner, command, say), say)
    scaled = _or_why(lambda: _scaled(ledger, recipe, runner, command, say), say)
    ledger.keep()
    return Capstone(ledger.folder, run, ablated, scaled, ledger.budget_s, ledger.spent, command)


Made = TypeVar("Made")


def _or_why(make: Callable[[], Made], say: Say) -> Made | str:
    """A part, or why it could not be made: what else there is can be handed in all the same."""
    try:
        return make()
    except InputError as error:
        say(f"warning: {error}")
        return str(error)


def _ablated(ledger: Ledger, recipe: RunConfig, runner: Runner, command: str, say: Say) -> Ablation:
    folder, time_s = ledger.folder / "ablation", ledger.seconds("ablation")
    say(f"2 of 3: the ablation, in {duration(time_s)}")
    with ledger.counting():
        shape = ledger.once("baseline", lambda: _affordable(recipe, time_s, runner, say))
        asked = ablation.Asked(tuple(_axes(shape)), SEEDS, budget=f"{time_s:g}s")
        plan = ablation.plan(_baseline(recipe, shape), asked, runner, folder, say)
        results = ablation.run(plan, folder, runner, command, say)
        ablation_report.write(folder, plan, results)
    return Ablation(plan, results)


def _scaled(ledger: Ledger, recipe: RunConfig, runner: Runner, command: str, say: Say) -> Study:
    folder, time_s = ledger.folder / "scaling", ledger.seconds("scaling")
    say(f"3 of 3: the scaling study, in {duration(time_s)}")
    with ledger.counting():
        law = scaling_study.study(recipe, f"{time_s:g}s", runner, folder, say, command)
        scaling_report.write(folder, law)
    return law


def _affordable(recipe: RunConfig, budget_s: float, runner: Runner, say: Say) -> list[int]:
    """The largest of BASELINES that has time for enough steps, or the smallest."""
    recipe, dataset = with_text(recipe, say)
    V = dataset.tokenizer.vocab_size
    for shape in BASELINES:
        base = _baseline(recipe, shape).resolved()
        others = [one.config for one in variants(_axes(shape), base)]
        compute = with_engine(runner.compute, max((base, *others), key=lambda one: cost(one, V)), V)
        costs = ablation.costs_of(base, others, "tokens", V)
        step_s = measured(base, compute, dataset).step
        if ablation.steps_within(budget_s, costs, SEEDS, runner.slots, step_s) >= ENOUGH_STEPS:
            break
    return list(shape)


def _baseline(recipe: RunConfig, shape: Sequence[int]) -> RunConfig:
    recipe = with_flags(
        recipe, {"batch_size": ROWS, "block_size": min(CONTEXT, recipe.model.block_size)}
    )
    return with_model(
        recipe, n_layers=shape[0], d_model=shape[1], n_heads=shape[2], n_kv_heads=0, d_ff=0
    )


def _axes(shape: Sequence[int]) -> list[str]:
    L, d, _ = shape
    depths = "/".join(str(L * times // 3) for times in (1, 2, 3, 4, 6))
    widths = "/".join(str(d * times // 6) for times in (1, 2, 4, 6, 8))
    return [f"depth={depths}", f"width={widths}", "heads", "activation", "norm"]
