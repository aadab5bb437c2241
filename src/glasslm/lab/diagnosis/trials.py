"""Trials: short trainings of copies of a run's first weights that show what no inspection can.

A copy takes one update, overfits one batch, or tries a range of learning rates. Every trial has its
own engine, so the run does not change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, OptimizerConfig, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch, Engine, State
from glasslm.engines.state import moment_kind
from glasslm.lab.diagnosis.measurements import rms
from glasslm.lab.diagnosis.signals import grade, shorten_list
from glasslm.lab.diagnosis.smoothed_curve import noise_std
from glasslm.lab.short_training import train_step, train_steps
from glasslm.model.parameters import parameter_table
from glasslm.report.findings import Finding, Verdict
from glasslm.text import plural

Array = NDArray[Any]
MakeEngine = Callable[[RunConfig], Engine]


@dataclass(frozen=True)
class TrialSetup:
    """The config, engines, batches and first weights of a trial."""

    config: RunConfig
    vocab_size: int
    make_engine: MakeEngine
    batch: Callable[[int, int], Batch]  # of (step, rows)
    first_weights: Callable[[], State]

    def new_engine(self, config: RunConfig) -> Engine:
        """An engine for another config of the same model, with the first weights."""
        engine = self.make_engine(config)
        engine.load(self.first_weights())
        return engine


def engine_maker(vocab_size: int, compute: ComputeConfig) -> MakeEngine:
    """A function that makes the engine of a run, never compiled, because a trial has few steps."""
    uncompiled = dataclasses.replace(compute, compile="off", parallel="auto")
    return lambda config: make_engine(config, vocab_size, uncompiled, training=True)


def trial_config(
    config: RunConfig, rows: int, model: dict[str, Any], optimizer: dict[str, Any]
) -> RunConfig:
    """The config with changed fields, for batches of `rows` rows.

    The rows are divided among all threads.
    """
    return RunConfig(
        dataclasses.replace(config.model, **model),
        config.data,
        dataclasses.replace(config.optimizer, **optimizer),
        dataclasses.replace(config.train, batch_size=rows, micro_batch_size=0),
        config.operations,
    ).resolve()


# -- one update ------------------------------------------------------------------------------------

MIN_CHANGE_SHARE = 1e-4  # of the median change: a weight that changes less is not trained
# The largest median ratio that is ok, and the largest that is not bad
FIRST_UPDATE_LIMITS, UPDATE_LIMITS = (0.08, 0.25), (0.15, 0.5)
MIN_UPDATE_RATIO = 1e-6


class UpdateRatio(NamedTuple):
    """The size of one update of a weight."""

    name: str
    optimizer: str  # that moves the weight
    ratio: float  # std of the update over std of the weight; rms over rms if the weight is a vector
    change: float  # rms of the update, without the weight decay
    is_always_active: bool  # whether every token uses the weight


def measure_update_ratios(
    engine: Engine, batch: Batch, lr: float, config: RunConfig, vocab_size: int
) -> list[UpdateRatio]:
    """Train one step at the rate `lr`, and measure the update of each trained weight.

    The weight decay is subtracted, because it also moves a weight without a gradient. A weight that
    does not move at all has no decay to subtract.
    """
    table = parameter_table(config.model, vocab_size)
    before = {name: array.astype(np.float64) for name, array in engine.state() if "/" not in name}
    train_step(engine, batch, lr)
    ratios = []
    for name, after in engine.state():
        if "/" in name:
            continue
        change = after.astype(np.float64) - before[name]
        if table[name].decay and change.any():
            change += lr * config.optimizer.weight_decay * before[name]
        size, update_size = (
            (rms(before[name]), rms(change))
            if change.ndim < 2
            else (before[name].std(), change.std())
        )
        ratio = float(update_size / size) if size else math.nan
        kind = moment_kind(table[name], config.optimizer.optimizer)
        ratios.append(UpdateRatio(name, kind, ratio, rms(change), table[name].active == 1))
    return ratios


def judge_updates(
    ratios: list[UpdateRatio], lr: float, step: int, fine_tuned: bool = False
) -> Finding:
    """Judge whether updates reach every weight, and whether their size suits the weights.

    The limit of a first update is lower, unless the run is `fine_tuned`. The rule of 1e-3
    (Karpathy) holds for Adam at the end of training. The medians of clean models here are 5e-4 to
    1e-2 at the first update of a warmup, and up to .03 at the peak rate, with either optimizer.
    Adam's first update without a warmup is its rate over the deviation of the first weights: .5 at
    1e-2.
    """
    signal, is_first = "update to weight", step == 0 and not fine_tuned
    # Not judged: vectors, weights that start at zero, and an adapter's A while its B is zero
    unjudged = ("norm.weight", "bias", "lora_b", *(["lora_a"] if step == 0 else []))
    matrices = [r for r in ratios if r.ratio == r.ratio and not r.name.endswith(unjudged)]
    optimizers = sorted({r.optimizer for r in matrices})
    medians = {
        optimizer: float(np.median([r.ratio for r in matrices if r.optimizer == optimizer]))
        for optimizer in optimizers
    }
    if frozen := _frozen_weights(ratios, step):
        return Finding(
            signal,
            "bad",
            f"no update of {shorten_list(frozen)} at step {step:,}",
            "these weights do not learn",
            "Check that their gradient arrives, that the optimizer has them, and that the rate "
            "is not 0.",
        )
    if not medians:
        return Finding(
            signal,
            "ok",
            f"every weight moved at step {step:,}",
            "no weight has a size to compare with yet",
        )
    ratio_text = ", ".join(f"{optimizer} {ratio:.1e}" for optimizer, ratio in medians.items())
    evidence = f"{ratio_text} at step {step:,} and rate {lr:.2g} (medians)"
    largest = max(medians.values())
    verdict = grade(largest, *(FIRST_UPDATE_LIMITS if is_first else UPDATE_LIMITS))
    if verdict != "ok":
        meaning = "an update replaces a large part of the weights"
        if is_first:
            meaning += ", before the gradients have a stable direction"
        advice = "Lengthen --warmup-steps." if is_first else "Lower --lr."
        return Finding(signal, verdict, evidence, meaning, advice)
    if largest < MIN_UPDATE_RATIO:
        return Finding(
            signal, "watch", evidence, "updates are too small to learn from", "Raise --lr."
        )
    return Finding(signal, "ok", evidence, "the updates have an ordinary size")


def _frozen_weights(ratios: list[UpdateRatio], step: int) -> list[str]:
    """The names of weights that every token uses and that hardly changed."""
    median_changes = {
        optimizer: float(np.median([r.change for r in ratios if r.optimizer == optimizer]))
        for optimizer in {r.optimizer for r in ratios}
    }
    return [
        r.name
        for r in ratios
        if r.is_always_active
        and not r.change > MIN_CHANGE_SHARE * median_changes[r.optimizer]
        and not (step == 0 and r.name.endswith("lora_a"))
    ]


# -- overfitting one batch -------------------------------------------------------------------------

OVERFIT_SHARE = 0.1  # of ln V: a batch with a lower loss is overfitted
OVERFIT_STEPS = 150  # clean models need 15 to 60, post-norm ones up to 100
OVERFIT_RATE, OVERFIT_WARMUP_STEPS = 1e-2, 10


def overfit_one_batch(setup: TrialSetup, rows: int) -> list[float]:
    """The losses of training on one batch without dropout until it is overfitted.

    The optimizer is the default one, not the run's, because the trial tests the model.
    """
    optimizer = {
        "optimizer": "muon",
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "ema": 0.0,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
    }
    config = trial_config(setup.config, rows, {"dropout": 0.0, "attention_dropout": 0.0}, optimizer)
    engine, batch, losses = setup.new_engine(config), setup.batch(0, rows), []
    goal = OVERFIT_SHARE * math.log(setup.vocab_size)

    def rate_of(step: int) -> float:
        return OVERFIT_RATE * min(1.0, (step + 1) / OVERFIT_WARMUP_STEPS)

    for step in train_steps(engine, lambda step: batch, rate_of, OVERFIT_STEPS):
        losses.append(step.losses.cross_entropy)
        if losses[-1] < goal or not math.isfinite(losses[-1]):
            break
    return losses


def judge_overfit(losses: list[float], vocab_size: int) -> Finding:
    """Judge whether the model can learn (Karpathy, A recipe for training neural networks)."""
    signal, share = "overfit one batch", min(losses) / math.log(vocab_size)
    length = plural(len(losses), "step")
    evidence = f"{losses[0]:.2f} to {losses[-1]:.3f} in {length} ({share:.0%} of ln V)"
    if share < OVERFIT_SHARE:
        return Finding(signal, "ok", evidence, "the model can learn")
    verdict: Verdict = "watch" if share < 0.5 else "bad"
    return Finding(
        signal,
        verdict,
        evidence,
        "the model cannot learn a single batch, at a rate that suits other models",
        "Look for a fault in the model first: gradients by layer, dead units, targets.",
    )


# -- learning-rate range test ----------------------------------------------------------------------

RATE_RANGES = {"muon": (1e-4, 3.0), "adamw": (1e-5, 1.0), "sgd": (1e-4, 100.0)}
DEFAULT_RATE_RANGE = (1e-5, 10.0)  # of any other optimizer
RANGE_STEPS, SMOOTHING = 60, 0.8
RATE_LIMITS = (2.5, 4.0)  # of the run's rate over the limit of the range test
MAX_LIMIT_OVER_RATE = 300.0
MIN_GAIN_SHARE = 0.02  # of the first loss


class RangeTest(NamedTuple):
    """The result of a learning-rate range test, step by step."""

    rates: Array  # (N,)
    losses: Array  # (N,) of each step's batch, before its update
    smooth: Array  # (N,) exponential moving average of the losses
    limit: float  # the rate above which the loss falls hardly further

    @property
    def suggested_rate(self) -> float:
        """The suggested learning rate: a third of the limit."""
        return self.limit / 3


def run_range_test(setup: TrialSetup, rows: int) -> RangeTest:
    """Train with a rate that grows geometrically, until the loss explodes.

    The weights are a copy of the first ones. Smith, arXiv:1506.01186, section 3.3: the upper bound
    is the rate at which progress slows, becomes ragged, or turns back. Here it is the rate at which
    nine tenths of the total fall are reached. A small model does not always explode: it may fall
    back to predicting the frequencies of single tokens, at the same loss for any rate.
    """
    low, high = RATE_RANGES.get(setup.config.optimizer.optimizer, DEFAULT_RATE_RANGE)
    engine = setup.new_engine(trial_config(setup.config, rows, {}, {"ema": 0.0}))

    def rate_of(step: int) -> float:
        return low * (high / low) ** (step / (RANGE_STEPS - 1))

    rates, losses, smooth = [], [], []
    average = 0.0
    steps = train_steps(engine, lambda step: setup.batch(step, rows), rate_of, RANGE_STEPS)
    for number, step in enumerate(steps):
        loss = step.losses.cross_entropy
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        rates.append(rate_of(number))
        losses.append(loss)
        smooth.append(average / (1 - SMOOTHING ** (number + 1)))
        if not smooth[-1] <= min(smooth) + 0.5 * math.log(setup.vocab_size):
            break
    levels = np.array(smooth)
    gain = levels[0] - np.nanmin(levels)
    index = int(np.argmax(levels <= levels[0] - 0.9 * gain)) if gain > 0 else 0
    return RangeTest(np.array(rates), np.array(losses), levels, rates[index])


def judge_range(test: RangeTest, config: OptimizerConfig, fine_tuned: bool = False) -> Finding:
    """Judge the configured peak rate against the limit.

    `fine_tuned` weights may have nothing to gain. Sound runs use .1 to 1 of the limit (muon at
    1e-2, adamw at 1e-3 to 1e-2), and 5 or more at 30 times their rate.
    """
    signal, lr = "learning rate", config.lr
    gain = test.smooth[0] - np.nanmin(test.smooth)
    min_gain = MIN_GAIN_SHARE * abs(test.smooth[0])
    if fine_tuned and not gain > max(min_gain, 3 * noise_std(test.losses)):
        evidence = (
            f"no rate up to {test.rates[-1]:.1g} lowers the loss clearly below {test.smooth[0]:.3f}"
        )
        return Finding(
            signal, "ok", evidence, "no rate brings a gain: judge the run by its old text"
        )
    if not gain > min_gain:
        evidence = f"no rate up to {test.rates[-1]:.1g} lowers the loss below {test.smooth[0]:.3f}"
        return Finding(
            signal,
            "bad",
            evidence,
            "the fault is not the rate",
            "Look for a fault in the model first.",
        )
    evidence = (
        f"the loss falls hardly further above a rate of {test.limit:.1g}; the run's rate is {lr:g}"
    )
    advice = f"Try --lr {test.suggested_rate:.1g}, a third of that limit."
    verdict = grade(lr / test.limit, *RATE_LIMITS)
    if verdict != "ok":
        return Finding(
            signal,
            verdict,
            evidence,
            "the rate is too high for the first steps of this model",
            advice,
        )
    if lr < test.limit / MAX_LIMIT_OVER_RATE:
        return Finding(
            signal,
            "watch",
            evidence,
            "the rate is far lower than necessary, so training is slow",
            advice,
        )
    meaning = f"the rate suits this model; a third of the limit is {test.suggested_rate:.1g}"
    return Finding(signal, "ok", evidence, meaning)
