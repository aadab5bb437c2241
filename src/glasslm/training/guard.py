"""Judge the numbers of a run: non-finite values, loss spikes, divergence and overfitting.

The guard returns verdicts and words the warnings; the loop acts on them. The guard's state is part
of each checkpoint, so that a resumed run is judged like an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import RunConfig
from glasslm.engines.inspection import GRADIENT_PREFIX, backward_names, forward_names
from glasslm.engines.protocol import Batch, Engine, Update
from glasslm.errors import DivergedError
from glasslm.model.parameters import parameter_table
from glasslm.runs.checkpoint import Best
from glasslm.runs.metrics import to_json_types
from glasslm.runs.typed_json import Count

Verdict = Literal["fine", "spike", "nonfinite"]

MAX_NONFINITE_STEPS = 10  # in a row; then the run has diverged
WINDOW_STEPS = 128  # finite values before a step that it is compared with
SPIKE_DEVIATIONS = 6.0  # standard deviations above the window's mean
MIN_HISTORY = WINDOW_STEPS // 2  # values; with fewer, nothing is a spike
MIN_RELATIVE_STD = 1e-3  # of the mean; without it, rounding would make a constant loss spike
DIVERGENCE_RISE = 1.0  # nats above the first validation loss and above a uniform guess
OVERFIT_RISE = 0.01  # of the best validation loss
OVERFIT_EVALUATIONS = 3  # in a row without a better loss

# The key in state.json that differs from the name of its field.
JSON_KEYS = {"warned_overfit": "by_heart"}


class Limits(NamedTuple):
    """A step above one of these is a spike. Infinite while the history is too short."""

    loss: float  # nats per token
    norm: float  # of the gradient


NO_LIMITS = Limits(math.inf, math.inf)


class GuardRecord(TypedDict, total=False):
    """The value of `guard` in state.json. Older runs lack some fields."""

    losses: list[float]
    norms: list[float]
    nonfinite: Count
    first_loss: float | None
    loss_at_best: float | None
    by_heart: bool


@dataclass(frozen=True)
class GuardState:
    """The part of the guard's state that a checkpoint stores."""

    losses: tuple[float, ...] = ()  # training losses of the last WINDOW_STEPS finite steps
    norms: tuple[float, ...] = ()  # gradient norms, likewise
    nonfinite: int = 0  # non-finite steps in a row
    first_loss: float | None = None  # the first validation loss
    loss_at_best: float | None = None  # mean training loss at the best validation loss
    warned_overfit: bool = False  # the overfitting warning was given

    def to_json(self) -> dict[str, Any]:
        """The value of `guard` in state.json."""
        values = dataclasses.asdict(self)
        return {JSON_KEYS.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GuardState:
        """The state in a checkpoint; fields that an older run lacks take their defaults."""
        names = {key: name for name, key in JSON_KEYS.items()}
        known = GuardRecord.__annotations__
        fields = {names.get(key, key): value for key, value in values.items() if key in known}
        lists = {name: tuple(values.get(name, ())) for name in ("losses", "norms")}
        return cls(**{**fields, **lists})


INITIAL_STATE = GuardState()


class Guard:
    """The recent training losses and gradient norms, and the rules that judge them."""

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        state: GuardState = INITIAL_STATE,
    ) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.losses = deque[float](state.losses, maxlen=WINDOW_STEPS)
        self.norms = deque[float](state.norms, maxlen=WINDOW_STEPS)
        self.nonfinite = state.nonfinite
        self.first_loss = state.first_loss
        self.loss_at_best = state.loss_at_best
        self.warned_overfit = state.warned_overfit

    @property
    def state(self) -> GuardState:
        """The state for the next checkpoint."""
        return GuardState(
            losses=tuple(self.losses),
            norms=tuple(self.norms),
            nonfinite=self.nonfinite,
            first_loss=self.first_loss,
            loss_at_best=self.loss_at_best,
            warned_overfit=self.warned_overfit,
        )

    @property
    def limits(self) -> Limits:
        """The limits that the next step is compared with."""
        return Limits(spike_limit(self.losses), spike_limit(self.norms))

    def judge_step(self, step: int, loss: float, update: Update, limits: Limits) -> Verdict:
        """Record a step and return the verdict on it. Raises DivergedError."""
        is_finite = math.isfinite(loss) and update.finite
        self.nonfinite = 0 if is_finite else self.nonfinite + 1
        if self.nonfinite >= MAX_NONFINITE_STEPS:
            raise DivergedError(
                f"training diverged: {MAX_NONFINITE_STEPS} non-finite losses or gradients in a "
                f"row, up to step {step}: {self._cure}"
            )
        for value, window in ((loss, self.losses), (update.norm, self.norms)):
            if math.isfinite(value):  # an infinite one would hide all later spikes
                window.append(value)
        if len(self.losses) >= MIN_HISTORY:
            measure = f"the mean loss of the last {MIN_HISTORY} steps"
            self._require_no_divergence(step, self.recent_loss, measure)
        if not is_finite:
            return "nonfinite"
        is_spike = loss > limits.loss or math.inf > update.norm > limits.norm
        return "spike" if is_spike else "fine"

    def record_evaluation(
        self, step: int, loss: float, best: Best | None, evaluations_since_best: int, is_last: bool
    ) -> str | None:
        """Record a validation loss; returns a warning where the run overfits.

        Raises DivergedError where the last validation loss shows divergence.
        """
        recent_loss, loss_at_best = self.recent_loss, self.loss_at_best
        if self.first_loss is None:
            self.first_loss = loss if math.isfinite(loss) else 0.0
        if best is not None and best.step == step:
            self.loss_at_best = to_json_types(recent_loss)
        if is_last and not self._fits_its_training_text:
            self._require_no_divergence(step, loss, "the validation loss")
        has_risen = (
            best is not None
            and evaluations_since_best >= OVERFIT_EVALUATIONS
            and loss > (1 + OVERFIT_RISE) * best.loss
        )
        if self.warned_overfit or loss_at_best is None or not has_risen:
            return None
        if not recent_loss < loss_at_best:
            return None
        assert best is not None
        self.warned_overfit = True
        is_tuned = self.config.preference.is_active
        remedy = "a larger --kl or --beta" if is_tuned else "more text or --dropout"
        return (
            f"overfitting: the validation loss is {loss:.4f}, {loss - best.loss:.4f} above its "
            f"best of step {best.step} and not better for {evaluations_since_best} evaluations, "
            f"while the training loss fell from {loss_at_best:.4f} to {recent_loss:.4f}. Use "
            f"{remedy}; --patience stops in time"
        )

    @property
    def _fits_its_training_text(self) -> bool:
        """Whether the last training losses are below the start: a high validation loss is then
        that of a memorized text, which `record_evaluation` warns of."""
        newest = list(self.losses)[-MAX_NONFINITE_STEPS:]
        return bool(newest) and max(newest) < (self.first_loss or 0.0)

    @property
    def recent_loss(self) -> float:
        """The mean of the last MIN_HISTORY training losses; NaN before the first step."""
        recent = list(self.losses)[-MIN_HISTORY:]
        return math.fsum(recent) / len(recent) if recent else math.nan

    def _require_no_divergence(self, step: int, loss: float, measure: str) -> None:
        reference = max(self.first_loss or 0.0, math.log(self.vocab_size))
        if loss > DIVERGENCE_RISE + reference:
            raise DivergedError(
                f"training diverged at step {step}: {measure} is {loss:.3g}, over a nat above the "
                f"start and a uniform guess: {self._cure}"
            )

    @property
    def _cure(self) -> str:
        optimizer = self.config.optimizer
        return (
            f"lower --lr (now {optimizer.lr:g}), lengthen --warmup-steps (now "
            f"{optimizer.warmup_steps}), or run `glasslm diagnose` with the same flags"
        )

    def nonfinite_warning(self, engine: Engine, batch: Batch) -> str:
        """A warning that names the first activation or gradient that is not finite."""
        name = self._first_nonfinite(engine, batch)
        place = (
            f"the first non-finite value is in {name}"
            if name
            else "computed again, without dropout, everything is finite"
        )
        return f"step {batch.step + 1} is not finite and was skipped: {place}"

    def _first_nonfinite(self, engine: Engine, batch: Batch) -> str | None:
        """The first tensor of a forward and backward pass over `batch` with NaN or infinity.

        The batch is computed again in micro-batches.
        """
        c = self.config.model
        # Scores hold -inf where a key is hidden. Attention of a file shows neither of them.
        hidden = (".scores", ".weights") if self.config.operations.ops else (".scores",)
        forward = [name for name in forward_names(c) if not name.endswith(hidden)]
        for names in (forward, backward_names(c, parameter_table(c, self.vocab_size))):
            for part in batch.split(engine.micro_batch_size):
                tensors = engine.inspect(part, names)
                for name in names:
                    if not np.isfinite(tensors[name]).all():
                        if name.startswith(GRADIENT_PREFIX):
                            return f"the gradient of {name.removeprefix(GRADIENT_PREFIX)}"
                        return name
        return None


def spike_limit(values: Iterable[float]) -> float:
    """The mean of `values` plus 6 standard deviations; infinity for fewer than MIN_HISTORY.

    The rule of OLMo-core's SkipStepOptimizer, over the 128 values before.
    """
    window = np.fromiter(values, float)
    if len(window) < MIN_HISTORY:
        return math.inf
    return float(window_limits(window))


def window_limits(
    windows: NDArray[np.float64], deviations: float = SPIKE_DEVIATIONS
) -> NDArray[np.float64]:
    """windows (..., N) -> (...): the spike limit of each window, whatever its length N."""
    mean = windows.mean(-1)
    std = np.maximum(windows.std(-1, ddof=1), MIN_RELATIVE_STD * np.abs(mean))
    limits: NDArray[np.float64] = mean + deviations * std
    return limits


def spike_warning(
    step: int, loss: float, norm: float, limits: Limits, action: str, can_replay: bool = True
) -> str:
    """The warning of a spike; `action` says what was done about it."""
    if loss > limits.loss:
        value = f"the loss of step {step} is {loss:.4f}, above {limits.loss:.4f}"
    else:
        value = f"the gradient norm of step {step} is {norm:.4g}, above {limits.norm:.4g}"
    rule = f"{SPIKE_DEVIATIONS:g} standard deviations over the last {WINDOW_STEPS} steps"
    advice = f". See `glasslm diagnose RUN --replay {step}`" if can_replay else ""
    return f"spike: {value} ({rule}){action}{advice}"
