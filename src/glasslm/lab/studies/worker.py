"""One run of a study, in a process of its own: `python -m glasslm.lab.studies.worker` reads its task from its input.

The process that started it holds the other end of that input. When it goes away, however it ends, this one notices,
saves a checkpoint and ends as well.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.config.conversion import from_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.errors import GlasslmError, InUseError
from glasslm.runs import checkpoint, run_folder
from glasslm.training import launch
from glasslm.training.launch import Outcome

WAITS_S = 30.0  # for another process to give the run back


def main() -> int:
    """Train, or go on with, the run that the first line of the input describes; the exit codes are those of `train`."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    if job["core"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job["core"]})
    path = Path(job["run_dir"])
    patience = time.monotonic() + WAITS_S
    while True:
        try:
            return _run(job, path).exit_code
        except InUseError as error:  # of a study that was killed, the run may still be saving
            if time.monotonic() > patience:
                print(f"{path}: {error}", file=sys.stderr)
                return error.exit_code
            time.sleep(0.5)
        except GlasslmError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return error.exit_code
        except MemoryError:
            print(f"{path}: out of memory", file=sys.stderr)
            return 6


def _run(job: dict[str, Any], path: Path) -> Outcome:
    compute = from_dict(ComputeConfig, job["compute"])
    if (path / "run.json").exists() and not checkpoint.list_steps(path):
        with files.lock(path):
            run_folder.clear(path)
    if (path / "run.json").exists():
        return launch.resume(path, compute)
    config = from_dict(RunConfig, job["config"])
    return launch.train(config, compute, path, preset=job["preset"], command=job["command"])


def _end_with_parent() -> None:
    """The input ends when the parent does, and there is nothing more to read before."""
    sys.stdin.read()
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
