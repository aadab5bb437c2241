"""What can only be learnt by training: a copy of the weights takes an update, learns a batch by heart, tries all rates.

Nothing here touches the run: every trial makes an engine of its own and throws it away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, ModelConfig, OptimizerConfig, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch, Engine, State
from glasslm.engines.state import moment_kind
from glasslm.lab.diagnosis.smoothed_curve import noise_std
from glasslm.lab.diagnosis.signals import graded, rms, some
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.report.findings import Finding, Verdict

Array = NDArray[Any]
MakeEngine = Callable[[RunConfig], Engine]


@dataclass(frozen=True)
class Bench:
    """What a trial needs: a config, a way to make engines, batches by step and number of rows, and first weights."""

    config: RunConfig
    vocab_size: int
    make: MakeEngine
    batch: Callable[[int, int], Batch]  # (step, rows)
    first: Callable[[], State]

    def copy(self, config: RunConfig) -> Engine:
        """An engine of another config of the same model, with the first weights."""
        engine = self.make(config)
        engine.load(self.first())
        return engine


def maker(vocab_size: int, compute: ComputeConfig) -> MakeEngine:
    """Engines as a run of that config would get them, but never compiled: they take few steps."""
    plainly = dataclasses.replace(compute, compile="off", parallel="auto")
    return lambda config: make_engine(config, vocab_size, plainly, training=True)


def advance(engine: Engine, batch: Batch, lr: float) -> float:
    """One step; the loss before it, in nats per token."""
    losses = engine.accumulate(batch, 1 / max(1, int((batch.targets >= 0).sum())))
    engine.update(lr)
    return losses.cross_entropy


def with_rows(
    config: RunConfig, rows: int, model: dict[str, Any], optimizer: dict[str, Any]
) -> RunConfig:
    """A config for batches of that many rows, so that they are cut for all threads."""
    return RunConfig(
        dataclasses.replace(config.model, **model),
        config.data,
        dataclasses.replace(config.optimizer, **optimizer),
        dataclasses.replace(config.train, batch_size=rows, micro_batch_size=0),
    ).resolve()


# -- one update -------------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """One weight and its update."""

    name: str
    kind: str  # the optimizer that moves it
    ratio: (
        float  # deviation of the update over that of the weight; rms where the weight is a vector
    )
    change: float  # rms of the update, without the decay of the weight
    always: bool  # it computes every token


def ratios(
    engine: Engine, batch: Batch, lr: float, config: RunConfig, vocab_size: int
) -> list[Ratio]:
    """What one real update at that rate does to each trained weight. It changes the engine.

    Weight decay is taken out: it moves a weight that gets no gradient, too. A weight that not even decay moves has no
    update at all.
    """
    rows = parameter_table(config.model, vocab_size)
    before = {name: array.astype(np.float64) for name, array in engine.state() if "/" not in name}
    advance(engine, batch, lr)
    found = []
    for name, after in engine.state():
        if "/" in name:
            continue
        change = after.astype(np.float64) - before[name]
        if rows[name].decay and change.any():
            change += lr * config.optimizer.weight_decay * before[name]
        size, moved = (
            (rms(before[name]), rms(change))
            if change.ndim < 2
            else (before[name].std(), change.std())
        )
        ratio = float(moved / size) if size else math.nan
        kind = moment_kind(rows[name], config.optimizer.optimizer)
        found.append(Ratio(name, kind, ratio, rms(change), rows[name].active == 1))
    return found


def judge_updates(found: list[Ratio], lr: float, step: int, tuned: bool = False) -> Finding:
    """Whether updates reach every weight, in a size that learns; the first one, unless `tuned`, must be small.

    The rule of 1e-3 (Karpathy) is Adam's at its end. Here the medians of clean models are 5e-4 to 1e-2 at the first
    update of a warmup, and up to .03 at the peak, by either optimizer; Adam's first update without a warmup is its rate
    over the deviation of the first weights, .5 at 1e-2.
    """
    signal, first = "update to weight", step == 0 and not tuned
    # Vectors apart, and what starts at zero, whose ratio says nothing for a while, and an A whose B is zero
    small = ("norm.weight", "bias", "lora_b", *(["lora_a"] if step == 0 else []))
    matrices = [r for r in found if r.ratio == r.ratio and not r.name.endswith(small)]
    kinds = sorted({r.kind for r in matrices})
    medians = {
        kind: float(np.median([r.ratio for r in matrices if r.kind == kind])) for kind in kinds
    }
    told = ", ".join(f"{kind} {ratio:.1e}" for kind, ratio in medians.items())
    seen = f"{told} at step {step:,} and rate {lr:.2g} (medians)"
    usual = {
        kind: float(np.median([r.change for r in found if r.kind == kind]))
        for kind in {r.kind for r in found}
    }
    frozen = [r.name for r in found if r.always and not r.change > FROZEN * usual[r.kind]]
    frozen = [name for name in frozen if not (step == 0 and name.endswith("lora_a"))]
    if frozen:
        advice = "See that their gradient arrives, that the optimizer has them, and that the rate is not 0."
        seen = f"no update of {some(frozen)} at step {step:,}"
        return Finding(signal, "bad", seen, "these weights do not learn", advice)
    if not medians:
        return Finding(
            signal,
            "ok",
            f"every weight moved at step {step:,}",
            "there is nothing to compare them with yet",
        )
    largest = max(medians.values())
    verdict = graded(largest, *(FIRST if first else LARGEST))
    if verdict != "ok":
        means = "an update overturns much of the weights" + (
            ", before they have a direction" if first else ""
        )
        return Finding(
            signal, verdict, seen, means, "Lengthen --warmup-steps." if first else "Lower --lr."
        )
    if largest < 1e-6:
        return Finding(
            signal, "watch", seen, "updates are too small to learn anything", "Raise --lr."
        )
    return Finding(signal, "ok", seen, "weights move at an ordinary pace")


FROZEN = 1e-4  # of the median change
FIRST, LARGEST = (0.08, 0.25), (0.15, 0.5)


# -- one batch by heart -----------------------------------------------------------------------------------------------

BY_HEART, OVERFIT_STEPS = (
    0.1,
    150,
)  # share of ln V; clean models take 15 to 60 steps, post-norm ones to 100


def overfit(bench: Bench, rows: int) -> list[float]:
    """The losses of one batch, learnt again and again without dropout; ends where it is known by heart.

    The optimizer is the default one, whatever the run's: what is tried is the model.
    """
    own = {
        "optimizer": "muon",
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "ema": 0.0,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
    }
    config = with_rows(bench.config, rows, {"dropout": 0.0, "attention_dropout": 0.0}, own)
    engine, batch, losses = bench.copy(config), bench.batch(0, rows), []
    goal = BY_HEART * math.log(bench.vocab_size)
    for step in range(OVERFIT_STEPS):
        losses.append(advance(engine, batch, 1e-2 * min(1.0, (step + 1) / 10)))
        if losses[-1] < goal or not math.isfinite(losses[-1]):
            break
    return losses


def judge_overfit(losses: list[float], vocab_size: int) -> Finding:
    """Whether the model can learn at all (Karpathy, "A recipe for training neural networks", 2019)."""
    signal, share = "one batch by heart", min(losses) / math.log(vocab_size)
    seen = f"{losses[0]:.2f} to {losses[-1]:.3f} in {len(losses)} steps ({share:.0%} of ln V)"
    if share < BY_HEART:
        return Finding(signal, "ok", seen, "the model can learn")
    verdict: Verdict = "watch" if share < 0.5 else "bad"
    return Finding(signal, verdict, seen, "it cannot learn even a single batch by heart, at a rate that suits others",
                   "Look for a fault in the model first: gradients by layer, dead units, targets.")  # fmt: skip


# -- all rates --------------------------------------------------------------------------------------------------------

RATES = {"muon": (1e-4, 3.0), "adamw": (1e-5, 1.0), "sgd": (1e-4, 100.0)}
RANGE_STEPS, SMOOTH = 60, 0.8


class Range(NamedTuple):
    """What a range test saw, step by step."""

    rates: Array  # (N,)
    losses: Array  # (N,) of each step's batch, before its update
    smooth: Array  # (N,)
    limit: float  # the rate from which on hardly more is learnt

    @property
    def suggested(self) -> float:
        return self.limit / 3


def range_test(bench: Bench, rows: int) -> Range:
    """The rate grows geometrically, a step each, on a copy of the first weights, until the loss explodes.

    Smith, arXiv:1506.01186, section 3.3: the upper bound is the rate at which progress slows, becomes ragged, or turns
    back. Here that is where nine tenths of all that the test gains are gained: a small model does not always explode,
    but falls back to the frequencies of single tokens, and its loss stays there at any rate.
    """
    low, high = RATES[bench.config.optimizer.optimizer]
    config = with_rows(bench.config, rows, {}, {"ema": 0.0})
    engine = bench.copy(config)
    rates, losses, smooth = [], [], []
    average = 0.0
    for step in range(RANGE_STEPS):
        rate = low * (high / low) ** (step / (RANGE_STEPS - 1))
        loss = advance(engine, bench.batch(step, rows), rate)
        average = SMOOTH * average + (1 - SMOOTH) * loss
        rates.append(rate)
        losses.append(loss)
        smooth.append(average / (1 - SMOOTH ** (step + 1)))
        if not smooth[-1] <= min(smooth) + 0.5 * math.log(bench.vocab_size):
            break
    levels = np.array(smooth)
    gained = levels[0] - np.nanmin(levels)
    enough = int(np.argmax(levels <= levels[0] - 0.9 * gained)) if gained > 0 else 0
    return Range(np.array(rates), np.array(losses), levels, rates[enough])


def judge_range(found: Range, config: OptimizerConfig, tuned: bool = False) -> Finding:
    """The configured peak against the limit; of weights that are `tuned` already there may be nothing to gain.

    Sound recipes lie at .1 to 1 of it (muon at 1e-2, adamw at 1e-3 to 1e-2), and 30 times as high at 5 and more.
    """
    signal, lr = "learning rate", config.lr
    seen = f"hardly more is learnt above a rate of {found.limit:.1g}; the run's is {lr:g}"
    gained = found.smooth[0] - np.nanmin(found.smooth)
    least = 0.02 * abs(found.smooth[0])
    if tuned and not gained > max(least, 3 * noise_std(found.losses)):
        seen = f"no rate up to {found.rates[-1]:.1g} brings the loss clearly down from {found.smooth[0]:.3f}"
        return Finding(signal, "ok", seen, "nothing to gain at any rate: judge by the old text")
    if not gained > least:
        seen = (
            f"no rate up to {found.rates[-1]:.1g} brings the loss down from {found.smooth[0]:.3f}"
        )
        return Finding(
            signal,
            "bad",
            seen,
            "the rate is not what is wrong",
            "Look for a fault in the model first.",
        )
    verdict = graded(lr / found.limit, RATE_WATCH, RATE_BAD)
    if verdict != "ok":
        return Finding(signal, verdict, seen, "the rate is too high for the first steps of this model",
                       f"Try --lr {found.suggested:.1g}, a third of that limit.")  # fmt: skip
    if lr < found.limit / RATE_LOW:
        return Finding(signal, "watch", seen, "the rate is far lower than it need be: it learns slowly",
                       f"Try --lr {found.suggested:.1g}, a third of that limit.")  # fmt: skip
    return Finding(
        signal,
        "ok",
        seen,
        f"the rate lies where this model learns; a third of the limit is {found.suggested:.1g}",
    )


RATE_WATCH, RATE_BAD, RATE_LOW = 2.5, 4.0, 300.0


# -- all widths -------------------------------------------------------------------------------------------------------

COORDINATE_STEPS = 4


class Coordinates(NamedTuple):
    """Mean absolute values after a few steps, by place in the model and width."""

    widths: list[int]
    places: dict[str, list[float]]  # of the change since the first weights

    def slope(self, place: str) -> float:
        """d log value / d log width; 0 is what muP is made for."""
        x, y = np.log(self.widths), np.log(np.maximum(self.places[place], 1e-30))
        return float(np.polyfit(x, y, 1)[0])


def coordinates(bench: Bench, rows: int) -> Coordinates:
    """Models of several widths take a few steps at the run's peak rate (microsoft/mup, README; arXiv:2203.03466)."""
    c = bench.config.model
    models = widths(c)
    last = f"blocks.{c.n_layers - 1}"
    names = {
        "stream": last,
        "attention": f"{last}.attention",
        "feed-forward": f"{last}.feedforward",
        "logits": "logits",
    }
    places: dict[str, list[float]] = {place: [] for place in names}
    for model in models:
        config = with_rows(bench.config, rows, dataclasses.asdict(model), {"ema": 0.0})
        engine, batch = bench.make(config), bench.batch(0, rows)
        engine.load(initial_weights(parameter_table(config.model, bench.vocab_size), config.train.seed))
        first = engine.inspect(batch, names.values())
        for step in range(COORDINATE_STEPS):
            advance(engine, bench.batch(step, rows), config.optimizer.lr)
        after = engine.inspect(batch, names.values())
        for place, name in names.items():
            places[place].append(float(np.abs(after[name] - first[name]).mean()))
    return Coordinates([model.d_model for model in models], places)


def widths(c: ModelConfig) -> list[ModelConfig]:
    """Three models, each twice as wide as the one before it, about 64 to 256 wide, with heads of the same size."""
    c = c.resolve()
    group = c.n_heads // c.n_kv_heads
    fewest = max(1, round(64 / c.head_size / group)) * group
    found = []
    for heads in (fewest, 2 * fewest, 4 * fewest):
        wide = heads * c.head_size
        d_ff = max(1, round(c.d_ff * wide / c.d_model))
        found.append(
            dataclasses.replace(
                c, d_model=wide, n_heads=heads, n_kv_heads=heads // group, d_ff=d_ff
            )
        )
    return found


def judge_coordinates(found: Coordinates) -> Finding:
    """Informational: the standard parametrisation is not muP, and nobody need train at several widths."""
    slopes = {place: found.slope(place) for place in found.places}
    told = ", ".join(f"{place} {slope:+.2f}" for place, slope in slopes.items())
    seen = f"change after {COORDINATE_STEPS} steps goes with width to the power: {told}"
    flat = max(map(abs, slopes.values())) < 0.3
    means = (
        "flat: a rate that suits one width suits others"
        if flat
        else "not flat: each width needs a rate of its own"
    )
    return Finding(
        "widths", "ok", seen, means, "" if flat else "Tune --lr again for another --d-model."
    )
