"""Outcome: how a run ended, for the report and the summary."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path

from glasslm.runs.history import best_eval
from glasslm.runs.metrics import EvalLine, SampleLine, Status, sample_lines
from glasslm.runs.run_folder import Run


@dataclass(frozen=True)
class Outcome:
    """The result of a run. `status` is that of the last line of metrics.jsonl."""

    run_dir: Path
    status: Status
    signal: int | None  # the signal that interrupted the run
    best: EvalLine | None  # the evaluation with the best validation loss
    sample: SampleLine | None  # the last sample
    elapsed_s: float  # seconds
    samples_s: float = math.inf  # seconds of --max-time that are left for the report's samples

    @property
    def exit_code(self) -> int:
        """The exit code of a process that only trained."""
        return {"diverged": 3, "interrupted": 128 + (self.signal or signal.SIGINT)}.get(
            self.status, 0
        )


def make_outcome(
    run: Run,
    status: Status,
    signal_number: int | None,
    elapsed_s: float,
    samples_s: float = math.inf,
) -> Outcome:
    """The outcome of a run that has ended, with its best evaluation and its last sample."""
    lines = list(run.metrics())
    return Outcome(
        run_dir=run.path,
        status=status,
        signal=signal_number,
        best=best_eval(lines, run.history),
        sample=next(reversed(sample_lines(lines)), None),
        elapsed_s=elapsed_s,
        samples_s=samples_s,
    )
