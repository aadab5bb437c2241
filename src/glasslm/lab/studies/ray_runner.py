"""Runs the trials of a study on a Ray cluster, or on a local Ray.

All machines of a cluster must share the study's folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glasslm.errors import InputError
from glasslm.lab.studies.trial_process import run_in_subprocess
from glasslm.training.interruption import SignalEvent

INTERRUPTED_CODE = 143  # 128 + SIGTERM


@contextmanager
def connect_to_ray(
    address: str | None, threads: int, gpus: int, interrupted: SignalEvent
) -> Iterator[tuple[Callable[[Path, dict[str, Any]], int], int]]:
    """A function that runs a job on the cluster, and how many jobs fit at once.

    `address` is that of the cluster; None is this machine. A job takes `threads` cores and `gpus`
    GPUs. Raises InputError if Ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "--runner ray needs Ray: pip install 'glasslm[ray]', or use --runner local"
        ) from None
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}") from None
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_execute)

    def execute(study: Path, job: dict[str, Any]) -> int:
        if interrupted.is_set():
            return INTERRUPTED_CODE
        task = remote.remote(str(study.absolute()), json.dumps(job))
        is_cancelled = False
        while not ray.wait([task], timeout=0.5)[0]:
            if interrupted.is_set() and not is_cancelled:
                ray.cancel(task)
                is_cancelled = True
        try:
            return int(ray.get(task))
        except (
            ray.exceptions.TaskCancelledError,
            ray.exceptions.RayTaskError,
            ray.exceptions.WorkerCrashedError,
        ):
            time.sleep(0.5)
            return INTERRUPTED_CODE if is_cancelled else 1

    try:
        resources = ray.cluster_resources()
        capacity = resources.get("GPU", 1) / gpus if gpus else resources.get("CPU", 1) / threads
        yield execute, max(1, int(capacity))
    finally:
        ray.shutdown()


def _execute(study: str, job: str) -> int:
    """Run a job on a machine of the cluster.

    Cancelling it closes the input of the run, which saves and ends.
    """
    return run_in_subprocess(Path(study), json.loads(job), SignalEvent())
