"""metrics.jsonl: the types of its lines, its writer and its reader.

A line is one strict JSON object with `kind` and `step`. Values that depend on the clock or on
memory are under `timing`, so that two runs can be compared line by line. A non-finite number is
null.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np

from glasslm import files, strict_json
from glasslm.data.file_stamp import read_stamp
from glasslm.errors import DamagedError
from glasslm.runs.typed_json import Count, describe_mismatch

Split = Literal["val", "old", "test"]
Status = Literal["finished", "stopped", "time", "interrupted", "diverged", "failed"]
COMPLETED_STATUSES = ("finished", "stopped", "time")  # of a run that reached its end
ENDED_STATUSES = (*COMPLETED_STATUSES, "diverged")  # of a run with no steps left to train


class Timing(TypedDict, total=False):
    """Values that depend on the clock or on memory. Each resume starts the clock at zero."""

    elapsed_s: float
    tokens_per_s: float
    remaining_s: float
    memory_bytes: Count | None  # peak of the process so far; None on Windows


class PlanLine(TypedDict):
    """The first line of a run."""

    kind: Literal["plan"]
    step: Count
    max_steps: Count


class StepLine(TypedDict):
    """One logged training step."""

    kind: Literal["step"]
    step: Count
    loss: float | None  # nats per token, cross-entropy only
    lr: float
    grad_norm: float | None  # before clipping
    clipped: bool
    tokens: Count  # trained on so far
    epoch: float
    skipped: NotRequired[bool]  # the update was not applied
    auxiliary: NotRequired[Mapping[str, float | None]]  # other terms, without coefficients
    experts: NotRequired[list[list[float | None]]]  # (layers, E) each expert's share of the choices
    preference: NotRequired[Mapping[str, float | None]]  # of DPO or GRPO, before the update
    timing: NotRequired[Timing]


class ProportionFacts(TypedDict):
    """A share with its 95% interval: Wilson's, or Student's for tokens of a suite."""

    count: Count
    of: Count
    share: float
    ci_low: float
    ci_high: float


class EvalLine(TypedDict):
    """One evaluation of a split: "val", or in a fine-tuned run also "old"."""

    kind: Literal["eval"]
    step: Count
    split: NotRequired[Split]  # missing: "val"
    loss: float | None  # nats per token
    perplexity: float | None
    bpb: float | None  # bits per byte
    tokens: Count
    bytes: Count
    whole: bool  # all windows of the split, not a sample of them
    stderr: NotRequired[float | None]  # nats per token, of a sample's loss
    accuracy: NotRequired[ProportionFacts]  # of a synthetic task: held-out answers that are exact
    train_accuracy: NotRequired[ProportionFacts]  # the same of examples of the training text
    preference: NotRequired[Mapping[str, float | None]]  # of DPO or GRPO, on what is held out
    best: bool
    timing: NotRequired[Timing]


class SampleLine(TypedDict):
    """A generated text."""

    kind: Literal["sample"]
    step: Count
    prompt: str
    text: str
    temperature: float
    seed: Count


class CheckpointLine(TypedDict):
    """A checkpoint that is on the disk."""

    kind: Literal["checkpoint"]
    step: Count
    path: str  # inside the run folder
    best: bool
    timing: NotRequired[Timing]


class WarningLine(TypedDict):
    """A warning for the user."""

    kind: Literal["warning"]
    step: Count
    code: str
    message: str


ResumeLine = TypedDict("ResumeLine", {"kind": Literal["resume"], "step": Count, "from": str})


class EndLine(TypedDict):
    """The last line, unless the process was killed."""

    kind: Literal["end"]
    step: Count
    status: Status
    best_step: Count | None
    best_loss: float | None
    sha256: NotRequired[str]  # of all bytes before this line, and of this line without `sha256`


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
END_START = b'{"kind": "end", '  # of the bytes of an end line
LINE_TYPES = {
    "plan": PlanLine,
    "step": StepLine,
    "eval": EvalLine,
    "sample": SampleLine,
    "checkpoint": CheckpointLine,
    "warning": WarningLine,
    "resume": ResumeLine,
    "end": EndLine,
}


class MetricsLog:
    """Appends lines to metrics.jsonl, after cutting it to `start_bytes` for a resumed run.

    >>> with MetricsLog(path) as log:
    ...     log.write({"kind": "step", "step": 1, "loss": 4.17, "timing": {"elapsed_s": 0.1}})

    Raises DamagedError when the file is shorter than `start_bytes`, no line ends there, or what
    stays has another hash than `start_sha256`; ExhaustedError when the disk is full.
    """

    def __init__(self, path: Path, start_bytes: int = 0, start_sha256: str | None = None) -> None:
        self._path = path
        self._digest = hash_prefix(path, start_bytes, start_sha256)
        self._file = files.Appender(path, start_bytes)
        self._stamp = read_stamp(path)

    @property
    def bytes(self) -> int:
        """The length of the file, which the next checkpoint records."""
        return self._file.bytes

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file, which the next checkpoint records."""
        return self._digest.hexdigest()

    def write(self, line: Line) -> None:
        """Append a line; it is visible to all readers when this returns.

        An `end` line gets its `sha256`. Raises DamagedError, and writes nothing, where another
        program has changed the file.
        """
        self.require_unchanged()
        line = to_json_types(line)
        if line["kind"] == "end":
            line["sha256"] = _end_sha256(self._digest, line)
        record = strict_json.json_bytes(line, indent=None)
        self._file.append(record)
        self._digest.update(record)
        self._stamp = read_stamp(self._path)

    def require_unchanged(self) -> None:
        """Raise DamagedError where another process has changed, replaced or removed the file."""
        stamp = read_stamp(self._path)
        if stamp == self._stamp:
            return
        if stamp is None or stamp.inode != (self._stamp and self._stamp.inode):
            raise DamagedError(
                f"{self._path} was removed or replaced while the run trained: put the original "
                "back, then continue with `glasslm resume`"
            )
        if stamp.size != self.bytes or files.file_sha256(self._path) != self.sha256:
            raise DamagedError(
                f"{self._path} was changed by another program while the run trained: restore it "
                "from a copy, then continue with `glasslm resume`"
            )
        self._stamp = stamp  # only its time was changed

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hash_prefix(path: Path, length: int, expected_sha256: str | None = None) -> hashlib._Hash:
    """The SHA-256 object of the first `length` bytes of a metrics file.

    Raises DamagedError where that is not `expected_sha256`; None, in runs of older versions, is not
    compared.
    """
    digest, remaining = hashlib.sha256(), length
    if length and not path.exists():
        raise DamagedError(f"{path} is missing: restore it from a copy")
    if length:
        with open(path, "rb") as file:
            while remaining and (piece := file.read(min(remaining, 1 << 20))):
                digest.update(piece)
                remaining -= len(piece)
    if expected_sha256 is not None and digest.hexdigest() != expected_sha256:
        raise DamagedError(
            f"{path} was altered: the sha256 of its first {length:,} bytes is "
            f"{digest.hexdigest()}, the checkpoint says {expected_sha256}. Restore it from a copy"
        )
    return digest


def require_intact_end(path: Path, is_protected: bool) -> None:
    """Raise DamagedError where the `end` line, or any line before it, was altered.

    `is_protected`: the checkpoints of the run have hashes, so its `end` line must have one. Without
    an end line nothing is compared.
    """
    last, digest = b"", hashlib.sha256()
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if _is_torn(raw):
                break
            if is_protected and last.startswith(END_START):
                raise DamagedError(f"{path} was altered: line {number} follows the end of the run")
            digest.update(last)
            last = raw
    if not last.startswith(END_START):
        return  # the run was killed, or is in training
    try:
        line = strict_json.parse_json(last)
    except ValueError:
        return  # read_lines names it, unless a kill cut it short
    recorded = line.pop("sha256", None)
    if recorded is None and not is_protected:
        return
    actual = _end_sha256(digest, line)
    if recorded != actual or strict_json.json_bytes(line | {"sha256": recorded}, indent=None) != (
        last.rstrip(b"\n") + b"\n"
    ):
        raise DamagedError(
            f"{path} was altered: its sha256 is {actual}, its last line says {recorded}. Restore "
            "it from a copy"
        )


def _end_sha256(digest: hashlib._Hash, line: Any) -> str:
    """The hash of the bytes in `digest` and of the end line without `sha256`."""
    whole = digest.copy()
    whole.update(strict_json.json_bytes(line, indent=None))
    return whole.hexdigest()


def _is_torn(raw: bytes) -> bool:
    """Whether a line may be one that a kill cut short: no whole object stands before its end."""
    try:
        return not raw.endswith(b"\n") and not strict_json.parse_json(raw[:-1])
    except ValueError:
        return True


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a metrics file; none where there is no file.

    A last line that was cut short by a kill is left out. Raises DamagedError, with the line number,
    for any other line that is not a JSON object, or lacks a field of its kind.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = strict_json.parse_json(raw)
                if not isinstance(line, dict):
                    raise ValueError("it is not an object")
            except ValueError as error:
                if _is_torn(raw):
                    return
                raise DamagedError(f"line {number} of {path} is damaged: {error}") from None
            kind = line.get("kind")
            if not isinstance(kind, str) or kind not in LINE_TYPES:
                raise DamagedError(f"line {number} of {path} is damaged: its kind is {kind!r}")
            if error_text := describe_mismatch(line, LINE_TYPES[kind]):
                raise DamagedError(f"line {number} of {path} is damaged: {error_text}")
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
