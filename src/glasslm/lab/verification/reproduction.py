"""Reproduction: train a run again from its record, and compare logged numbers and checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glasslm import files
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.choice import compute_from_record
from glasslm.errors import DamagedError, InputError, require
from glasslm.lab.verification.comparison import circumstances
from glasslm.report import run_report
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.metrics import ENDED_STATUSES
from glasslm.runs.run_folder import Run
from glasslm.text import Notify
from glasslm.training import launch
from glasslm.training.fine_tuning import BaseRun

ARRAY_FILES = ("model.safetensors", "optimizer.safetensors")
REPRODUCIBILITY = (
    "Equal bits are guaranteed for NumPy on one type of machine with any number of threads; for "
    "PyTorch on a CPU with the same number of threads; and on a GPU with --deterministic. "
    "Versions, types of "
    'machine, engines and numbers of processes differ in their rounding ("The same bits" in '
    "docs/architecture.md)."
)


@dataclass(frozen=True)
class FirstDifference:
    """The first logged value that differs."""

    step: int
    where: str  # kind of line and field
    then: Any
    now: Any

    @property
    def difference(self) -> float | None:
        """The absolute difference; None if the values are not numbers."""
        numbers = [isinstance(value, (int, float)) for value in (self.then, self.now)]
        return abs(self.then - self.now) if all(numbers) else None


@dataclass(frozen=True)
class CheckpointPair:
    """The comparison of a checkpoint that both runs have."""

    step: int
    same: bool  # the same bytes
    difference: float = 0.0  # the largest absolute difference of any value
    where: str = ""


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a run with its repetition."""

    run: Path
    again: Path
    steps: int  # both are compared up to this step
    reached: int  # the last compared step of the new run
    lines: int  # compared
    trained: int  # lines and checkpoints after a step; the others depend on initial weights only
    parting: FirstDifference | None
    checkpoints: list[CheckpointPair]
    circumstances: list[tuple[str, str, str]]  # those that differ: name, then, now
    notes: list[str]
    interrupted_by: int | None = None  # the signal that ended the new run before that step

    @property
    def same(self) -> bool:
        return (
            self.trained > 0
            and self.parting is None
            and all(pair.same for pair in self.checkpoints)
        )


def reproduce(
    run: Run, run_dir: Path, steps: int | None, command: str, notify: Notify
) -> Reproduction:
    """Train a run again in a new folder, at most `steps` steps of the same schedule, and compare.

    Raises DamagedError, with both hashes, if the text or the base run has changed; InputError if
    there is nothing to train or to compare, or if the folder cannot be used.
    """
    run_folder.require_new(run_dir)
    config = _recorded_config(run)
    length = run.length
    end = length if steps is None else min(steps, length)
    require(end >= 1, "steps", end, f"1 or more ({run.path} ended at step {length})")
    _require_comparable(run, end)
    dataset = run.dataset(notify)
    compute, notes = compute_from_record(
        ComputeConfig(threads=run.record.get("threads", 0)), run.record
    )
    for note in notes:
        notify(f"note: {note}")
    is_complete = run.history.status in ENDED_STATUSES and end == length
    outcome = launch.train(
        config, compute, run_dir, preset=str(run.record.get("preset", "tiny")), command=command,
        dataset=dataset, stop_at=None if is_complete else end, notify=notify,
    )  # fmt: skip
    run_report.write_after_training(outcome, notify)
    was_interrupted = outcome.status == "interrupted"
    whole = is_complete and not was_interrupted
    reproduction = compare_runs(run, Run(outcome.run_dir), end, whole=whole)
    if was_interrupted and reproduction.reached < end:
        return dataclasses.replace(reproduction, interrupted_by=outcome.signal)
    return reproduction


def _recorded_config(run: Run) -> RunConfig:
    """The recorded configuration, without a time limit: it was converted to a number of steps."""
    if "merged_from" in run.record:
        raise InputError(f"{run.path} was merged, not trained: reproduce the run that was merged")
    train = dataclasses.replace(run.config.train, max_time=None)
    if "base" in run.record:
        recorded: Mapping[str, Any] = run.record["base"]
        base = BaseRun(recorded["run"])
        for name, value in base.source.items():
            if name != "run" and value != recorded[name]:
                raise DamagedError(
                    f"{base.run.path} changed after {run.path} started from it: its {name} is "
                    f"{value}, expected {recorded[name]}"
                )
        train = dataclasses.replace(train, init_from=recorded["run"])
    return dataclasses.replace(run.config, train=train)


def _require_comparable(run: Run, end: int) -> None:
    """Raise InputError unless the run logged or saved a result of training up to step `end`."""
    logged = [line["step"] for line in run.metrics() if _depends_on_training(line)]
    first = min([*logged, *filter(None, checkpoint.list_steps(run.path))], default=None)
    if first is None:
        raise InputError(
            f"{run.path} has no logged step and no checkpoint after a step: there is nothing to "
            "compare"
        )
    require(
        end >= first,
        "steps",
        end,
        f"the first step that {run.path} logged: give --steps {first} or more",
    )


def _depends_on_training(line: Mapping[str, Any]) -> bool:
    """Whether the line depends on a training step."""
    return line["kind"] in ("step", "eval") and line["step"] > 0


def compare_runs(run: Run, again: Run, end: int, whole: bool) -> Reproduction:
    """Compare two runs up to step `end`; with `whole`, their numbers of lines must be equal too."""
    reached = min(end, again.length)
    old_lines, new_lines = (
        list(
            itertools.takewhile(
                lambda line: line["step"] <= reached, metrics.comparable_lines(each.metrics())
            )
        )
        for each in (run, again)
    )
    notes: list[str] = []
    pairs = []
    for step in sorted({*checkpoint.list_steps(run.path)} & {*checkpoint.list_steps(again.path)}):
        if step > reached:
            continue
        try:
            pairs.append(_compare_checkpoints(run, again, step))
        except DamagedError as error:
            notes.append(f"the checkpoint of step {step:,} was not compared: {error}")
    return Reproduction(
        run=run.path,
        again=again.path,
        steps=end,
        reached=reached,
        lines=min(len(old_lines), len(new_lines)),
        trained=sum(_depends_on_training(line) for line, _ in zip(old_lines, new_lines))
        + sum(pair.step > 0 for pair in pairs),
        parting=_first_difference(old_lines, new_lines, whole),
        checkpoints=pairs,
        circumstances=_different_values(circumstances(run.record), circumstances(again.record)),
        notes=notes,
    )


def _first_difference(
    old_lines: list[dict[str, Any]], new_lines: list[dict[str, Any]], whole: bool
) -> FirstDifference | None:
    """The first field that differs; with `whole`, the first line that only one run has."""
    for then, now in zip(old_lines, new_lines):
        for name in (name for name in then if name in now):  # another version may log more
            if then[name] != now[name]:
                where = f"{then['kind']}: {name}"
                return FirstDifference(then["step"], where, then[name], now[name])
    n_old, n_new = len(old_lines), len(new_lines)
    if whole and n_old != n_new:
        longer = old_lines if n_old > n_new else new_lines
        step = longer[min(n_old, n_new)]["step"]
        return FirstDifference(step, "number of lines", n_old, n_new)
    return None


def _compare_checkpoints(run: Run, again: Run, step: int) -> CheckpointPair:
    then, now = (checkpoint.load(each.path, step) for each in (run, again))
    if all(
        files.file_sha256(then.path / name) == files.file_sha256(now.path / name)
        for name in ARRAY_FILES
    ):
        return CheckpointPair(step, same=True)
    expected, actual = dict(then.state()), dict(now.state())
    if unmatched := sorted(expected.keys() ^ actual.keys()):
        return CheckpointPair(
            step, False, float("nan"), f"{unmatched[0]}, which only one of them has"
        )
    differences = {
        name: float(np.abs(array - actual[name]).max()) for name, array in expected.items()
    }
    where = max(differences, key=differences.__getitem__)
    return CheckpointPair(step, False, differences[where], where)


def _different_values(then: dict[str, str], now: dict[str, str]) -> list[tuple[str, str, str]]:
    """(name, then, now) of the values that differ."""
    rows = [
        (name, then.get(name, "-"), now.get(name, "-")) for name in dict.fromkeys([*then, *now])
    ]
    return [row for row in rows if row[1] != row[2]]
