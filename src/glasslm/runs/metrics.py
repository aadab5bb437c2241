"""metrics.jsonl, out and in: one line of strict JSON for whatever happens during a run.

A line has `kind` and `step`; whatever depends on the clock or on memory is under its `timing`, so that two runs can be
compared line by line. A number that is not finite is null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glasslm import files
from glasslm.errors import DamagedError

Line = dict[str, Any]


class Log:
    """Appends lines to metrics.jsonl; a resumed run first cuts it to the `start_bytes` that its checkpoint remembers.

    >>> with Log(path) as log:
    ...     log.write({"kind": "step", "step": 1, "loss": 4.17, "timing": {"elapsed_s": 0.1}})

    Raises DamagedError when the file is shorter than `start_bytes` or no line ends there, and ExhaustedError when the
    disk is full.
    """

    def __init__(self, path: Path, start_bytes: int = 0) -> None:
        self._file = files.Appender(path, start_bytes)

    @property
    def bytes(self) -> int:
        """The length of the file, for the next checkpoint to remember."""
        return self._file.bytes

    def write(self, line: Line) -> None:
        """Append a line, visible to every reader when this returns."""
        self._file.append(files.json_bytes(plain(line), indent=None))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> Iterator[Line]:
    """The lines of a metrics file, none when there is no file yet.

    A last line that a kill cut short is left out; any other that is no JSON object is a DamagedError with its number.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = files.parse_json(raw)
                if not isinstance(line, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if not raw.endswith(b"\n"):
                    return
                raise DamagedError(f"line {number} of {path} is damaged: {error}") from None
            yield line


def comparable(lines: Iterable[Line]) -> list[Line]:
    """What two equal runs have in common: the step, eval and sample lines without their timing."""
    return [
        {key: value for key, value in line.items() if key != "timing"}
        for line in lines
        if line["kind"] in ("step", "eval", "sample")
    ]


def plain(value: Any) -> Any:
    """`value` as JSON has it: NumPy's numbers and arrays as Python's, what is not finite as None."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
