"""Small texts and small runs, in this process or a child, for tests of loop and commands."""

import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import files, strict_json
from glasslm.config.conversion import from_dict, with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.batch_sampler import BatchSampler
from glasslm.engines.protocol import Update
from glasslm.lab.studies import worker
from glasslm.report import run_report, samples
from glasslm.runs import metrics, provenance, run_folder
from glasslm.training import launch, sample_line, step_timer
from glasslm.training.interruption import SignalEvent
from glasslm.training.loop import Loop
from glasslm.training.outcome import Outcome

SMALL: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 2,
    "block_size": 32,
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_steps": 20,
    "optimizer": "muon",
    "lr": 0.01,
    "warmup_steps": 4,
    "eval_interval": 5,
    "log_interval": 1,
    "sample_interval": 10,
    "checkpoint_interval": 5,
    "keep": 100,
}
COMPUTE = ComputeConfig(threads=1)
HASHES = ("record_sha256", "metrics_sha256")


def write_text(path: Path, sentences: int = 150) -> Path:
    """A few kB of sentences with a grammar that a small model learns within a hundred steps."""
    draw = random.Random(1)
    nouns, verbs = (
        ["the cat", "a dog", "the old king", "my sister"],
        ["sees", "likes", "calls", "follows"],
    )
    lines = [
        f"{draw.choice(nouns)} {draw.choice(verbs)} {draw.choice(nouns)}.\n"
        for _ in range(sentences)
    ]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def small_config(text: Path, **flags: Any) -> RunConfig:
    return with_flags(PRESETS["tiny"](), SMALL | {"text_file": (str(text),)} | flags)


def train(text: Path, run_dir: Path, **flags: Any) -> Outcome:
    with without_report():
        return launch.train(small_config(text, **flags), COMPUTE, run_dir, notify=ignore_message)


def resume(run_dir: Path) -> Outcome:
    with without_report():
        return launch.resume(run_dir, COMPUTE, notify=ignore_message)


def drop_hashes(run_dir: Path) -> Path:
    """Make the run one of an older version, which has no hashes of run.json and metrics.jsonl."""
    for folder in (run_dir / "checkpoints").iterdir():
        state = read_json(folder / "state.json")
        state = {key: state[key] for key in state if key not in HASHES}
        contents = {
            path.name: [path.read_bytes()]
            for path in folder.iterdir()
            if path.name != files.MANIFEST
        }
        files.write_folder(folder, contents | {"state.json": [strict_json.json_bytes(state)]})
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    end = json.loads(lines[-1])
    end.pop("sha256", None)
    lines[-1] = strict_json.json_bytes(end, indent=None)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines))
    return run_dir


@contextmanager
def without_report() -> Iterator[None]:
    """Runs in here end without a report, which takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "write", lambda run_dir, *share: run_dir / "report.html")
        yield


@contextmanager
def noisy_batches(*steps: int, rows: slice = slice(None)) -> Iterator[None]:
    """In these steps (from 1) those rows of the batch are noise, of 18 symbols."""
    right = BatchSampler.batch

    def batch(self: BatchSampler, tokens: Any, step: int, of: Any) -> Any:
        inputs, targets = right(self, tokens, step, of)
        if step + 1 in steps:
            generator = np.random.default_rng(step)
            for array in (inputs, targets):
                array[rows] = generator.integers(0, 18, array[rows].shape)
        return inputs, targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchSampler, "batch", batch)
        yield


def shorten_runs(patch: pytest.MonkeyPatch) -> None:
    """Shorten what takes longer than the steps of a small run.

    A sample during training has 50 tokens, and one in a report 30. A tenth of the sorting is timed
    from which the time of a report follows. Git is asked once about the source.
    """
    ask_git, source, commits = provenance.git, provenance.__file__, list[Any]()

    def known_commit(folder: Path | None = None) -> dict[str, Any] | None:
        if folder is not None or provenance.__file__ != source:
            return ask_git(folder)
        if not commits:
            commits.append(ask_git())
        return copy.copy(commits[0])

    patch.setattr(sample_line, "SAMPLE_TOKENS", 50)
    patch.setattr(samples, "MAX_TOKENS", 30)
    patch.setattr(step_timer, "REPORT_REPETITIONS", step_timer.REPORT_REPETITIONS // 10)
    patch.setattr(step_timer, "REPORT_FACTOR", step_timer.REPORT_FACTOR * 10)
    patch.setattr(provenance, "git", known_commit)


_one_trial_at_a_time = threading.Lock()


def train_trial(study: Path, job: dict[str, Any], interrupted: SignalEvent) -> int:
    """Train the run of `job` as a process of its own would, without the second that it needs.

    A replacement of `sweep.run_in_subprocess`, which threads call side by side.
    """
    config, compute = from_dict(RunConfig, job["config"]), from_dict(ComputeConfig, job["compute"])
    with _one_trial_at_a_time:
        return worker.train_or_resume(
            Path(job["run_dir"]), config, compute, job["preset"], job["command"], ignore_message,
            final_windows=job["final_windows"],
        ).exit_code  # fmt: skip


def ignore_message(message: str) -> None:
    """For `notify`."""


def train_command(text: Path, run_dir: Path, **flags: Any) -> list[str]:
    """The command line of the same small run."""
    given = SMALL | {"text_file": text, "run_dir": run_dir, "threads": 1} | flags
    return [
        "train",
        "--preset",
        "tiny",
        *(
            word
            for key, value in given.items()
            for word in ("--" + key.replace("_", "-"), str(value))
        ),
    ]


def run_program(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program, to its end."""
    process = start_program(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_program(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The program, under way in a child, in which Ctrl-C means what it means in a terminal.

    A job in a shell's background ignores SIGINT and its children inherit that, so it is undone
    here.
    """
    command = [sys.executable, "-m", "glasslm", *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            **{"env": os.environ | {"PYTHONIOENCODING": "utf-8"}, **options},
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60
) -> None:
    """Return as soon as the condition holds.

    Fail when the child ends, or the time is over, before that.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the child ended: {process.communicate()[1]}"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def logged_lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in metrics.jsonl."""
    return [line for line in metrics.read_lines(run_dir / "metrics.jsonl") if line["kind"] == kind]


def comparable_results(run_dir: Path, step: int) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What two equal runs have in common (docs/formats.md).

    The hashes of the last safetensors, and the metrics.
    """
    folder = run_dir / "checkpoints" / f"{step:06d}"
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }
    assert len(hashes) == 2
    return hashes, metrics.comparable_lines(run_folder.Run(run_dir).metrics())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """A real signal, which arrives in the middle of a step."""
    right = Loop.advance

    def advance(self: Loop) -> tuple[float, Update]:
        if self.step + 1 == step:
            signal.raise_signal(number)
        return right(self)

    monkeypatch.setattr(Loop, "advance", advance)
