"""The lock of a run folder, which one process holds, and the record of its holder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from glasslm import files
from glasslm.errors import InputError, InUseError, raise_if_exhausted

LOCK_FILE = "run.lock"
# Windows locks the first byte of the file, even for other handles of the holder. So that byte is a
# space that is never read, and it is written on other systems only.
_LOCKED_BYTES = 1


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Lock a run folder, created where needed, for this process; the lock ends with the process.

    Temporary files of dead processes are removed from it. Raises InUseError with the holder's
    process, machine and start time, and InputError when the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    files.make_folder(run_dir)
    file_lock = FileLock(run_dir / LOCK_FILE)
    try:
        # The timeout gives the winner of a race time to write its name.
        file_lock.acquire(timeout=0.2, poll_interval=0.05)
    except Timeout:
        raise InUseError(
            f"{run_dir} is in use by {_read_holder(run_dir / LOCK_FILE)}: wait until it ends, or "
            "choose another --run-dir"
        ) from None
    except OSError as error:
        raise_if_exhausted(error, run_dir)
        raise InputError(
            f"{run_dir} cannot be written ({error.strerror}): choose another --run-dir"
        ) from error
    try:
        _write_holder(run_dir / LOCK_FILE)
        files.remove_leftovers(run_dir)
        files.remove_leftovers(run_dir / "checkpoints")
        yield
    finally:
        file_lock.release()


def _write_holder(path: Path) -> None:
    start = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "start": start}
    text = b" " * _LOCKED_BYTES + json.dumps(holder).encode() + b"\n"
    files.overwrite(path, text, start=_LOCKED_BYTES if os.name == "nt" else 0)


def _read_holder(path: Path) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(_LOCKED_BYTES)
            holder = json.loads(file.read(4096))
            return f"process {holder['pid']} on {holder['host']}, which started {holder['start']}"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has not written its name yet
        return "another process"
