"""Whether a run resumes to the bit.

`try_resume` trains a short copy of the run twice in a temporary folder, once to its end and once with a sudden death on
the way, and compares the two.
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
from typing import Any, cast

import numpy as np

from glasslm import files
from glasslm.config.conversion import to_dict
from glasslm.config.schema import ComputeConfig
from glasslm.data import shards
from glasslm.data.shards import Dataset
from glasslm.engines.choice import as_recorded
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Array, Engine
from glasslm.errors import DamagedError
from glasslm.lab.verification.integrity import written
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.checkpoint import Checkpoint
from glasslm.runs.metrics import Log
from glasslm.runs.run_folder import Run
from glasslm.text import Say
from glasslm.training import launch
from glasslm.training.display import Display
from glasslm.training.interruption import interruptible
from glasslm.training.loop import Loop, hashes
from glasslm.training.memory import enough_memory

STEPS, STOPPED_AFTER = (
    12,
    7,
)  # of the copy: in all, and before its sudden death, which follows no save
TORN = b'{"kind": "step", "step": 9, "lo'  # what a line is when a process dies in the middle of it


@dataclass(frozen=True)
class Resumption:
    """What became of the copy that was interrupted, beside the one that was not."""

    engine: str
    precision: str
    begin: int  # the step of the checkpoint that both copies start from
    died: int  # the step after which one of them died
    resumed: int  # the step of the checkpoint that it went on from
    end: int
    entries: int  # weights and moments compared
    difference: float  # the largest of any element of any of them
    where: str  # the entry with that difference
    lines: int  # of metrics.jsonl compared, without their timing
    same_lines: bool
    same_progress: bool  # counters, best and the loop's own memory

    @property
    def passed(self) -> bool:
        return self.difference == 0.0 and self.same_lines and self.same_progress


def try_resume(run_dir: Path, say: Say) -> Resumption:
    """Train on from the latest checkpoint twice, once interrupted, in a temporary folder, and compare the ends.

    The copies have the run's weights, moments, text, dropout, engine, precision and threads, but `STEPS` steps of their
    own at the peak learning rate: the schedule of a finished run is over. Raises DamagedError where there is no whole
    checkpoint, the text is gone, or the copy diverges only where it was interrupted; DivergedError where it diverges by
    itself, so that there is no end to compare; and KeyboardInterrupt, with its number, for a signal.
    """
    run = Run(run_dir)
    dataset = shards.of_run(run.config.data, run.record["data"], run.tokenizer, say)
    latest, arrays = _read_latest(run_dir, say)
    checkpoint.check(latest, **hashes(run, dataset))
    with tempfile.TemporaryDirectory(
        prefix="glasslm-verify-", ignore_cleanup_errors=True
    ) as folder:
        whole, cut = (
            _copy(run, latest, arrays, dataset, Path(folder, name)) for name in ("whole", "cut")
        )
        del arrays
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # the display of a run, which nobody need see
            with _training(whole, dataset) as loop:
                _require_end(loop.run(), loop.signal)
            with _training(cut, dataset) as loop, interruptible() as interrupted:
                while loop.step < latest.step + STOPPED_AFTER or loop.saved_at == loop.step:
                    loop.do_step()
                    if interrupted.is_set():
                        raise KeyboardInterrupt(interrupted.received)
            died, resumed = loop.step, max(checkpoint.list_steps(cut.path))
            _as_a_kill_leaves_it(cut.path)
            outcome = launch.resume(cut.path, _compute(cut)[0], lambda message: None)
        if outcome.status == "diverged":
            raise DamagedError(
                f"of two copies of {run_dir} the one that was resumed diverged, the other did not"
            )
        _require_end(outcome.status, outcome.signal)
        return _compare(whole, cut, latest.step, died, resumed)


def _read_latest(run_dir: Path, say: Say) -> tuple[Checkpoint, dict[str, Array]]:
    """The latest checkpoint with its arrays, in memory: the run, if it goes on, may remove its files at any moment."""
    while True:
        before, warnings = _standing(run_dir), list[str]()
        try:
            latest = checkpoint.load(run_dir, "latest", warnings.append)
            arrays = dict(latest.state())
        except OSError:
            if _standing(run_dir) == before:
                raise
            continue
        if (
            not warnings or _standing(run_dir) == before
        ):  # else it was rotated away, and is not damaged
            for warning in warnings:
                say(warning)
            return latest, arrays


def _standing(run_dir: Path) -> list[object]:
    """Which checkpoints there are now, in which writing."""
    folder = run_dir / checkpoint.FOLDER
    return [(step, written(folder / f"{step:06d}")) for step in checkpoint.list_steps(run_dir)]


def _copy(
    run: Run, latest: Checkpoint, arrays: dict[str, Array], dataset: Dataset, folder: Path
) -> Run:
    """A run that stands where `latest` does and has STEPS more to go."""
    train = dataclasses.replace(
        run.config.train, max_steps=latest.step + STEPS, log_interval=1, eval_interval=STEPS // 2, sample_interval=0,
        checkpoint_interval=STEPS // 3, stop_at_loss=None, patience=None, max_time=None,
    )  # fmt: skip
    optimizer = dataclasses.replace(run.config.optimizer, schedule="constant")
    config = dataclasses.replace(run.config, train=train, optimizer=optimizer)
    record = {name: value for name, value in run.record.items() if name not in ("format", "base")}
    with files.lock(folder):
        run_folder.create(folder, record | {"config": to_dict(config)}, run.tokenizer.to_json())
        if (run.path / checkpoint.BASE).is_dir():
            shutil.copytree(run.path / checkpoint.BASE, folder / checkpoint.BASE)
        with open(run.path / "metrics.jsonl", "rb") as file:
            files.write_atomic(folder / "metrics.jsonl", file.read(latest.progress.metrics_bytes))
        copy = Run(folder)
        memory = {"evaluated_at": latest.step} | latest.progress.loop  # merged: it has none
        memory |= {"measured": False, "safe_at": latest.step}
        # A run that diverged would do so again at once: too few steps follow for the guard to judge by these alone.
        memory["guard"] = memory.get("guard", {}) | {
            "losses": [],
            "norms": [],
            "nonfinite": 0,
            "first_loss": None,
        }
        progress = dataclasses.replace(latest.progress, best=None, loop=memory)
        held = cast(Engine, _Held(arrays, parameter_table(config.model, run.tokenizer.vocab_size)))
        belongs_to: dict[str, Any] = hashes(copy, dataset)
        checkpoint.save(folder, held, progress, keep=train.keep, **belongs_to)
    return copy


@dataclass(frozen=True)
class _Held:
    """An engine as far as a checkpoint to be written knows one."""

    arrays: dict[str, Array]
    rows: ParameterTable

    def state(self) -> Iterator[tuple[str, Array]]:
        return (
            (name, array)
            for name, array in self.arrays.items()
            if "/" in name or self.rows[name].trained
        )


def _compute(run: Run) -> tuple[ComputeConfig, list[str]]:
    """As recorded; a GPU adds in a fixed order, or no two runs would be equal."""
    return as_recorded(ComputeConfig(deterministic=run.record["device"] != "cpu"), run.record)


@contextmanager
def _training(run: Run, dataset: Dataset) -> Iterator[Loop]:
    """The loop from the latest checkpoint; when the block ends it is gone, with nothing saved."""
    start = checkpoint.load(run.path)
    log = Log(run.path / "metrics.jsonl", start.progress.metrics_bytes)
    with enough_memory(run.config, run.record["engine"]), log, Display() as shown:
        engine = make_engine(run.config, run.tokenizer.vocab_size, _compute(run)[0], training=True)
        engine.load(start.state(), start.progress.updates, start.progress.loss_scale)
        yield Loop(run, engine, dataset, log, shown, start.progress)


def _require_end(status: str, signal: int | None) -> None:
    if status != "finished":  # nothing but a signal ends it early
        raise KeyboardInterrupt(signal)


def _as_a_kill_leaves_it(run_dir: Path) -> None:
    """Half a line of metrics, and half a checkpoint."""
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(TORN)
    half = run_dir / checkpoint.FOLDER / "999999.tmp-1"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")


def _compare(whole: Run, cut: Run, begin: int, died: int, resumed: int) -> Resumption:
    one, other = (checkpoint.load(run.path) for run in (whole, cut))
    expected, found = dict(one.state()), dict(other.state())
    assert expected.keys() == found.keys()
    differences = {
        name: float(np.abs(array - found[name]).max()) for name, array in expected.items()
    }
    where = max(differences, key=differences.__getitem__)
    lines, same = (metrics.comparable(run.metrics()) for run in (whole, cut))
    one_at, other_at = (
        dataclasses.replace(held.progress, metrics_bytes=0) for held in (one, other)
    )
    return Resumption(
        engine=whole.record["engine"],
        precision=whole.record["precision"],
        begin=begin,
        died=died,
        resumed=resumed,
        end=one.step,
        entries=len(expected),
        difference=differences[where],
        where=where,
        lines=sum(line["step"] > begin for line in lines),
        same_lines=lines == same,
        same_progress=one_at == other_at,
    )
