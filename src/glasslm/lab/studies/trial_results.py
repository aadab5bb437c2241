"""What came of one run of a study, read from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glasslm.lab.studies.sweep import Ended
from glasslm.runs.metrics import Line
from glasslm.runs.run_folder import Run


@dataclass(frozen=True)
class Row:
    """One run."""

    seed: int
    status: str
    final_loss: float | None  # nats per token of validation; None where the run diverged or failed
    best_loss: float | None
    bpb: float | None
    wall_s: float
    step_ms: float | None
    peak_bytes: int | None
    sample: str
    run: Run
    why: str = ""  # it failed


def row(seed: int, ended: Ended) -> Row:
    """What came of a run; a diverged one has no loss, whatever it had before."""
    lines = [] if ended.status == "failed" else list(ended.run.metrics())
    evals = [line for line in lines if line["kind"] == "eval" and line["split"] == "val"]
    sound = ended.status != "diverged" and bool(evals)
    last = max(evals, key=lambda line: line["step"]) if sound else {}
    if sound:
        last = [line for line in evals if line["step"] == last["step"]][
            -1
        ]  # measured again, on the whole split
    best = ended.run.history.best_val_loss if sound else None
    steps = [line for line in lines if line["kind"] == "step"]
    speeds = sorted(line["timing"]["tokens_per_s"] for line in steps)
    step_tokens = (
        ended.run.config.train.batch_size * ended.run.config.model.block_size if steps else 0
    )
    memory = [line["timing"]["memory_bytes"] for line in steps if line["timing"]["memory_bytes"]]
    samples = [line["text"] for line in lines if line["kind"] == "sample"]
    return Row(
        seed, ended.status, last.get("loss"), best, last.get("bpb"),
        wall_s=_seconds(lines),
        step_ms=1e3 * step_tokens / speeds[len(speeds) // 2] if speeds else None,
        peak_bytes=max(memory, default=None), sample=samples[-1] if samples else "", run=ended.run, why=ended.why,
    )  # fmt: skip


def _seconds(lines: Sequence[Line]) -> float:
    """What the run took; its clock begins again whenever it goes on."""
    pieces = [0.0]
    for line in lines:
        if line["kind"] == "resume":
            pieces.append(0.0)
        elif line.get("timing"):
            pieces[-1] = max(pieces[-1], line["timing"]["elapsed_s"])
    return sum(pieces)
