"""metrics.jsonl: the types of its lines, its writer and its reader.

A line is one strict JSON object with `kind` and `step`; whatever depends on the clock or on memory is under `timing`, so
that two runs can be compared line by line. A number that is not finite is null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np

from glasslm import files
from glasslm.errors import DamagedError

Split = Literal["val", "old", "test"]
Status = Literal["finished", "stopped", "interrupted", "diverged", "failed"]


class Timing(TypedDict, total=False):
    """What depends on the clock or on memory. The clock starts again at zero with each resume."""

    elapsed_s: float
    tokens_per_s: float
    remaining_s: float
    memory_bytes: int | None  # peak of the process so far; None where the system does not tell


class PlanLine(TypedDict):
    """The first line of a run."""

    kind: Literal["plan"]
    step: int
    max_steps: int


class StepLine(TypedDict):
    """One logged training step."""

    kind: Literal["step"]
    step: int
    loss: float | None  # nats per token, cross-entropy only
    lr: float
    grad_norm: float | None  # before clipping
    clipped: bool
    tokens: int  # trained on so far
    epoch: float
    skipped: NotRequired[bool]  # the update was not applied
    auxiliary: NotRequired[
        dict[str, float]
    ]  # further loss terms by name, without their coefficients
    experts: NotRequired[list[list[float]]]  # (layers, E) share of the choices that each expert got
    timing: NotRequired[Timing]


class EvalLine(TypedDict):
    """One evaluation of a split: "val", or in a fine-tuned run also "old"."""

    kind: Literal["eval"]
    step: int
    split: NotRequired[Split]  # missing: "val"
    loss: float | None  # nats per token
    perplexity: float | None
    bpb: float | None  # bits per byte
    tokens: int
    bytes: int
    whole: bool  # all windows of the split, not a sample of them
    best: bool
    timing: NotRequired[Timing]


class SampleLine(TypedDict):
    """A generated text."""

    kind: Literal["sample"]
    step: int
    prompt: str
    text: str
    temperature: float
    seed: int


class CheckpointLine(TypedDict):
    """A checkpoint that is on the disk."""

    kind: Literal["checkpoint"]
    step: int
    path: str  # inside the run folder
    best: bool
    timing: NotRequired[Timing]


class WarningLine(TypedDict):
    """Something a person should read."""

    kind: Literal["warning"]
    step: int
    code: str
    message: str


ResumeLine = TypedDict("ResumeLine", {"kind": Literal["resume"], "step": int, "from": str})


class EndLine(TypedDict):
    """The last line, unless the process was killed."""

    kind: Literal["end"]
    step: int
    status: Status
    best_step: int | None
    best_loss: float | None


Line = (
    PlanLine
    | StepLine
    | EvalLine
    | SampleLine
    | CheckpointLine
    | WarningLine
    | ResumeLine
    | EndLine
)


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
            yield cast(Line, line)


def step_lines(lines: Iterable[Line]) -> list[StepLine]:
    """The logged steps."""
    return [line for line in lines if line["kind"] == "step"]


def eval_lines(lines: Iterable[Line], split: Split | None = "val") -> list[EvalLine]:
    """The evaluations of a split; None takes all splits."""
    evals = [line for line in lines if line["kind"] == "eval"]
    return [line for line in evals if split in (None, line.get("split", "val"))]


def sample_lines(lines: Iterable[Line]) -> list[SampleLine]:
    """The generated samples."""
    return [line for line in lines if line["kind"] == "sample"]


def warning_lines(lines: Iterable[Line]) -> list[WarningLine]:
    """The warnings."""
    return [line for line in lines if line["kind"] == "warning"]


def timing_of(line: Line) -> Timing:
    """The timing of a line; empty where it has none."""
    return cast(Timing, line.get("timing") or {})


def elapsed_s(lines: Iterable[Line]) -> float:
    """Seconds of training in all parts of a run: the clock of `timing` restarts with each resume."""
    earlier_parts = part = 0.0
    for line in lines:
        if line["kind"] == "resume":
            earlier_parts, part = earlier_parts + part, 0.0
        part = max(part, timing_of(line).get("elapsed_s") or 0.0)
    return earlier_parts + part


def comparable(lines: Iterable[Line]) -> list[dict[str, Any]]:
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
