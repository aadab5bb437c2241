"""Errors of a learner's process, raised here with the learner's line."""

from __future__ import annotations

import builtins
from types import CodeType
from typing import Any, NoReturn

from glasslm.course.isolation.process_limits import CpuTimeError
from glasslm.course.isolation.wire import WireError

MAX_LINE = 1 << 20


class LearnerStopped(BaseException):
    """The learner's process has ended before its answer: out of time, killed, or crashed.

    No Exception: code that judges a function catches all exceptions of the function, and must not
    go on with one whose process is gone.
    """


def raise_remote_error(description: dict[str, Any], file: str) -> NoReturn:
    """Raise an error of a learner's process here, in a frame of the learner's file and line.

    Its class has the same name as there and the same built-in base. Raises LearnerStopped where
    the CPU time is used up.
    """
    try:
        line = max(0, min(int(description["line"]), MAX_LINE))
        message = str(description["message"])
        base = getattr(builtins, str(description["base"]), Exception)
        name = str(description["type"])
    except (KeyError, TypeError, ValueError):
        raise WireError("not an error") from None
    if name == CpuTimeError.__name__:
        raise LearnerStopped(f"line {line}: {message}" if line else message)
    if not (isinstance(base, type) and issubclass(base, Exception)):
        base = Exception
    kind = base if base.__name__ == name else type(name, (base,), {})
    try:
        error = kind(message)
    except TypeError:  # UnicodeDecodeError, for one, takes five arguments
        error = type(name, (Exception,), {})(message)
    if line:
        exec(_raise_at_line(file, line), {"error": error})
    raise error


def _raise_at_line(file: str, line: int) -> CodeType:
    """Code of the learner's file that raises `error` at a line, so that tracebacks show it."""
    return compile("\n" * (line - 1) + "raise error", file, "exec")
