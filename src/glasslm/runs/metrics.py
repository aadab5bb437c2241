"""metrics.jsonl: the types of its lines, its writer and its reader.

A line is one strict JSON object with `kind` and `step`. Values that depend on the clock or on
memory are under `timing`, so that two runs can be compared line by line. A non-finite number is
null.
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
COMPLETED_STATUSES = ("finished", "stopped")  # of a run that reached its end
ENDED_STATUSES = (*COMPLETED_STATUSES, "diverged")  # of a run with no steps left to train


class Timing(TypedDict, total=False):
    """Values that depend on the clock or on memory. Each resume starts the clock at zero."""

    elapsed_s: float
    tokens_per_s: float
    remaining_s: float
    memory_bytes: int | None  # peak of the process so far; None on Windows


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
    auxiliary: NotRequired[dict[str, float]]  # other loss terms by name, without coefficients
    experts: NotRequired[list[list[float]]]  # (layers, E) each expert's share of the choices
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
    stderr: NotRequired[float | None]  # nats per token, of a sample's loss
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
    """A warning for the user."""

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


class MetricsLog:
    """Appends lines to metrics.jsonl, after cutting it to `start_bytes` for a resumed run.

    >>> with MetricsLog(path) as log:
    ...     log.write({"kind": "step", "step": 1, "loss": 4.17, "timing": {"elapsed_s": 0.1}})

    Raises DamagedError when the file is shorter than `start_bytes` or no line ends there, and
    ExhaustedError when the disk is full.
    """

    def __init__(self, path: Path, start_bytes: int = 0) -> None:
        self._file = files.Appender(path, start_bytes)

    @property
    def bytes(self) -> int:
        """The length of the file, which the next checkpoint records."""
        return self._file.bytes

    def write(self, line: Line) -> None:
        """Append a line; it is visible to all readers when this returns."""
        self._file.append(files.json_bytes(to_json_types(line), indent=None))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a metrics file; none where there is no file.

    A last line that was cut short by a kill is left out. Raises DamagedError, with the line number,
    for any other line that is not a JSON object.
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
    """Seconds of training in all parts of a run; each resume restarts the clock of `timing`."""
    earlier_parts = part = 0.0
    for line in lines:
        if line["kind"] == "resume":
            earlier_parts, part = earlier_parts + part, 0.0
        part = max(part, timing_of(line).get("elapsed_s") or 0.0)
    return earlier_parts + part


def comparable_lines(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """The lines that are equal in equal runs: step, eval and sample lines without timing."""
    return [
        {key: value for key, value in line.items() if key != "timing"}
        for line in lines
        if line["kind"] in ("step", "eval", "sample")
    ]


def to_json_types(value: Any) -> Any:
    """`value` with Python numbers and lists for NumPy's, and None for non-finite numbers."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: to_json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_types(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
