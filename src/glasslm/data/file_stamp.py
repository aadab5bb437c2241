"""Detect by size and times, without reading, that another program has changed an open file."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from glasslm.errors import DamagedError


class FileStamp(NamedTuple):
    """Inode, size in bytes and time of the last change (ns) of a file or folder."""

    inode: int
    size: int
    modified_ns: int


def read_stamp(path: Path) -> FileStamp | None:
    """The stamp of the file or folder `path`; None where it is missing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return FileStamp(status.st_ino, status.st_size, status.st_mtime_ns)


def require_uncut(tokens: NDArray[Any]) -> None:
    """Raise DamagedError where the file that `tokens`, any array, maps is shorter than the map.

    The system kills a process that reads behind the end of a mapped file (SIGBUS).
    """
    mapping = getattr(tokens, "_mmap", None)
    if isinstance(mapping, mmap.mmap) and mapping.size() < len(mapping):
        raise DamagedError(
            f"the tokens in the cache were cut from {len(mapping):,} to {mapping.size():,} bytes "
            "while they were in use: start the command again, `glasslm resume` for a run; it makes "
            "them again"
        )
