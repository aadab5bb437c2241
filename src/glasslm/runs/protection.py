"""The protection of run.json, tokenizer.json and metrics.jsonl by hashes.

The state.json of each checkpoint, which its manifest covers, has the hash of run.json and of the
lines of metrics.jsonl before it. The last line of a run that ended has the hash of all of
metrics.jsonl. Runs of older versions lack these, and only their config, tokenizer and text are
compared. Commands open runs with `open_run`; `resume` and `verify` compare the hashes themselves.
"""

from __future__ import annotations

import os

from glasslm.errors import DamagedError
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.checkpoint import Checkpoint
from glasslm.runs.run_folder import Run

UNPROTECTED = "not protected by a hash: an older glasslm wrote it"


def open_run(name_or_path: str | os.PathLike[str], *, with_log: bool = False) -> Run:
    """The run with this path, or with this name under ./runs, if it is unaltered.

    Raises InputError where there is none, and DamagedError as `require_unaltered` does.
    """
    run = Run(run_folder.find_run(name_or_path))
    require_unaltered(run, with_log=with_log)
    return run


def require_unaltered(run: Run, *, with_log: bool = True) -> None:
    """Raise DamagedError, with both hashes, where the run is not as it was written.

    run.json and tokenizer.json, and metrics.jsonl if `with_log`, are compared with the hashes in
    the newest checkpoint whose state.json is intact; its weights are not read.
    """
    newest = newest_position(run)
    if newest is not None:
        _ = run.record  # it refuses a file of gigabytes, which would take seconds to hash
        checkpoint.require_record(newest, run.record_sha256)
        checkpoint.require_identity(newest, run.identity)  # older runs have no hash of run.json
    if with_log:
        require_unaltered_log(run, [newest] if newest else [])


def require_unaltered_log(run: Run, checkpoints: list[Checkpoint]) -> bool:
    """Raise DamagedError where metrics.jsonl is not as these intact checkpoints say.

    Returns whether one of them has a hash of it.
    """
    path = run.path / "metrics.jsonl"
    for saved in checkpoints:  # in older runs without a hash, so that only a missing log is found
        metrics.hash_prefix(path, *saved.position.metrics_position)
    is_protected = any(saved.position.metrics_sha256 is not None for saved in checkpoints)
    if path.exists():
        metrics.require_intact_end(path, is_protected)
    return is_protected


def describe_protection(run: Run, checkpoints: list[Checkpoint]) -> str:
    """How much of metrics.jsonl has the hashes that the run wrote; raises as the check does."""
    if not require_unaltered_log(run, checkpoints):
        return UNPROTECTED if checkpoints else "not protected before the first checkpoint"
    if run.history.status is not None:
        return "sha256 as in its last line"
    length = max(saved.position.metrics_bytes for saved in checkpoints)
    return f"sha256 of the first {length:,} bytes as in the checkpoints; a resume drops the rest"


def newest_position(run: Run) -> Checkpoint | None:
    """The newest checkpoint whose state.json is intact; None where there is none."""
    for step in reversed(checkpoint.list_steps(run.path)):
        try:
            return checkpoint.load_position(run.path, step)
        except (DamagedError, FileNotFoundError):  # a run in training may remove it meanwhile
            continue
    return None
