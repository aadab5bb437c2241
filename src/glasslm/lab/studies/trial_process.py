"""Runs one trial of a study in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.config.conversion import from_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.lab.studies.checkout import checkout_environment, train_command
from glasslm.training.interruption import SignalEvent


def run_in_subprocess(study: Path, job: dict[str, Any], interrupted: SignalEvent) -> int:
    """Train the run of `job` in a new process and return its exit code; log under logs/.

    When `interrupted` is set, the input of the process is closed: it saves a checkpoint and ends.
    """
    if interrupted.is_set():
        return 128 + signal.SIGTERM
    files.make_folder(study / "logs")
    log = study / "logs" / f"{Path(job['run_dir']).name}.log"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    if job["checkout"]:
        return _run_other_version(log, job, interrupted, environment)
    with (
        open(log, "ab") as out,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "glasslm.lab.studies.worker"],
            stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment, start_new_session=True,
        ) as child,
    ):  # fmt: skip
        assert child.stdin is not None
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.flush()
        while (code := child.poll()) is None:
            if interrupted.wait(0.1) and not child.stdin.closed:
                child.stdin.close()
            elif interrupted.is_set():
                time.sleep(0.1)
        return code


def _run_other_version(
    log: Path, job: dict[str, Any], interrupted: SignalEvent, environment: dict[str, str]
) -> int:
    """Train the run of `job` by `python -m glasslm` of another checkout; return its exit code."""
    config, compute = from_dict(RunConfig, job["config"]), from_dict(ComputeConfig, job["compute"])
    environment |= {"PYTHONPATH": checkout_environment(Path(job["checkout"]))["PYTHONPATH"]}
    with (
        open(log, "ab") as out,
        subprocess.Popen(
            train_command(Path(job["run_dir"]), config, compute),
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment,
            start_new_session=True,
        ) as child,
    ):  # fmt: skip
        if job["core"] is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(child.pid, {job["core"]})
        was_stopped = False
        while (code := child.poll()) is None:
            if interrupted.wait(0.1) and not was_stopped:
                child.terminate()
                was_stopped = True
            elif was_stopped:
                time.sleep(0.1)
        return code
