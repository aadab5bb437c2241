"""A test of exact resume.

`try_resume` trains a short copy of the run twice in a temporary folder: once to its end, and once
with a simulated kill and a resume. Then it compares the two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glasslm import files
from glasslm.config.conversion import to_dict
from glasslm.config.schema import ComputeConfig
from glasslm.data.dataset import Dataset
from glasslm.engines.choice import compute_from_record
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Array
from glasslm.errors import DamagedError
from glasslm.lab.verification.integrity import manifest_stamp
from glasslm.model.parameters import parameter_table
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.checkpoint import Checkpoint
from glasslm.runs.metrics import MetricsLog
from glasslm.runs.recorded_operations import RECORDED, admit_run_operations
from glasslm.runs.run_folder import Run
from glasslm.runs.run_lock import lock_run
from glasslm.text import Notify
from glasslm.training import launch
from glasslm.training.display import Display
from glasslm.training.interruption import catch_signals
from glasslm.training.loop import Loop
from glasslm.training.loop_state import LoopState
from glasslm.training.memory import explain_out_of_memory

COPY_STEPS = 12  # steps of each copy
MIN_STEPS_BEFORE_KILL = 7  # the kill comes after these, at a step without a checkpoint
PARTIAL_LINE = b'{"kind": "step", "step": 9, "lo'  # what a kill during a write leaves
# Keys of `glasslm verify --resume --json`, and the fields
STEP_KEYS = {"begin": "start_step", "died": "killed_at_step", "resumed": "resumed_from_step"}


@dataclass(frozen=True)
class Resumption:
    """The comparison of the copy that was killed and resumed with the copy that was not."""

    engine: str
    precision: str
    start_step: int  # the step of the checkpoint that both copies start from
    killed_at_step: int  # the step after which one of them was killed
    resumed_from_step: int  # the step of the checkpoint that it was resumed from
    end: int
    entries: int  # weights and moments compared
    difference: float  # the largest absolute difference of any element
    where: str  # the entry with that difference
    lines: int  # lines of metrics.jsonl compared, without their timing
    same_lines: bool
    same_progress: bool  # counters, best and the state of the loop

    @property
    def passed(self) -> bool:
        return self.difference == 0.0 and self.same_lines and self.same_progress

    @property
    def facts(self) -> dict[str, Any]:
        """The same for JSON, whose keys for the three steps are older than the fields."""
        facts = dataclasses.asdict(self) | {"passed": self.passed}
        for key, name in STEP_KEYS.items():
            facts[key] = facts.pop(name)
        return facts


def try_resume(run_dir: Path, notify: Notify, ops: str = "") -> Resumption:
    """Train twice from the latest checkpoint in a temporary folder, once with a kill, and compare.

    The copies have the run's weights, moments, text, dropout, engine, precision and threads. They
    train COPY_STEPS steps at the peak learning rate, because the schedule of a finished run is
    over.

    Raises DamagedError if no checkpoint is intact, if the text is missing, or if only the resumed
    copy diverges; DivergedError if the other copy diverges, so that there is nothing to compare;
    and KeyboardInterrupt, with the number of the signal, for a signal.
    """
    run = Run(run_dir)
    admit_run_operations(run, ops, notify)
    dataset = run.dataset(notify)
    latest, arrays = _read_latest(run_dir, notify)
    checkpoint.require_identity(latest, run.identity)
    with tempfile.TemporaryDirectory(
        prefix="glasslm-verify-", ignore_cleanup_errors=True
    ) as folder:
        whole, cut = (
            _create_short_run(run, latest, arrays, Path(folder, name)) for name in ("whole", "cut")
        )
        del arrays
        with contextlib.redirect_stderr(io.StringIO()):  # hides the display of the copies
            with _training(whole, dataset) as loop:
                _require_end(loop.run(), loop.signal)
            with _training(cut, dataset) as loop, catch_signals() as interrupt:
                while loop.step < latest.step + MIN_STEPS_BEFORE_KILL or loop.saved_at == loop.step:
                    loop.do_step()
                    if interrupt.is_set():
                        raise KeyboardInterrupt(interrupt.received)
            killed_at_step, resumed_from_step = loop.step, max(checkpoint.list_steps(cut.path))
            _simulate_kill(cut.path)
            recorded = RECORDED if run.config.operations.ops else ""
            outcome = launch.resume(cut.path, _compute(cut)[0], lambda message: None, ops=recorded)
        if outcome.status == "diverged":
            raise DamagedError(
                f"of two copies of {run_dir}, the resumed one diverged and the other did not"
            )
        _require_end(outcome.status, outcome.signal)
        return _compare(whole, cut, latest.step, killed_at_step, resumed_from_step)


def _read_latest(run_dir: Path, notify: Notify) -> tuple[Checkpoint, dict[str, Array]]:
    """The latest checkpoint with its arrays in memory: a run in progress may remove its files."""
    while True:
        before, warnings = _checkpoint_stamps(run_dir), list[str]()
        try:
            latest = checkpoint.load(run_dir, "latest", warnings.append)
            arrays = dict(latest.state())
        except OSError:
            if _checkpoint_stamps(run_dir) == before:
                raise
            continue
        # A checkpoint that was removed meanwhile is not damaged.
        if not warnings or _checkpoint_stamps(run_dir) == before:
            for warning in warnings:
                notify(warning)
            return latest, arrays


def _checkpoint_stamps(run_dir: Path) -> list[object]:
    """The present checkpoints, each with the stamp of its manifest."""
    folder = run_dir / checkpoint.FOLDER
    return [
        (step, manifest_stamp(folder / f"{step:06d}")) for step in checkpoint.list_steps(run_dir)
    ]


def _create_short_run(run: Run, latest: Checkpoint, arrays: dict[str, Array], folder: Path) -> Run:
    """A run in `folder` at the checkpoint `latest`, with COPY_STEPS steps to go."""
    train = dataclasses.replace(
        run.config.train,
        max_steps=latest.step + COPY_STEPS,
        log_interval=1,
        eval_interval=COPY_STEPS // 2,
        sample_interval=0,
        checkpoint_interval=COPY_STEPS // 3,
        stop_at_loss=None,
        patience=None,
        max_time=None,
    )
    optimizer = dataclasses.replace(run.config.optimizer, schedule="constant")
    config = dataclasses.replace(run.config, train=train, optimizer=optimizer)
    record = {name: value for name, value in run.record.items() if name not in ("format", "base")}
    table = parameter_table(config.model, run.tokenizer.vocab_size)
    with lock_run(folder):
        run_folder.create_run(folder, record | {"config": to_dict(config)}, run.tokenizer.to_json())
        if (run.path / checkpoint.BASE).is_dir():
            shutil.copytree(run.path / checkpoint.BASE, folder / checkpoint.BASE)
        elif config.preference.is_active and "merged_from" in run.record:
            # A merge leaves no first weights: the copies are tuned from the merged ones.
            weights = {name: array for name, array in arrays.items() if name in table}
            checkpoint.save_base(folder, weights)
        with open(run.path / "metrics.jsonl", "rb") as file:
            files.write_atomic(folder / "metrics.jsonl", file.read(latest.position.metrics_bytes))
        copy = Run(folder)
        loop = _copy_loop_state(latest)
        position = dataclasses.replace(latest.position, best=None, loop=loop.to_json())
        state = [
            (name, array) for name, array in arrays.items() if "/" in name or table[name].trained
        ]
        checkpoint.save(folder, state, position, copy.identity, keep=train.keep)
    return copy


def _copy_loop_state(latest: Checkpoint) -> LoopState:
    """The state of the loop from which the copies start."""
    state = LoopState.from_json(latest.position.loop)
    return dataclasses.replace(
        state,
        # A merged run has no state of a loop.
        evaluated_at=latest.step if state.evaluated_at < 0 else state.evaluated_at,
        full_split_measured=False,
        rollback_step=latest.step,
        # Without its history the guard cannot end the copy of a diverged run: too few steps follow.
        guard=dataclasses.replace(state.guard, losses=(), norms=(), nonfinite=0, first_loss=None),
    )


def _compute(run: Run) -> tuple[ComputeConfig, list[str]]:
    """The recorded compute config; on a GPU also deterministic, or equal runs would differ."""
    return compute_from_record(
        ComputeConfig(deterministic=run.record["device"] != "cpu"), run.record
    )


@contextmanager
def _training(run: Run, dataset: Dataset) -> Iterator[Loop]:
    """The loop from the latest checkpoint; the end of the block saves nothing."""
    start = checkpoint.load(run.path)
    log = MetricsLog(run.path / "metrics.jsonl", *start.position.metrics_position)
    with explain_out_of_memory(run.config, run.record["engine"]), log, Display() as display:
        engine = make_engine(run.config, run.tokenizer.vocab_size, _compute(run)[0], training=True)
        engine.load(start.state(), start.position.updates, start.position.loss_scale)
        yield Loop(run, engine, dataset, log, display, start.position)


def _require_end(status: str, signal: int | None) -> None:
    """Raise KeyboardInterrupt if a signal ended the training early."""
    if status != "finished":  # only a signal ends it early
        raise KeyboardInterrupt(signal)


def _simulate_kill(run_dir: Path) -> None:
    """Leave half a line of metrics and half a checkpoint, as a kill may."""
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(PARTIAL_LINE)
    half = run_dir / checkpoint.FOLDER / "999999.tmp-1"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")


def _compare(
    whole: Run, cut: Run, start_step: int, killed_at_step: int, resumed_from_step: int
) -> Resumption:
    """Compare the last checkpoints and the metrics of both copies."""
    whole_end, cut_end = (checkpoint.load(run.path) for run in (whole, cut))
    expected, actual = dict(whole_end.state()), dict(cut_end.state())
    assert expected.keys() == actual.keys()
    differences = {
        name: float(np.abs(array - actual[name]).max()) for name, array in expected.items()
    }
    where = max(differences, key=differences.__getitem__)
    whole_lines, cut_lines = (metrics.comparable_lines(run.metrics()) for run in (whole, cut))
    whole_progress, cut_progress = (
        dataclasses.replace(end.position, metrics_bytes=0, metrics_sha256=None)
        for end in (whole_end, cut_end)
    )
    return Resumption(
        engine=whole.record["engine"],
        precision=whole.record["precision"],
        start_step=start_step,
        killed_at_step=killed_at_step,
        resumed_from_step=resumed_from_step,
        end=whole_end.step,
        entries=len(expected),
        difference=differences[where],
        where=where,
        lines=sum(line["step"] > start_step for line in whole_lines),
        same_lines=whole_lines == cut_lines,
        same_progress=whole_progress == cut_progress,
    )
