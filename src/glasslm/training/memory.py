"""Whether a run has room in memory: told before it starts, and explained when it had none."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, EngineName, RunConfig
from glasslm.engines.choice import device_free_bytes, micro_batch_size
from glasslm.engines.memory_estimate import training_bytes
from glasslm.errors import ExhaustedError
from glasslm.text import Notify, size


def warn_of_shortage(
    config: RunConfig, vocab_size: int, compute: ComputeConfig, notify: Notify
) -> None:
    """A warning, with the flags that need less, where training is expected to need more memory than there is.

    It comes before anything is taken: some systems end a process that takes too much, without a word.
    """
    rows = micro_batch_size(config, compute.engine)
    need = training_bytes(config, vocab_size, compute, rows)
    room = room_for(compute)
    if room is not None and need > room:
        less = advice(config, vocab_size, compute, rows, room)
        notify(
            f"warning: training is expected to take {size(need)} of memory, and {size(room)} are free: {less}"
        )


@contextmanager
def enough_memory(config: RunConfig, engine: EngineName) -> Iterator[None]:
    """What has no room raises ExhaustedError, with the flags that need less."""
    try:
        yield
    except MemoryError:
        rows = micro_batch_size(config, engine)
        flags = [f"--micro-batch-size to at most {rows // 2}"] if rows > 1 else []
        flags += ["--block-size", "--threads"] if engine == "numpy" else ["--block-size"]
        raise ExhaustedError(
            f"out of memory with micro-batches of {rows} x {config.model.block_size} tokens: lower "
            f"{', '.join(flags)}, or choose a smaller model (--d-model, --n-layers)"
        ) from None


def room_for(compute: ComputeConfig) -> int | None:
    """Free bytes of the device, or this process's part of the machine's; None where the system does not say."""
    if compute.device == "cuda":
        return device_free_bytes()
    free = free_bytes()
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_bytes(root: Path = Path("/")) -> int | None:
    """Memory that is there to be taken: what Linux says, or the limit of the container; elsewhere all, or None."""
    try:
        said = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        names = getattr(os, "sysconf_names", {})  # none on Windows
        return (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if "SC_PHYS_PAGES" in names
            else None
        )
    free = [int(kilobytes) * 1024 for kilobytes in re.findall(r"MemAvailable:\s+(\d+) kB", said)]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # of the other version of cgroups, or "max"
            free.append(int((root / "sys/fs/cgroup" / limit).read_text(encoding="ascii")))
    return min(free, default=None)


def advice(config: RunConfig, vocab_size: int, compute: ComputeConfig, rows: int, room: int) -> str:
    """The flags with which training would fit into `room` bytes, changed as little as can be, in words."""
    for flags in _lowered(config, compute, rows):
        threads = flags.get("threads", compute.threads)
        lower = with_flags(
            config, {name: value for name, value in flags.items() if name != "threads"}
        )
        alone = dataclasses.replace(compute, threads=threads)
        need = training_bytes(lower, vocab_size, alone, lower.train.micro_batch_size)
        if need <= room:
            words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
            return f"{words} would take {size(need)}"
    return "choose a smaller model (--d-model, --n-layers), as no smaller portion of the batch would do"


def _lowered(config: RunConfig, compute: ComputeConfig, rows: int) -> Iterator[dict[str, int]]:
    """Ever smaller flags: micro-batches, then the NumPy engine's threads, then the context."""
    for portion in _halves(rows):
        yield {"micro_batch_size": portion}
    least = {"micro_batch_size": 1}
    if compute.engine == "numpy" and compute.threads > 1:
        least["threads"] = 1
        yield least
    for block_size in _halves(config.model.block_size):
        yield least | {"block_size": block_size}


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number
