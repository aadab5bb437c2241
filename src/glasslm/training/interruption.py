"""Ctrl-C and SIGTERM as an event that the loop checks between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """An event that SIGINT (Ctrl-C) or SIGTERM sets; a second signal ends the process at once.

    The handlers are installed explicitly: a shell's background job starts with SIGINT ignored.
    """
    event = Interrupt()
    # Signals reach the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous_handlers = {
        which: signal.signal(which, event.receive) for which in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield event
    finally:
        for which, handler in previous_handlers.items():
            signal.signal(which, handler)


class Interrupt(threading.Event):
    """An event that a signal sets; `received` is its number."""

    received: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: sets the event; a second signal ends the process."""
        if self.is_set():
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the live display has hidden the cursor
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        self.set()
