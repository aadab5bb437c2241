"""Errors for users: each derives from a standard exception and has an exit code.

A message says what happened, what was expected and what to do, in that order.
"""


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
    """The disk or the memory is full."""

    exit_code = 6


class GroupError(GlasslmError, ConnectionError):
    """A process of a distributed run ended or does not answer."""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError with the name, value and expectation unless `condition` holds."""
    if not condition:  # NaN fails every comparison
        raise InputError(f"{name} is {value}: expected {expected}")
