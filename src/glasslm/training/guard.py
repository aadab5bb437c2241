"""What a run's numbers are judged by: what is not finite, spikes, losses that have left for good, text learnt by heart.

The guard judges and words its warnings; what becomes of a step is the loop's business. Its memory is a part of each
checkpoint, so that a resumed run is judged like one that never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import RunConfig
from glasslm.engines.inspection import GRADIENT, backward_names, forward_names
from glasslm.engines.protocol import Batch, Engine, Update
from glasslm.errors import DivergedError
from glasslm.model.parameters import parameter_table
from glasslm.runs.checkpoint import Best
from glasslm.runs.metrics import plain

Verdict = Literal["fine", "spike", "nonfinite"]

NONFINITE_LIMIT = 10  # steps in a row: nothing will change any more
WINDOW = 128  # finite values before a step, that it is compared with
DEVIATIONS = 6.0  # standard deviations above their mean
ENOUGH = WINDOW // 2  # fewer values say nothing yet
EVEN = 1e-3  # of the mean: the least standard deviation, or a loss that stands still would spike by rounding
HOPELESS = 1.0  # nats above what the run began with, and above guessing
RISEN, EVALUATIONS = (
    0.01,
    3,
)  # of the best validation loss, and how many in a row: learning by heart


class Limits(NamedTuple):
    """Above these a step is a spike: infinite while too few values are known."""

    loss: float
    norm: float


NO_LIMITS = Limits(math.inf, math.inf)


class Guard:
    """The training losses and gradient norms of the last steps, and what was seen of the run before."""

    def __init__(
        self, config: RunConfig, vocab_size: int, memory: dict[str, Any] | None = None
    ) -> None:
        memory = memory or {}
        self.config, self.vocab_size = config, vocab_size
        self.losses = deque[float](memory.get("losses", ()), maxlen=WINDOW)
        self.norms = deque[float](memory.get("norms", ()), maxlen=WINDOW)
        self.nonfinite: int = memory.get("nonfinite", 0)  # steps in a row
        self.first_loss: float | None = memory.get("first_loss")  # of validation
        self.loss_at_best: float | None = memory.get("loss_at_best")  # the mean training loss then
        self.by_heart: bool = memory.get("by_heart", False)  # told already

    @property
    def memory(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "nonfinite": self.nonfinite,
            "first_loss": self.first_loss,
            "loss_at_best": self.loss_at_best,
            "by_heart": self.by_heart,
        }

    @property
    def limits(self) -> Limits:
        """What the next step is compared with."""
        return Limits(limit(self.losses), limit(self.norms))

    def judge(self, step: int, loss: float, update: Update, limits: Limits) -> Verdict:
        """The verdict on a step, which is remembered. Raises DivergedError where no run comes back from."""
        fine = math.isfinite(loss) and update.finite
        self.nonfinite = 0 if fine else self.nonfinite + 1
        if self.nonfinite >= NONFINITE_LIMIT:
            raise DivergedError(
                f"the losses or gradients of {NONFINITE_LIMIT} steps in a row, up to step {step}, are not finite: "
                + self._cure
            )
        for value, window in ((loss, self.losses), (update.norm, self.norms)):
            if math.isfinite(value):  # another one would make every later value look small
                window.append(value)
        if len(self.losses) >= ENOUGH:
            self._require_hope(
                step, self.recent_loss, f"the mean training loss of the last {ENOUGH} steps"
            )
        if not fine:
            return "nonfinite"
        return "spike" if loss > limits.loss or math.inf > update.norm > limits.norm else "fine"

    def evaluated(
        self, step: int, loss: float, best: Best | None, evaluations: int, last: bool
    ) -> str | None:
        """Remember a validation loss, `evaluations` after the best; a warning where the text is learnt by heart.

        Raises DivergedError where the `last` one is hopeless.
        """
        recent, before = self.recent_loss, self.loss_at_best
        if self.first_loss is None:
            self.first_loss = loss if math.isfinite(loss) else 0.0
        if best is not None and best.step == step:
            self.loss_at_best = plain(recent)
        if last:
            self._require_hope(step, loss, "the validation loss")
        risen = best is not None and evaluations >= EVALUATIONS and loss > (1 + RISEN) * best.loss
        if self.by_heart or before is None or not risen or not recent < before:
            return None
        assert best is not None
        self.by_heart = True
        return (
            f"the validation loss is {loss:.4f}, {loss - best.loss:.4f} above its best of step {best.step} and not "
            f"better for {evaluations} evaluations, while the training loss fell from {before:.4f} to {recent:.4f}: "
            "the model learns its text by heart. More text or --dropout helps, and --patience stops in time"
        )

    @property
    def recent_loss(self) -> float:
        """The mean training loss of the last steps; NaN before the first."""
        recent = list(self.losses)[-ENOUGH:]
        return math.fsum(recent) / len(recent) if recent else math.nan

    def _require_hope(self, step: int, loss: float, what: str) -> None:
        if loss > HOPELESS + max(self.first_loss or 0.0, math.log(self.vocab_size)):
            raise DivergedError(
                f"{what} is {loss:.3g} at step {step}, by more than a nat worse than guessing and than at the start: "
                + self._cure
            )

    @property
    def _cure(self) -> str:
        optimizer = self.config.optimizer
        return (
            f"lower --lr (now {optimizer.lr:g}), lengthen --warmup-steps (now {optimizer.warmup_steps}), or ask "
            "`glasslm diagnose` with the same flags"
        )

    def nonfinite_text(self, engine: Engine, batch: Batch) -> str:
        """A warning that names the first layer whose numbers are not finite."""
        first = self._first_nonfinite(engine, batch)
        found = (
            f"{first} is the first that is not"
            if first
            else "computed once more, without dropout, all of it is"
        )
        return (
            f"what step {batch.step + 1} computes is not finite, and the step was skipped: {found}"
        )

    def _first_nonfinite(self, engine: Engine, batch: Batch) -> str | None:
        """The first in a pass forward and back over `batch` that holds NaN or infinity; each micro-batch by itself."""
        c = self.config.model
        forward = [
            name for name in forward_names(c) if not name.endswith(".scores")
        ]  # -inf hides keys there
        for names in (forward, backward_names(c, parameter_table(c, self.vocab_size))):
            for part in batch.parts(engine.micro_batch_size):
                seen = engine.inspect(part, names)
                for name in names:
                    if not np.isfinite(seen[name]).all():
                        return (
                            f"the gradient of {name.removeprefix(GRADIENT)}"
                            if name.startswith(GRADIENT)
                            else name
                        )
        return None


def limit(values: Iterable[float]) -> float:
    """The mean of `values` and 6 standard deviations, or infinity where they are too few.

    The rule of OLMo-core's SkipStepOptimizer, over the 128 values before.
    """
    window = np.fromiter(values, float)
    if len(window) < ENOUGH:
        return math.inf
    return float(limit_of(window))


def limit_of(windows: NDArray[np.float64], deviations: float = DEVIATIONS) -> NDArray[np.float64]:
    """The same of each of the windows (..., N), however short they are."""
    mean = windows.mean(-1)
    limits: NDArray[np.float64] = mean + deviations * np.maximum(
        windows.std(-1, ddof=1), EVEN * np.abs(mean)
    )
    return limits


def spike_text(step: int, loss: float, norm: float, limits: Limits, done: str) -> str:
    if loss > limits.loss:
        seen = f"the loss of step {step} is {loss:.4f}, more than {limits.loss:.4f}"
    else:
        seen = f"the gradient norm of step {step} is {norm:.4g}, more than {limits.norm:.4g}"
    return f"{seen} ({DEVIATIONS:g} deviations over the last {WINDOW}){done}. See `glasslm diagnose RUN --replay {step}`"
