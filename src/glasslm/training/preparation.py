"""Preparation: the time before the first step, by stage, and the refusal of a short --max-time.

The refusal comes after the stage that leaves no time for one step and the end of the run, without
waiting for the stages that follow.
"""

from __future__ import annotations

import math
import time

from glasslm.config.training_config import TrainConfig
from glasslm.config.units import parse_duration
from glasslm.errors import InputError
from glasslm.text import format_duration

TOLERANCE = 0.1  # share of --max-time by which a run may outlast it


class Preparation:
    """The stages before the first step, with their seconds of time.perf_counter."""

    def __init__(self, started: float, train: TrainConfig) -> None:
        self.started = started
        self.max_time = train.max_time if train.epochs is None else None
        self._stages_s: dict[str, float] = {}

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def stages(self) -> str:
        """The stages that took a second or more, the longest first: "reading the text 12s"."""
        ordered = sorted(self._stages_s.items(), key=lambda stage: -stage[1])
        return ", ".join(f"{name} {format_duration(s)}" for name, s in ordered if s >= 1)

    def end_stage(self, name: str, rest_s: float = 0.0) -> None:
        """Add the time since the last call to stage `name`, and check that `rest_s` seconds fit.

        `rest_s` is what one step and the end of the run take at least, as far as it is known.
        Raises InputError if --max-time does not allow it.
        """
        spent_s = self.spent_s
        since_s = spent_s - sum(self._stages_s.values())
        self._stages_s[name] = self._stages_s.get(name, 0.0) + since_s
        if self.max_time is None:
            return
        if spent_s + rest_s > (1 + TOLERANCE) * parse_duration(self.max_time):
            message = explain_refusal(self.max_time, spent_s, rest_s, self.stages, "at least ")
            raise InputError(message)


def explain_refusal(
    max_time: str, spent_s: float, run_s: float, stages: str, estimate: str = "about "
) -> str:
    """The message about a time that does not allow one step, which takes `run_s` seconds."""
    needed_s = math.ceil(1.2 * (spent_s + run_s)) + 1  # speed varies
    took = f" ({stages})" if stages else ""
    return (
        f"--max-time {max_time} is too short for one step: preparing took "
        f"{format_duration(spent_s)}{took}, and one step with its evaluations takes {estimate}"
        f"{format_duration(max(1, run_s))}.\nGive --max-time {format_duration(needed_s)} or more, "
        "or a smaller model. A text is tokenized only once, so the next start is faster"
    )
