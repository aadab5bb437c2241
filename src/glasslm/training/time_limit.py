"""TimeLimit: the end of --max-time while the speed of the machine changes.

The number of steps was fixed by the speed of the first moments (step_timer.py). If the machine gets
slower, the final measurement is shortened first; then the steps end early, with the status "time".
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from glasslm.training.evaluation_windows import FINAL_PASSES
from glasslm.training.step_timer import StepTimer, report_seconds

PAGE_SHARE = 0.5  # of the time for the report: its figures and pages
RECENT_STEPS = 9  # whose median is the present speed
Part = Literal["evaluation", "sample", "checkpoint", "report"]


class OutOfTime(Exception):
    """The final measurement takes longer than the time that is left for it."""


class TimeLimit:
    """The time that is left, and how long the end of the run takes at the present speed.

    Times are seconds of time.perf_counter. `parts_s` are the parts that follow the last step, at
    the speed that `timer` was measured at: first its values, then what the loop measured.
    """

    def __init__(self, timer: StepTimer, started: float, budget_s: float = math.inf) -> None:
        """Without `budget_s` there is no limit."""
        self.ends_at = started + budget_s
        self.timer = timer
        self.parts_s: dict[Part, float] = {
            "sample": timer.sample,
            "checkpoint": timer.checkpoint,
            "report": report_seconds(timer, budget_s),
        }
        self._recent_steps_s = deque[float](maxlen=RECENT_STEPS)

    @property
    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.ends_at - time.perf_counter()

    @property
    def slowdown(self) -> float:
        """The present time of a step in multiples of the measured one; at least 1."""
        if not self._recent_steps_s:
            return 1.0
        return max(1.0, statistics.median(self._recent_steps_s) / self.timer.step)

    def record_step(self, seconds: float) -> None:
        """Record the time of a training step."""
        self._recent_steps_s.append(seconds)

    def measure(self, part: Part, work: Callable[[], object]) -> None:
        """Do a part of the run and record its time."""
        start = time.perf_counter()
        work()
        self.parts_s[part] = (time.perf_counter() - start) / self.slowdown

    def has_time_for_step(self) -> bool:
        """Whether one more step and the end of the run fit; true before the first step."""
        if not self._recent_steps_s:
            return True
        end_s = self.timer.step + sum(self.parts_s.values()) + self.parts_s["checkpoint"]
        return self.slowdown * end_s <= self.left_s

    def describe_stop(self, step: int, max_steps: int) -> str:
        """The warning about a run that ends at the limit, after `step`."""
        return (
            f"--max-time ends training after step {step:,} of {max_steps:,}: the machine is slower "
            "now than when its speed was measured. The learning rate has not reached its end"
        )

    def fit_windows(self, n_windows: int) -> int:
        """As many of `n_windows` windows as a final measurement has time for."""
        if self.left_s == math.inf:
            return n_windows
        seconds = FINAL_PASSES * self.timer.window * self.slowdown
        return min(n_windows, max(0, int(self._measurable_s() / seconds)))

    def require_time(self) -> None:
        """Raise OutOfTime when the final measurement must end for the limit to hold."""
        if self._measurable_s() <= 0:
            raise OutOfTime

    def samples_s(self) -> float:
        """The seconds that are left for what the model generates for the report."""
        return self.left_s - PAGE_SHARE * self.slowdown * self.parts_s["report"]

    def _measurable_s(self) -> float:
        """The seconds that are left for a final measurement, before a checkpoint and the report."""
        reserved_s = self.parts_s["checkpoint"] + self.parts_s["report"]
        return self.left_s - self.slowdown * reserved_s


def no_limit() -> TimeLimit:
    """The limit of a run that ends by its number of steps."""
    return TimeLimit(StepTimer(step=1.0, window=1.0, sample=0.0, checkpoint=0.0), 0.0)
