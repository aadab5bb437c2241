"""One line a request on standard error, without the text of the request.

A thread of its own writes the lines, so that a terminal or a pipe that is slow delays no request.
"""

from __future__ import annotations

import queue
import threading

from glasslm.text import notify, to_one_line

MAX_LINES = 1000  # that wait to be written; more are dropped and counted
_STOP_S = 1.0


class RequestLog:
    """Writes lines in the background; `close` writes what is left."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._n_dropped = 0
        self._thread = threading.Thread(target=self._write, name="request-log", daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        """Write a line, with control characters escaped; drop it where too many wait."""
        try:
            self._lines.put_nowait(to_one_line(line, max_chars=400))
        except queue.Full:
            self._n_dropped += 1

    def close(self) -> None:
        """Write the waiting lines, for at most a second."""
        try:
            self._lines.put(None, timeout=_STOP_S)
        except queue.Full:
            return
        self._thread.join(_STOP_S)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            notify(line)
            if self._n_dropped and self._lines.empty():
                notify(f"{self._n_dropped:,} lines of this log were dropped: it is read too slowly")
                self._n_dropped = 0
