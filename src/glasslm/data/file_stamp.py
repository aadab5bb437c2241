"""Detect by size and times, without reading, that another program has changed an open file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


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
