"""One run of a study in a process of its own.

`python -m glasslm.lab.studies.worker` reads its job from its input. The process that started the
worker holds the other end of that input. When that process ends, for any reason, the input closes;
the worker then saves a checkpoint and ends as well.
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

from glasslm.config.conversion import from_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.operations import reopen_operations
from glasslm.errors import GlasslmError, InUseError
from glasslm.runs import checkpoint
from glasslm.text import Notify, notify
from glasslm.training import launch
from glasslm.training.outcome import Outcome

MAX_LOCK_WAIT_S = 30.0  # for another process to release the run


def main() -> int:
    """Train or resume the run that the first line of the input describes.

    Returns the exit codes of `glasslm train`.
    """
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    if job["core"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job["core"]})
    path = Path(job["run_dir"])
    config, compute = from_dict(RunConfig, job["config"]), from_dict(ComputeConfig, job["compute"])
    deadline = time.monotonic() + MAX_LOCK_WAIT_S
    while True:
        try:
            return train_or_resume(
                path,
                config,
                compute,
                job["preset"],
                job["command"],
                final_windows=job.get("final_windows"),
            ).exit_code
        except InUseError as error:  # after a study was killed, its run may still be saving
            if time.monotonic() > deadline:
                notify(f"{path}: {error}")
                return error.exit_code
            time.sleep(0.5)
        except GlasslmError as error:
            notify(f"{path}: {error}")
            return error.exit_code
        except MemoryError:
            notify(f"{path}: out of memory")
            return 6


def train_or_resume(
    path: Path,
    config: RunConfig,
    compute: ComputeConfig,
    preset: str,
    command: str,
    notify: Notify = notify,
    *,
    final_windows: int | None = None,
) -> Outcome:
    """Train a new run in `path`, or resume the run there.

    A run without a checkpoint starts again. `final_windows`: of the final measurement, None for the
    whole split.
    """
    reopen_operations(config)
    if checkpoint.list_steps(path):
        return launch.resume(path, compute, notify=notify, ops=config.operations.ops)
    return launch.train(
        config,
        compute,
        path,
        preset=preset,
        command=command,
        final_windows=final_windows,
        notify=notify,
    )


def _end_with_parent() -> None:
    """Send SIGTERM to this process when its input closes: the parent process has ended."""
    sys.stdin.read()
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
