"""The errors a user can meet. Each is also a standard exception and carries the exit code of the command line.

A message says what was wrong, what was expected and the cure, in that order.
"""


class GlasslmError(Exception):
    """Base of every error that is the world's fault, not a bug; the command line prints it without a traceback."""

    exit_code = 1


class InputError(GlasslmError, ValueError):
    """Something the user gave (a flag, a file, a prompt) cannot be used."""

    exit_code = 2


class DivergedError(GlasslmError, ArithmeticError):
    """Training left the finite numbers and did not come back."""

    exit_code = 3


class DamagedError(GlasslmError, OSError):
    """A file is truncated, altered, missing or belongs to something else."""

    exit_code = 4


class InUseError(GlasslmError, RuntimeError):
    """Another process holds the run folder."""

    exit_code = 5


class ExhaustedError(GlasslmError, OSError):
    """The disk or the memory is full."""

    exit_code = 6


class GroupError(GlasslmError, ConnectionError):
    """A process of the group that computes a run together is gone or does not answer."""


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError unless a setting's `condition` holds."""
    if not condition:  # NaN fails every comparison, so it ends here as well
        raise InputError(f"{name} is {value}: expected {expected}")
