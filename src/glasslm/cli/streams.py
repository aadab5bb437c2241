"""The standard streams of the program: closed, full, or without a reader."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


def open_standard_streams() -> None:
    """Open the streams that were closed at the start on the null device.

    Otherwise the next file that is opened would get the number of such a stream, and messages of a
    library would be written into it. Messages that standard error cannot take are dropped.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    elif os.name == "posix" and hasattr(sys.stderr, "buffer"):
        sys.stderr = io.TextIOWrapper(
            _DroppingWriter(sys.stderr),
            encoding=sys.stderr.encoding,
            errors="replace",
            line_buffering=True,
            write_through=True,
        )


class _DroppingWriter(io.RawIOBase):
    """Writes to a stream, and drops what it does not take: a full device, a closed terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        """Write all bytes of `data`, or drop those that cannot be written."""
        unwritten = memoryview(data).cast("B")
        size = len(unwritten)
        with suppress(OSError):
            while unwritten:
                unwritten = unwritten[os.write(self._stream.fileno(), unwritten) :]
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


def discard_output() -> None:
    """Redirect a standard output that cannot be written to the null device.

    Otherwise Python would write the rest again at its exit, and fail.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # ValueError: a stream without a descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def output_error() -> OSError | None:
    """The reason why standard output cannot be written; None if it can."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    return None
