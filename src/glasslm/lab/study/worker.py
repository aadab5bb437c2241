"""One run of a study, in a process of its own: `python -m glasslm.lab.study.worker` reads its task from its input.

The process that started it holds the other end of that input. When it goes away, however it ends, this one notices,
saves a checkpoint and ends as well.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from glasslm import launch
from glasslm.config import ComputeConfig, RunConfig
from glasslm.errors import GlasslmError
from glasslm.runs import Run
from glasslm.settings import from_dict


def main() -> int:
    """Train, or go on with, the run that the first line of the input describes; the exit codes are those of `train`."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    if job["core"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job["core"]})
    compute, path = from_dict(ComputeConfig, job["compute"]), Path(job["run_dir"])
    try:
        if (path / "run.json").exists():
            outcome = launch.resume(path, compute, page=False)
        else:
            config = from_dict(RunConfig, job["config"])
            outcome = launch.train(config, compute, path, preset=job["preset"], command=job["command"], page=False)
    except GlasslmError as error:
        print(f"{Run(path)}: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        return 6
    return outcome.exit_code


def _end_with_parent() -> None:
    """The input ends when the parent does, and there is nothing more to read before."""
    sys.stdin.read()
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
