"""Calls of libraries that return only at their end, made so that the program obeys signals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

_WAIT_S = 0.1  # between two looks for a signal


def run_interruptibly(work: Callable[[], Result], timeout_s: float | None = None) -> Result:
    """The result of `work`, which runs in a thread, so that this thread can obey a signal.

    For calls of libraries that return only at their end. A signal or the timeout abandons the
    thread; it ends with the process. Raises TimeoutError after `timeout_s` seconds.
    """
    if threading.current_thread() is not threading.main_thread() and timeout_s is None:
        return work()  # signals reach the main thread only
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # It is raised again in the thread of the caller.
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True, name="library call")
    thread.start()
    waited_s = 0.0
    while thread.is_alive():
        thread.join(_WAIT_S)
        waited_s += _WAIT_S
        if timeout_s is not None and waited_s > timeout_s and thread.is_alive():
            raise TimeoutError
    return result.result()
