"""Memory of a training run: a warning before it starts, an explanation when it runs out."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, EngineName, RunConfig
from glasslm.engines.choice import resolve_micro_batch_size
from glasslm.engines.memory_estimate import (
    memory_saving_flags,
    smaller_settings,
    training_bytes,
)
from glasslm.engines.resources import free_gpu_bytes
from glasslm.errors import ExhaustedError
from glasslm.text import Notify, format_bytes


def warn_of_shortage(
    config: RunConfig, vocab_size: int, compute: ComputeConfig, notify: Notify
) -> None:
    """Warn where training needs more memory than is free, and name flags that need less.

    The warning comes before any allocation: some systems kill a process that takes too much.
    """
    if shortage := find_shortage(config, vocab_size, compute):
        need, room = shortage
        rows = resolve_micro_batch_size(config, compute.engine)
        less = memory_advice(config, vocab_size, compute, rows, room)
        notify(
            f"warning: training is expected to take {format_bytes(need)} of memory, and "
            f"{format_bytes(room)} are free: {less}"
        )


def find_shortage(
    config: RunConfig, vocab_size: int, compute: ComputeConfig
) -> tuple[int, int] | None:
    """The bytes that training needs and those that are free, if it needs more than are free."""
    rows = resolve_micro_batch_size(config, compute.engine)
    need, room = training_bytes(config, vocab_size, compute, rows), available_bytes(compute)
    return None if room is None or need <= room else (need, room)


@contextmanager
def explain_out_of_memory(config: RunConfig, engine: EngineName) -> Iterator[None]:
    """Turn a MemoryError into an ExhaustedError that names the flags that need less."""
    try:
        yield
    except MemoryError:
        rows = resolve_micro_batch_size(config, engine)
        flags = [f"--micro-batch-size to at most {rows // 2}"] if rows > 1 else []
        flags += memory_saving_flags(engine)
        raise ExhaustedError(
            f"out of memory with micro-batches of {rows} x {config.model.block_size} tokens: lower "
            f"{', '.join(flags)}, or choose a smaller model (--d-model, --n-layers)"
        ) from None


def available_bytes(compute: ComputeConfig) -> int | None:
    """Free bytes of the device, or this process's share of the machine's; None where unknown."""
    if compute.device == "cuda":
        return free_gpu_bytes()
    free = free_memory_bytes()
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Free memory: what Linux reports, at most the container's limit.

    On other systems, all physical memory; None where that is unknown.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        names = getattr(os, "sysconf_names", {})  # none on Windows
        return (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if "SC_PHYS_PAGES" in names
            else None
        )
    free = [int(kilobytes) * 1024 for kilobytes in re.findall(r"MemAvailable:\s+(\d+) kB", meminfo)]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # a file of the other cgroup version, or "max"
            free.append(int((root / "sys/fs/cgroup" / limit).read_text(encoding="ascii")))
    return min(free, default=None)


def memory_advice(
    config: RunConfig, vocab_size: int, compute: ComputeConfig, rows: int, room: int
) -> str:
    """The smallest change of flags with which training would fit into `room` bytes, as text."""
    for flags in smaller_settings(config, compute, rows):
        threads = flags.get("threads", compute.threads)
        lower = with_flags(
            config, {name: value for name, value in flags.items() if name != "threads"}
        )
        smaller_compute = dataclasses.replace(compute, threads=threads)
        need = training_bytes(lower, vocab_size, smaller_compute, lower.train.micro_batch_size)
        if need <= room:
            words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
            return f"{words} would take {format_bytes(need)}"
    return "choose a smaller model (--d-model, --n-layers): no smaller micro-batch would fit"


def peak_memory_bytes() -> int | None:
    """Peak memory of this process since its program started; None on Windows.

    Linux counts it as VmHWM. `ru_maxrss` would include the peak of the process that started this
    one, because Linux keeps it over fork and exec.
    """
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if peak_line := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return int(peak_line[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed_memory() -> None:
    """Give the memory of deleted objects back to the system, where the C library can (glibc).

    A large model consists of many small arrays, whose memory the library would keep.
    """
    gc.collect()
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if trim := getattr(library, "malloc_trim", None):
        trim(0)
