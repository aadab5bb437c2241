"""The trials of a study on a Ray cluster, or on a Ray of this machine; their folder must be one that all share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glasslm.errors import InputError
from glasslm.lab.studies.trial_process import in_a_process
from glasslm.training.interruption import Interrupt


@contextmanager
def connected(
    address: str | None, threads: int, gpus: int, interrupted: Interrupt
) -> Iterator[tuple[Callable[[Path, dict[str, Any]], int], int]]:
    """What executes a job on the cluster at `address` (None: on this machine), and how many it has room for.

    A job takes as many cores as it has threads, and as many GPUs as are asked for.

    Raises InputError where Ray is not installed or no cluster answers.
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
            return 143
        task = remote.remote(str(study.absolute()), json.dumps(job))
        cancelled = False
        while not ray.wait([task], timeout=0.5)[0]:
            if interrupted.is_set() and not cancelled:
                ray.cancel(task)
                cancelled = True
        try:
            return int(ray.get(task))
        except (
            ray.exceptions.TaskCancelledError,
            ray.exceptions.RayTaskError,
            ray.exceptions.WorkerCrashedError,
        ):
            time.sleep(0.5)
            return 143 if cancelled else 1

    try:
        has = ray.cluster_resources()
        room = has.get("GPU", 1) / gpus if gpus else has.get("CPU", 1) / threads
        yield execute, max(1, int(room))
    finally:
        ray.shutdown()


def _execute(study: str, job: str) -> int:
    """On a worker of the cluster. When it is cancelled, the input of the run's process ends, which saves and ends."""
    return in_a_process(Path(study), json.loads(job), Interrupt())
