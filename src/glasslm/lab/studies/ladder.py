"""A ladder of runs to fit a scaling law to: sizes x compute, each run decayed to its end. And one run beyond it.

At each of COMPUTES budgets of compute, SIZES sizes share it (an IsoFLOP design, approach 2 of arXiv:2203.15556): small
models see more tokens, large ones fewer. From one budget to the next sizes grow by the square root of the compute, so
that each size meets several budgets and each number of tokens several sizes. C = 6 N D throughout, where N counts the
parameters that multiply a token, the head included. The width is what grows; depth and the number of heads stay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glasslm.config.conversion import from_dict, to_dict, with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import seconds
from glasslm.data.shards import Dataset
from glasslm.errors import InputError
from glasslm.lab.studies import study_setting
from glasslm.lab.studies.axes import with_model
from glasslm.lab.studies.study_setting import (
    TUNING_SEED,
    held_plan,
    hold_plan,
    measured,
    seeded,
    sparing,
    with_engine,
    with_text,
)
from glasslm.lab.studies.sweep import Runner, Trial
from glasslm.model.parameters import parameter_table
from glasslm.runs.metrics import plain
from glasslm.text import Say, duration
from glasslm.training import step_timer
from glasslm.training.step_timer import Pace

COMPUTES, SIZES, GROWTH = (
    4,
    5,
    3.0,
)  # budgets of compute, sizes at each, and the factor from budget to budget
MIDDLE = 40.0  # tokens a parameter at the middle size: characters wanted 32 to 56 (docs/log.md), subwords want 20
BEYOND = 4.0  # times the largest compute of the ladder: the run that is predicted
FEWEST_STEPS, LEAST_STEPS = (
    100,
    30,
)  # of the shortest run: wanted, and without which there is no ladder
SPARE = 0.85  # of a budget of time is planned for
MULTIPLES = (1 / 3, 1.0, 3.0)  # of the recipe's learning rate, tried at three sizes


@dataclass(frozen=True)
class Ladder:
    """What a study of scaling is about, all that determines its runs but their learning rates, which are tuned."""

    base: RunConfig
    rungs: list[list[RunConfig]]  # for each compute, the smallest first, its sizes
    vocab_size: int
    unique_tokens: int
    compute: ComputeConfig  # of each run

    @property
    def cells(self) -> list[RunConfig]:
        return [config for rung in self.rungs for config in rung]

    @cached_property
    def sizes(self) -> list[int]:
        return sorted({size_of(config, self.vocab_size) for config in self.cells})

    @cached_property
    def largest_C(self) -> float:
        return max(compute_of(config, self.vocab_size) for config in self.cells)


def size_of(config: RunConfig, vocab_size: int) -> int:
    """N: the parameters that multiply a token."""
    return parameter_table(config.model.resolved(), vocab_size).matmul


def tokens_of(config: RunConfig) -> int:
    """D."""
    return config.train.max_steps * config.train.batch_size * config.model.block_size


def compute_of(config: RunConfig, vocab_size: int) -> float:
    """C = 6 N D."""
    return 6.0 * size_of(config, vocab_size) * tokens_of(config)


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(base: RunConfig, budget: str, runner: Runner, study: Path, say: Say) -> Ladder:
    """Fix the sizes and steps of all runs, so that they, and the one beyond them, fit the budget. Kept in plan.json.

    `budget` is a time ("40m") or, as a plain number from a million up, FLOPs. Raises InputError for one too small.
    """
    asked = plain([to_dict(base), budget])
    if held := held_plan(study, asked):
        rungs = [[from_dict(RunConfig, config) for config in rung] for rung in held["rungs"]]
        compute = from_dict(ComputeConfig, held["compute"])
        return Ladder(
            from_dict(RunConfig, held["base"]),
            rungs,
            held["vocab_size"],
            held["unique_tokens"],
            compute,
        )
    base, dataset = with_text(base, say)
    flops = _as_flops(budget)
    if flops is None:
        made, told = _fitting(base, seconds(budget), runner, dataset)
    else:
        units = (SIZES + 1) * sum(GROWTH**-k for k in range(COMPUTES)) + BEYOND
        made, told = (
            built(base, flops / units, dataset, runner.compute),
            f"{flops:.3g} FLOPs, tuning besides",
        )
    shortest = min(config.train.max_steps for config in made.cells)
    if shortest < LEAST_STEPS:
        raise InputError(
            f"a budget of {budget} leaves {shortest} steps to the shortest run, expected {LEAST_STEPS}: give a longer "
            "--budget, or a recipe with a smaller --batch-size or --block-size"
        )
    say(
        f"{len(made.cells)} cells of {len(made.sizes)} sizes, {made.sizes[0]:,} to {made.sizes[-1]:,} parameters, up "
        f"to {made.largest_C:.3g} FLOPs: {told}"
    )
    hold_plan(study, asked, {
        "base": to_dict(made.base), "rungs": [[to_dict(config) for config in rung] for rung in made.rungs],
        "vocab_size": made.vocab_size, "unique_tokens": made.unique_tokens, "compute": to_dict(made.compute),
    })  # fmt: skip
    return made


def _as_flops(budget: str) -> float | None:
    """A plain number of at least a million is no time that anybody waits for."""
    try:
        number = float(budget)
    except ValueError:
        return None
    return number if 1e6 <= number < math.inf else None


def built(base: RunConfig, largest_C: float, dataset: Dataset, compute: ComputeConfig) -> Ladder:
    """The ladder whose largest compute is this.

    The middle size of each compute has MIDDLE tokens a parameter, as long as there are smaller sizes.
    Raises InputError where the recipe cannot be made so wide.
    """
    V = dataset.tokenizer.vocab_size
    widths = _widths(base, V)
    computes = [largest_C / GROWTH ** (COMPUTES - 1 - k) for k in range(COMPUTES)]
    smallest = math.sqrt(computes[0] / (6 * MIDDLE)) / GROWTH ** ((SIZES - 1) / 4)
    first = max(smallest, widths[1][1])
    chosen: list[int] = []
    for i in range(COMPUTES + SIZES - 1):
        wanted = first * GROWTH ** (i / 2)
        larger = [pair for pair in widths if not chosen or pair[0] > chosen[-1]]
        if not larger or larger[-1][1] < wanted / 2:
            raise InputError(
                f"{largest_C:.3g} FLOPs want models of {wanted:.3g} parameters, and {widths[-1][0]} is the widest that "
                f"is made ({widths[-1][1]:,}): give a smaller budget, or a recipe with more --n-layers"
            )
        chosen.append(min(larger, key=lambda pair: abs(math.log(pair[1] / wanted)))[0])
    models = [with_model(base, d_model=d) for d in chosen]
    batch = base.train.batch_size
    fewest = (
        computes[0] / (6 * size_of(models[SIZES - 1], V)) / base.model.block_size
    )  # rows of the shortest run
    while batch > 1 and fewest / batch < FEWEST_STEPS:
        batch //= 2
    base = with_flags(base, {"batch_size": batch})
    rungs = [
        [
            at_compute(with_flags(model, {"batch_size": batch}), C, V)
            for model in models[k : k + SIZES]
        ]
        for k, C in enumerate(computes)
    ]
    compute = with_engine(compute, models[-1], V)
    return Ladder(base, rungs, V, len(dataset.train.tokens), compute)


@cache
def _widths(base: RunConfig, vocab_size: int) -> list[tuple[int, int]]:
    """(width, N) of what the recipe can be made into, the narrowest first."""
    step = 2 * base.model.n_heads  # rotary positions turn pairs
    return [
        (d, size_of(with_model(base, d_model=d), vocab_size))
        for d in range(step, 256 * step + 1, step)
    ]


def at_compute(config: RunConfig, C: float, vocab_size: int) -> RunConfig:
    """With as many steps as C = 6 N D leaves to this size, of which at most a tenth are warmup."""
    batch_tokens = config.train.batch_size * config.model.block_size
    return lasting(config, max(1, round(C / (6.0 * size_of(config, vocab_size) * batch_tokens))))


def lasting(config: RunConfig, steps: int) -> RunConfig:
    warmup = min(config.optimizer.warmup_steps, steps // 10)
    return sparing(with_flags(config, {"max_steps": steps, "warmup_steps": warmup})).resolved()


def _fitting(
    base: RunConfig, budget_s: float, runner: Runner, dataset: Dataset
) -> tuple[Ladder, str]:
    """The largest ladder that is done in time, and a word on it.

    Speeds are measured on a first guess, and again on what follows from it, whose batch may be another.
    """
    V, workers = dataset.tokenizer.vocab_size, runner.slots
    step_s = measured(base, with_engine(runner.compute, base, V), dataset).step
    most = (
        compute_of(dataclasses.replace(base, train=dataclasses.replace(base.train, max_steps=1)), V)
        / step_s
    )
    most *= budget_s * workers
    made = built(base, most / 15, dataset, runner.compute)
    for _ in range(2):
        speed = Speed.of(made, runner, dataset)
        low, high = 1e6, most
        for _ in range(24):
            middle = math.sqrt(low * high)
            try:
                fits = (
                    sum(speed.seconds(built(base, middle, dataset, runner.compute)))
                    <= SPARE * budget_s
                )
            except InputError:  # wider than any model is made
                fits = False
            low, high = (middle, high) if fits else (low, middle)
        made = built(base, low, dataset, runner.compute)
    ladder_s, beyond_s = speed.seconds(made)
    return (
        made,
        f"about {duration(ladder_s)}, {workers} runs at once, then {duration(beyond_s)} for the run beyond",
    )


@dataclass(frozen=True)
class Speed:
    """How fast the runs of a ladder are on this machine, measured at three sizes, each alone."""

    dataset: Dataset
    workers: int
    batch_size: int
    sizes: NDArray[np.float64]  # (3,) logarithms
    paces: NDArray[
        np.float64
    ]  # (3, 2) likewise, of a step and a window of an evaluation; between, a line is taken
    faster: float  # what all cores gain for the run beyond, to whose small batches several have little to do

    @staticmethod
    def of(made: Ladder, runner: Runner, dataset: Dataset) -> Speed:
        V, batch_size = made.vocab_size, made.base.train.batch_size
        models = sorted(
            made.rungs[0][:1] + made.rungs[-1][:1] + made.rungs[-1][-1:],
            key=lambda one: size_of(one, V),
        )
        sizes = np.log([size_of(one, V) for one in models])
        paces = np.log([measured(one, made.compute, dataset)[:2] for one in models])
        alone = Speed(dataset, runner.slots, batch_size, sizes, paces, 1.0)
        last = _slowest_beyond(made)
        all_cores = measured(last, runner.alone(made.compute).compute, dataset).step
        return dataclasses.replace(alone, faster=alone.pace(last, V).step / all_cores)

    def pace(self, config: RunConfig, vocab_size: int) -> Pace:
        x = math.log(size_of(config, vocab_size))
        i = 0 if x < self.sizes[1] else 1
        slope = (self.paces[i + 1] - self.paces[i]) / max(self.sizes[i + 1] - self.sizes[i], 1e-9)
        step, window = np.exp(self.paces[i] + slope * (x - self.sizes[i]))
        return Pace(
            float(step) * config.train.batch_size / self.batch_size, float(window), 0.0, 0.1
        )

    def seconds(self, made: Ladder) -> tuple[float, float]:
        """Of the ladder, and of the run beyond it."""

        def of_core(configs: Sequence[RunConfig]) -> float:
            V = made.vocab_size
            return sum(
                study_setting.START_S + step_timer.run_seconds(one, self.dataset, self.pace(one, V))
                for one in configs
            )

        repeats = [rung[SIZES // 2] for rung in made.rungs]
        tried = [trial.config for trial in tuning(made).values()]
        return of_core(made.cells + repeats + tried) / self.workers, of_core(
            [_slowest_beyond(made)]
        ) / self.faster


def _slowest_beyond(made: Ladder) -> RunConfig:
    """The run beyond at the slowest that it can be: small models do less at once."""
    return beyond(made, made.sizes[len(made.sizes) // 2])


def tuning(made: Ladder) -> dict[tuple[int, float], Trial]:
    """By size and multiple: three rates at a small, a middle and a large size, all on as many tokens.

    On as many as the large one has at the last compute but one: the best rate of a short run is too high for long ones.
    """
    V, seed = made.vocab_size, made.base.train.seed + TUNING_SEED
    models = [made.rungs[0][0], made.rungs[0][COMPUTES - 1], made.rungs[-1][SIZES - 2]]
    steps = at_compute(models[-1], compute_of(made.rungs[-2][0], V), V).train.max_steps
    found = {}
    for model in models:
        N, config = size_of(model, V), lasting(model, steps)
        for times in MULTIPLES:
            found[N, times] = Trial(
                f"tune-n{N}-x{times:.2g}", seeded(config, config.optimizer.lr * times, seed)
            )
    return found


def beyond(made: Ladder, wanted_N: float) -> RunConfig:
    """The run of BEYOND times the largest compute: the size nearest to what is wanted, at most twice the largest."""
    V = made.vocab_size
    least, most = made.sizes[len(made.sizes) // 2], 2 * made.sizes[-1]
    widths = [(d, N) for d, N in _widths(made.base, V) if least <= N <= most]
    d = min(widths, key=lambda pair: abs(math.log(pair[1] / wanted_N)))[0]
    C = BEYOND * made.largest_C
    config = at_compute(with_model(made.base, d_model=d), C, V)
    while compute_of(config, V) < C:  # a rounded number of steps may fall short
        config = lasting(config, config.train.max_steps + 1)
    return config
