"""Reproduction: train a run again from its record, and compare logged numbers and checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glasslm import files
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.chat.chat_source import with_recorded_path
from glasslm.data.tasks.catalogue import line_length
from glasslm.engines.choice import compute_from_record
from glasslm.errors import DamagedError, InputError, require
from glasslm.lab.verification.compared_run import recorded_environment
from glasslm.report import run_report
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.blas import format_blas
from glasslm.runs.metrics import ENDED_STATUSES
from glasslm.runs.recorded_operations import admit_run_operations
from glasslm.runs.run_folder import Run
from glasslm.text import Notify
from glasslm.training import launch
from glasslm.training.fine_tuning import BaseRun

ARRAY_FILES = ("model.safetensors", "optimizer.safetensors")
# The relative difference of a logged loss that rounding explains, where another BLAS kernel or
# processor computes: at the first logged step, and at any step (steps amplify rounding errors).
FIRST_LOSS_TOLERANCE, LOSS_TOLERANCE = 1e-4, 0.02
ROUNDING_NAMES = (
    "blas: kernel",
    "blas: library",
    "blas: version",
    "versions: blas",
    "machine: cpu",
)
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
    recorded: Any
    repeated: Any

    @property
    def is_rounding(self) -> bool:
        """Whether the values are measured numbers, which rounding can change."""
        return isinstance(self.recorded, float) and isinstance(self.repeated, float)

    @property
    def difference(self) -> float | None:
        """The absolute difference; None if the values are not numbers."""
        numbers = [isinstance(value, (int, float)) for value in (self.recorded, self.repeated)]
        return abs(self.recorded - self.repeated) if all(numbers) else None


@dataclass(frozen=True)
class CheckpointPair:
    """The comparison of a checkpoint that both runs have."""

    step: int
    is_identical: bool  # the same bytes
    difference: float = 0.0  # the largest absolute difference of any value
    where: str = ""


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a run with its repetition."""

    run: Path
    new_run: Path
    steps: int  # both are compared up to this step
    last_step: int  # the last compared step of the new run
    lines: int  # compared
    # Lines and checkpoints after a step; the others depend on initial weights only
    n_trained_results: int
    first_difference: FirstDifference | None
    checkpoints: list[CheckpointPair]
    environment: list[tuple[str, str, str]]  # values that differ: name, recorded, repeated
    notes: list[str]
    losses: list[float]  # relative differences of the logged losses, in the order of the steps
    kernels: tuple[str, str]  # the BLAS that computed the run, and the one that computes now
    interrupted_by: int | None = None  # the signal that ended the new run before that step

    @property
    def is_identical(self) -> bool:
        """Whether every compared result of training is the same, bit for bit."""
        return (
            self.n_trained_results > 0
            and self.first_difference is None
            and all(pair.is_identical for pair in self.checkpoints)
        )

    @property
    def rounds_differently(self) -> bool:
        """Whether another BLAS kernel or processor computes, so that rounding differs."""
        return any(name in ROUNDING_NAMES for name, _, _ in self.environment)

    @property
    def is_same_within_rounding(self) -> bool:
        """Whether the bits differ, but losses only as far as another kernel rounds."""
        return (
            not self.is_identical
            and self.rounds_differently
            and (self.first_difference is None or self.first_difference.is_rounding)
            and bool(self.losses)
            and self.losses[0] <= FIRST_LOSS_TOLERANCE
            and max(self.losses) <= LOSS_TOLERANCE
        )


def json_facts(reproduction: Reproduction) -> dict[str, Any]:
    """The comparison for JSON; some keys are older than the fields."""
    difference = reproduction.first_difference
    return {
        "run": str(reproduction.run),
        "again": str(reproduction.new_run),
        "steps": reproduction.steps,
        "reached": reproduction.last_step,
        "lines": reproduction.lines,
        "trained": reproduction.n_trained_results,
        "parting": difference
        and {
            "step": difference.step,
            "where": difference.where,
            "then": difference.recorded,
            "now": difference.repeated,
        },
        "checkpoints": [
            {
                "step": pair.step,
                "same": pair.is_identical,
                "difference": pair.difference,
                "where": pair.where,
            }
            for pair in reproduction.checkpoints
        ],
        "circumstances": reproduction.environment,
        "notes": reproduction.notes,
        "interrupted_by": reproduction.interrupted_by,
        "same": reproduction.is_identical,
        "same_within_rounding": reproduction.is_same_within_rounding,
        "kernels": reproduction.kernels,
    }


def reproduce(
    run: Run, run_dir: Path, steps: int | None, command: str, notify: Notify, ops: str = ""
) -> Reproduction:
    """Train a run again in a new folder, at most `steps` steps of the same schedule, and compare.

    Raises DamagedError, with both hashes, if the text or the base run has changed; InputError if
    there is nothing to train or to compare, or if the folder cannot be used.
    """
    run_folder.require_new(run_dir)
    admit_run_operations(run, ops, notify)
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
    # A run that ended at its time limit is repeated up to that step, without its last evaluation.
    was_cut = run.history.status == "time" and length < config.train.max_steps
    is_complete = run.history.status in ENDED_STATUSES and end == length and not was_cut
    outcome = launch.train(
        config, compute, run_dir, preset=str(run.record.get("preset", "tiny")), command=command,
        dataset=dataset, stop_at=None if is_complete else end,
        final_windows=_measured_windows(run), notify=notify,
    )  # fmt: skip
    run_report.write_after_training(outcome, notify)
    was_interrupted = outcome.status == "interrupted"
    whole = is_complete and not was_interrupted
    reproduction = compare_runs(run, Run(outcome.run_dir), end, whole=whole)
    if was_interrupted and reproduction.last_step < end:
        return dataclasses.replace(reproduction, interrupted_by=outcome.signal)
    return reproduction


def _measured_windows(run: Run) -> int | None:
    """The windows of the run's final measurement, which a time limit can reduce; None for all."""
    evals = metrics.eval_lines(run.metrics())
    if not evals or evals[-1]["whole"]:
        return None
    tokens = evals[-1]["tokens"]
    if (accuracy := evals[-1].get("accuracy")) is not None:  # the tokens are those of answers alone
        tokens = accuracy["of"] * line_length(run.config.data)
    return math.ceil(tokens / run.config.model.block_size)


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
    data = with_recorded_path(run.config.data, run.record["data"])
    return dataclasses.replace(run.config, train=train, data=data)


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


def compare_runs(run: Run, new_run: Run, end: int, whole: bool) -> Reproduction:
    """Compare two runs up to step `end`; with `whole`, their numbers of lines must be equal too."""
    last_step = min(end, new_run.length)
    old_lines, new_lines = (
        list(
            itertools.takewhile(
                lambda line: line["step"] <= last_step, metrics.comparable_lines(each.metrics())
            )
        )
        for each in (run, new_run)
    )
    notes: list[str] = []
    pairs = []
    for step in sorted({*checkpoint.list_steps(run.path)} & {*checkpoint.list_steps(new_run.path)}):
        if step > last_step:
            continue
        try:
            pairs.append(_compare_checkpoints(run, new_run, step))
        except DamagedError as error:
            notes.append(f"the checkpoint of step {step:,} was not compared: {error}")
    return Reproduction(
        run=run.path,
        new_run=new_run.path,
        steps=end,
        last_step=last_step,
        lines=min(len(old_lines), len(new_lines)),
        n_trained_results=sum(_depends_on_training(line) for line, _ in zip(old_lines, new_lines))
        + sum(pair.step > 0 for pair in pairs),
        first_difference=_first_difference(old_lines, new_lines, whole),
        checkpoints=pairs,
        environment=_different_values(
            recorded_environment(run.record), recorded_environment(new_run.record)
        ),
        notes=notes,
        losses=_loss_differences(old_lines, new_lines),
        kernels=(format_blas(run.record.get("blas")), format_blas(new_run.record.get("blas"))),
    )


def _first_difference(
    old_lines: list[dict[str, Any]], new_lines: list[dict[str, Any]], whole: bool
) -> FirstDifference | None:
    """The first field that differs; with `whole`, the first line that only one run has."""
    for recorded, repeated in zip(old_lines, new_lines):
        for name in (name for name in recorded if name in repeated):  # another version may log more
            if recorded[name] != repeated[name]:
                where = f"{recorded['kind']}: {name}"
                return FirstDifference(recorded["step"], where, recorded[name], repeated[name])
    n_old, n_new = len(old_lines), len(new_lines)
    if whole and n_old != n_new:
        longer = old_lines if n_old > n_new else new_lines
        step = longer[min(n_old, n_new)]["step"]
        return FirstDifference(step, "number of lines", n_old, n_new)
    return None


def _loss_differences(
    old_lines: list[dict[str, Any]], new_lines: list[dict[str, Any]]
) -> list[float]:
    """The relative difference of each loss of both runs; infinite where only one is finite."""
    differences = []
    for recorded, repeated in zip(old_lines, new_lines):
        if _depends_on_training(recorded) and "loss" in recorded and "loss" in repeated:
            a, b = recorded["loss"], repeated["loss"]
            if a is None or b is None:
                differences.append(0.0 if a is b else math.inf)
            else:
                differences.append(abs(a - b) / max(abs(a), 1e-9))
    return differences


def _compare_checkpoints(run: Run, new_run: Run, step: int) -> CheckpointPair:
    recorded, repeated = (checkpoint.load(each.path, step) for each in (run, new_run))
    if all(
        files.file_sha256(recorded.path / name) == files.file_sha256(repeated.path / name)
        for name in ARRAY_FILES
    ):
        return CheckpointPair(step, is_identical=True)
    expected, actual = dict(recorded.state()), dict(repeated.state())
    if unmatched := sorted(expected.keys() ^ actual.keys()):
        return CheckpointPair(
            step, False, float("nan"), f"{unmatched[0]}, which only one of them has"
        )
    differences = {
        name: float(np.abs(array - actual[name]).max()) for name, array in expected.items()
    }
    where = max(differences, key=differences.__getitem__)
    return CheckpointPair(step, False, differences[where], where)


def _different_values(old: dict[str, str], new: dict[str, str]) -> list[tuple[str, str, str]]:
    """(name, recorded value, value of the new run) of the values that differ."""
    rows = [(name, old.get(name, "-"), new.get(name, "-")) for name in dict.fromkeys([*old, *new])]
    return [row for row in rows if row[1] != row[2]]
