"""Errors for users: each derives from a standard exception and has an exit code.

A message says what happened, what was expected and what to do, in that order.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
# The system has no memory, or this process or the system has no file left to open.
EXHAUSTED_ERRNOS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE} | DISK_FULL_ERRNOS


class GlasslmError(Exception):
    """Base of the errors that are not bugs; the command line prints them without a traceback."""

    exit_code = 1


class InputError(GlasslmError, ValueError):
    """A flag, a file, a prompt or an argument cannot be used."""

    exit_code = 2


class CompilerError(InputError):
    """torch.compile fails on this machine, for a `reason` in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"torch.compile does not work here ({reason}): use --compile off, or fix the compiler"
        )
        self.reason = reason


class DivergedError(GlasslmError, ArithmeticError):
    """Training diverged: its values are not finite, or far above a random guess."""

    exit_code = 3


class DamagedError(GlasslmError, OSError):
    """A file is truncated, altered or missing, or belongs to another run."""

    exit_code = 4


class InUseError(GlasslmError, RuntimeError):
    """Another process holds the run folder."""

    exit_code = 5


class ExhaustedError(GlasslmError, OSError):
    """The disk or the memory is full, or too many files are open."""

    exit_code = 6


class GroupError(GlasslmError, ConnectionError):
    """A process of a distributed run ended or does not answer."""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError with the name, value and expectation unless `condition` holds."""
    if not condition:  # NaN fails every comparison
        raise InputError(f"{name} is {value}: expected {expected}")


@contextmanager
def explain_system_errors(
    name: object, explain: Callable[[str], GlasslmError], *kinds: type[Exception]
) -> Iterator[None]:
    """Raise `explain(reason)` where the system fails in the block, for the file `name`.

    `kinds` are further errors that mean the same, such as those of a library. Errors of glasslm
    and MemoryError pass. Memory, open files or a disk that ran out are an ExhaustedError, never bad
    input or damage.
    """
    caught: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except (GlasslmError, MemoryError):
        raise
    except caught as error:
        raise_if_exhausted(error, name)
        raise explain(getattr(error, "strerror", None) or str(error)) from error


def raise_if_exhausted(error: BaseException, name: object) -> None:
    """Raise ExhaustedError where `error`, or a cause of it, says that a resource ran out."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ExhaustedError | MemoryError):
            raise cause
        if isinstance(cause, OSError) and cause.errno in EXHAUSTED_ERRNOS:
            raise explain_exhaustion(cause, name) from error
        cause = cause.__cause__ or cause.__context__


def explain_exhaustion(error: OSError, name: object) -> ExhaustedError:
    """The ExhaustedError of an error with one of EXHAUSTED_ERRNOS, for the file `name`."""
    if error.errno in DISK_FULL_ERRNOS:
        return ExhaustedError(f"no room to write {name} ({error.strerror}): free some space")
    cure = (
        "close other programs" if error.errno == errno.ENOMEM else "raise the limit (`ulimit -n`)"
    )
    return ExhaustedError(
        f"{name} cannot be opened ({error.strerror}); it is not damaged: {cure} and try again"
    )
