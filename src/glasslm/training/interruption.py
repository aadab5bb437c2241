"""Signals that end a program: an event that a loop checks, or KeyboardInterrupt with a number.

SIGHUP (a closed terminal), SIGUSR1 and SIGXCPU (schedulers) mean the same as SIGINT (Ctrl-C) and
SIGTERM. Windows has only the last two.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
INTERRUPT_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_REPEAT_S = 0.05  # until a signal that was lost in a callback is raised again


class Interruption(Exception):
    """A signal came before the end of an evaluation or of a sample."""


class SignalEvent(threading.Event):
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

    def check(self) -> None:
        """Raise Interruption if the event is set."""
        if self.is_set():
            raise Interruption


@contextmanager
def catch_signals() -> Iterator[SignalEvent]:
    """An event that a signal sets; a second signal ends the process at once."""
    event = SignalEvent()
    with _install_handler(event.receive):
        yield event


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt with the number of the signal for each signal in the block.

    Python drops an exception in the callback of a weak reference; the signal is then raised again.
    """
    previous_hook = sys.unraisablehook

    def repeat_lost_signal(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            previous_hook(dropped)
            return
        number = signal_number(dropped.exc_value)
        timer = threading.Timer(_REPEAT_S, signal.raise_signal, [number])
        timer.daemon = True
        timer.start()

    sys.unraisablehook = repeat_lost_signal
    try:
        with _install_handler(_raise_interrupt):
            yield
    finally:
        sys.unraisablehook = previous_hook


def signal_number(interrupt: KeyboardInterrupt) -> int:
    """The number of the signal that raised `interrupt`; SIGINT where it does not say."""
    number = interrupt.args[0] if interrupt.args else None
    return number if isinstance(number, int) else signal.SIGINT


def pass_on_signal(number: int | None, message: str = "") -> NoReturn:
    """Give a signal that a run has obeyed to the program: it ends, or gets KeyboardInterrupt."""
    if number is not None and number != signal.SIGINT:
        signal.raise_signal(number)
    raise KeyboardInterrupt(message or number or signal.SIGINT)


def _raise_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(number)


@contextmanager
def _install_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` receive the signals in the block, if this is the main thread.

    It is installed explicitly: a shell's background job starts with SIGINT ignored. A SIGHUP that
    is ignored (nohup) and other signals that the program ignores stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # it never receives a signal
        yield
        return
    previous_handlers = {
        number: signal.signal(number, handler)
        for number in INTERRUPT_SIGNALS
        if number in (signal.SIGINT, signal.SIGTERM)
        or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)
