"""Limits of a learner's process: time, memory, processes, sizes of files, network."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, NoReturn

from glasslm.course.isolation.system_calls import refuse_system_calls


@dataclass(frozen=True)
class Limits:
    """What one learner's process may use.

    `cpu_s` and `wall_s` are seconds for all calls together, `memory_bytes` is its address space.
    """

    cpu_s: int = 10
    wall_s: float = 60.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 1 << 20
    processes: int = 64

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)


class CpuTimeError(Exception):
    """The learner's functions have used their CPU time."""


def limit_process(limits: Limits) -> dict[str, bool]:
    """Set the limits of this process. Returns which of them the system keeps.

    Keys: "cpu", "memory", "network" (with it programs and changes of files).
    """
    kept = {"cpu": False, "memory": False}
    if sys.platform != "win32":
        import resource

        def raise_cpu_error(number: int, frame: FrameType | None) -> NoReturn:
            raise CpuTimeError(f"no end within {limits.cpu_s} s of CPU time")

        signal.signal(signal.SIGXCPU, raise_cpu_error)
        used_s = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        end_s = int(used_s) + limits.cpu_s
        # After the soft limit Python raises an error with the line; the hard one kills.
        kept["cpu"] = _limit(resource.RLIMIT_CPU, end_s, end_s + 2)
        kept["memory"] = sys.platform == "linux" and _limit(
            resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes
        )
        _limit(resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes)
        _limit(resource.RLIMIT_CORE, 0, 0)
        with suppress(AttributeError):
            _limit(resource.RLIMIT_NPROC, limits.processes, limits.processes)
    return kept | {"network": refuse_system_calls()}


def hide_standard_streams() -> None:
    """Connect standard input, output and error to nothing: prints cost only their time."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def _limit(kind: int, soft: int, hard: int) -> bool:
    """Set one limit, or a lower one that is in force already. Returns whether it is kept."""
    import resource

    _, highest = resource.getrlimit(kind)
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (ValueError, OSError):
        return False
    return True
