"""Errors for users: each derives from a standard exception and has an exit code.

A message says what happened, what was expected and what to do, in that order.
"""

import errno

# The system has no memory, or this process or the system has no file left to open.
EXHAUSTED_ERRNOS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class GlasslmError(Exception):
    """Base of the errors that are not bugs; the command line prints them without a traceback."""

    exit_code = 1


class InputError(GlasslmError, ValueError):
    """A flag, a file, a prompt or an argument cannot be used."""

    exit_code = 2


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


def raise_if_exhausted(error: OSError, name: object) -> None:
    """Raise ExhaustedError where `error` says that memory or open files ran out, not damage."""
    if error.errno in EXHAUSTED_ERRNOS:
        raise explain_exhaustion(error, name) from error


def explain_exhaustion(error: OSError, name: object) -> ExhaustedError:
    """The ExhaustedError of an error with one of EXHAUSTED_ERRNOS, for the file `name`."""
    cure = (
        "close other programs" if error.errno == errno.ENOMEM else "raise the limit (`ulimit -n`)"
    )
    return ExhaustedError(
        f"{name} cannot be opened ({error.strerror}); it is not damaged: {cure} and try again"
    )
