"""A run trained again from its record, and compared with what it was: every logged number, every checkpoint's bits."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glasslm import files
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data import shards
from glasslm.engines.choice import as_recorded
from glasslm.errors import DamagedError, InputError, require
from glasslm.lab.verification.comparison import circumstances
from glasslm.report import run_report
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.metrics import Line
from glasslm.runs.run_folder import Run
from glasslm.text import Say
from glasslm.training import launch
from glasslm.training.fine_tuning import Base

ARRAYS = ("model.safetensors", "optimizer.safetensors")
PROMISE = (
    "Equal bits are promised for NumPy on one type of machine, whatever the number of threads; for PyTorch on a CPU "
    "with the same number of threads; and on a GPU with --deterministic. Between versions, types of machine, engines "
    'and numbers of processes rounding differs ("The same bits" in docs/architecture.md).'
)


@dataclass(frozen=True)
class Parting:
    """The first logged value that is another one."""

    step: int
    where: str  # kind of line and field
    then: Any
    now: Any

    @property
    def apart(self) -> float | None:
        """By how much; None where they are no numbers."""
        numbers = [isinstance(value, (int, float)) for value in (self.then, self.now)]
        return abs(self.then - self.now) if all(numbers) else None


@dataclass(frozen=True)
class Pair:
    """A checkpoint that both have."""

    step: int
    same: bool  # the same bytes
    difference: float = 0.0  # the largest of any value
    where: str = ""


@dataclass(frozen=True)
class Reproduction:
    """What came of training a run again."""

    run: Path
    again: Path
    steps: int  # up to here both are compared
    reached: int  # by the new run
    lines: int  # compared
    trained: int  # of these and of the checkpoints, how many come after a step: the others know the first weights only
    parting: Parting | None
    checkpoints: list[Pair]
    circumstances: list[tuple[str, str, str]]  # that differ: name, then, now
    notes: list[str]
    interrupted_by: int | None = None  # the signal that ended the new run before that step

    @property
    def same(self) -> bool:
        return (
            self.trained > 0
            and self.parting is None
            and all(pair.same for pair in self.checkpoints)
        )


def reproduce(run: Run, run_dir: Path, steps: int | None, command: str, say: Say) -> Reproduction:
    """Train again into a new folder, at most `steps` steps of the same schedule, and compare.

    Raises DamagedError, with both hashes, where the text is another one by now, or the run that this one started from
    is; InputError where there is nothing to train or to compare, or the folder cannot be used.
    """
    run_folder.require_new(run_dir)
    config = _recipe(run)
    length = run.length
    end = length if steps is None else min(steps, length)
    require(end >= 1, "steps", end, f"1 or more, and {run.path} itself got to step {length}")
    _require_comparable(run, end)
    dataset = shards.of_run(run.config.data, run.record["data"], run.tokenizer, say)
    compute, notes = as_recorded(ComputeConfig(threads=run.record.get("threads", 0)), run.record)
    for note in notes:
        say(f"note: {note}")
    ended = run.history.status in ("finished", "stopped", "diverged") and end == length
    outcome = launch.train(
        config, compute, run_dir, preset=str(run.record.get("preset", "tiny")), command=command,
        dataset=dataset, stop_at=None if ended else end, say=say,
    )  # fmt: skip
    run_report.write_after_training(outcome, say)
    came = compare(run, Run(outcome.run_dir), end, whole=ended and outcome.status != "interrupted")
    early = outcome.status == "interrupted" and came.reached < end
    return dataclasses.replace(came, interrupted_by=outcome.signal) if early else came


def _recipe(run: Run) -> RunConfig:
    """The configuration as recorded; what it asked of the clock has become a number of steps."""
    if "merged_from" in run.record:
        raise InputError(
            f"{run.path} was merged, not trained: reproduce the run that its weights came from"
        )
    train = dataclasses.replace(run.config.train, max_time=None)
    known = run.record.get("base")
    if known:
        base = Base(known["run"])
        now = {"step": base.held.step, "data_sha256": base.run.record["data"]["sha256"]}
        for name, value in now.items():
            if value != known[name]:
                raise DamagedError(
                    f"{base.run.path} is not what {run.path} started from: its {name} is {value}, it was {known[name]}"
                )
        train = dataclasses.replace(train, init_from=known["run"])
    return dataclasses.replace(run.config, train=train)


def _require_comparable(run: Run, end: int) -> None:
    """Up to the step `end` the run has written down something that training made."""
    logged = [line["step"] for line in run.metrics() if _is_trained(line)]
    first = min([*logged, *filter(None, checkpoint.list_steps(run.path))], default=None)
    if first is None:
        raise InputError(
            f"{run.path} wrote down no step and has no checkpoint after one: there is nothing to compare"
        )
    require(
        end >= first,
        "steps",
        end,
        f"the first step that {run.path} wrote down: give --steps {first} or more",
    )


def _is_trained(line: Line) -> bool:
    """Whether it has numbers that a step was needed for."""
    return line["kind"] in ("step", "eval") and line["step"] > 0


def compare(run: Run, again: Run, end: int, whole: bool) -> Reproduction:
    """Both runs up to the step `end`; `whole`: both are over, so that neither may have a line more."""
    reached = min(end, again.length)
    theirs, ours = (
        list(
            itertools.takewhile(
                lambda line: line["step"] <= reached, metrics.comparable(one.metrics())
            )
        )
        for one in (run, again)
    )
    notes: list[str] = []
    pairs = []
    for step in sorted({*checkpoint.list_steps(run.path)} & {*checkpoint.list_steps(again.path)}):
        if step > reached:
            continue
        try:
            pairs.append(_pair(run, again, step))
        except DamagedError as error:
            notes.append(f"the checkpoint of step {step:,} was not compared: {error}")
    return Reproduction(
        run=run.path,
        again=again.path,
        steps=end,
        reached=reached,
        lines=min(len(theirs), len(ours)),
        trained=sum(_is_trained(line) for line, _ in zip(theirs, ours))
        + sum(pair.step > 0 for pair in pairs),
        parting=_parting(theirs, ours, whole),
        checkpoints=pairs,
        circumstances=_unlike(circumstances(run.record), circumstances(again.record)),
        notes=notes,
    )


def _parting(theirs: list[Line], ours: list[Line], whole: bool) -> Parting | None:
    for then, now in zip(theirs, ours):
        for name in (name for name in then if name in now):  # another version may log more
            if then[name] != now[name]:
                return Parting(then["step"], f"{then['kind']}: {name}", then[name], now[name])
    if whole and len(theirs) != len(ours):
        first = (theirs if len(theirs) > len(ours) else ours)[min(len(theirs), len(ours))]
        return Parting(first["step"], "number of lines", len(theirs), len(ours))
    return None


def _pair(run: Run, again: Run, step: int) -> Pair:
    then, now = (checkpoint.load(one.path, step) for one in (run, again))
    if all(
        files.sha256_of(then.path / name) == files.sha256_of(now.path / name) for name in ARRAYS
    ):
        return Pair(step, same=True)
    expected, found = dict(then.state()), dict(now.state())
    if other := sorted(expected.keys() ^ found.keys()):
        return Pair(step, False, float("nan"), f"{other[0]}, which only one of them has")
    apart = {name: float(np.abs(array - found[name]).max()) for name, array in expected.items()}
    where = max(apart, key=apart.__getitem__)
    return Pair(step, False, apart[where], where)


def _unlike(then: dict[str, str], now: dict[str, str]) -> list[tuple[str, str, str]]:
    rows = [
        (name, then.get(name, "-"), now.get(name, "-")) for name in dict.fromkeys([*then, *now])
    ]
    return [row for row in rows if row[1] != row[2]]
