"""Call a library in a thread, so that the program obeys signals before the call returns.

The tokenizers library computes in Rust, whose panics are no subclass of Exception in Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from glasslm.errors import GlasslmError, InputError, raise_if_exhausted

Result = TypeVar("Result")

_WAIT_S = 0.1  # between two looks for a signal


def run_interruptibly(
    work: Callable[[], Result],
    timeout_s: float | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Result:
    """The result of `work`, which runs in a thread, so that this thread can obey a signal.

    A signal, the timeout, or an exception of `check_interrupt`, which is called meanwhile, abandons
    the thread; it ends with the process. Raises TimeoutError after `timeout_s` seconds.
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
        check_interrupt()
        if timeout_s is not None and waited_s > timeout_s and thread.is_alive():
            raise TimeoutError
    return result.result()


def call_tokenizers(
    work: Callable[[], Result], failure: str, timeout_s: float | None = None
) -> Result:
    """The result of a call of the tokenizers library, interruptibly.

    Raises InputError, which begins with `failure`, where the library raises a bare Exception or
    panics, or after `timeout_s` seconds.
    """
    try:
        return run_interruptibly(work, timeout_s)
    except TimeoutError:
        raise InputError(f"{failure}: it takes more than {timeout_s:.0f} seconds") from None
    except (GlasslmError, MemoryError):
        raise
    except Exception as error:  # The library raises bare Exceptions.
        raise_if_exhausted(error, "a file of the tokenizers library")
        raise InputError(f"{failure}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{failure}: {error}") from None
