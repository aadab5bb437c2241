"""The runs of a scaling study: sizes x compute, and a larger run that is predicted.

At each of COMPUTE_LEVELS budgets of compute, SIZES_PER_LEVEL sizes share it (an IsoFLOP design,
approach 2 of arXiv:2203.15556): small models see more tokens, large ones fewer. From one budget to
the next, sizes grow by the square root of the compute, so that each size occurs in several budgets
and each number of tokens with several sizes. C = 6 N D throughout, where N counts the parameters
that multiply a token, the head included. Only the width grows; depth and the number of heads stay
the same.
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

from glasslm.config.conversion import from_dict, to_dict, with_flags, with_model
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration, round_up_duration
from glasslm.data.dataset import Dataset
from glasslm.errors import InputError
from glasslm.lab.studies import study_plan
from glasslm.lab.studies.study_plan import (
    TUNING_SEED_OFFSET,
    load_plan,
    measure_speed,
    prepare_recipe,
    resolve_compute,
    save_plan,
    with_rate_and_seed,
    with_sparse_logging,
)
from glasslm.lab.studies.sweep import Runner, Trial
from glasslm.model.parameters import parameter_table
from glasslm.runs.blas import warn_of_slow_kernel
from glasslm.runs.metrics import to_json_types
from glasslm.text import Notify, format_duration
from glasslm.training import step_timer
from glasslm.training.evaluation_windows import windows_of
from glasslm.training.step_timer import StepTimer

COMPUTE_LEVELS = 4  # budgets of compute
SIZES_PER_LEVEL = 5
COMPUTE_GROWTH = 3.0  # the factor from budget to budget
# At the middle size. The optimum is 32 to 56 for characters (docs/log.md) and about 20 for
# subwords.
MIDDLE_TOKENS_PER_PARAMETER = 40.0
EXTRAPOLATION_FACTOR = 4.0  # the compute of the predicted run, in multiples of the ladder's largest
# The FLOPs of all runs without the tuning of rates, in multiples of the largest compute.
STUDY_FLOPS = (SIZES_PER_LEVEL + 1) * sum(
    COMPUTE_GROWTH**-k for k in range(COMPUTE_LEVELS)
) + EXTRAPOLATION_FACTOR
TARGET_MIN_STEPS = 100  # of the shortest run: the batch is halved to reach it
MIN_STEPS = 30  # of the shortest run: the budget must allow it
PLANNED_SHARE = 0.85  # of a budget of time
RATE_MULTIPLES = (1 / 3, 1.0, 3.0)  # of the recipe's learning rate, tried at three sizes
MAX_WIDTHS = 256


@dataclass(frozen=True)
class Ladder:
    """Everything that determines the runs of a scaling study, except their learning rates."""

    base: RunConfig
    rungs: list[list[RunConfig]]  # the sizes of each compute, the smallest first
    vocab_size: int
    unique_tokens: int
    compute: ComputeConfig  # of each run
    final_tokens: int | None = None  # of the final measurement; None: the whole split

    @property
    def cells(self) -> list[RunConfig]:
        """The configurations of all rungs."""
        return [config for rung in self.rungs for config in rung]

    @cached_property
    def sizes(self) -> list[int]:
        """The different N, the smallest first."""
        return sorted({matmul_parameters(config, self.vocab_size) for config in self.cells})

    @property
    def min_steps(self) -> int:
        """The steps of the shortest run."""
        return min(config.train.max_steps for config in self.cells)

    @cached_property
    def largest_C(self) -> float:
        return max(training_flops(config, self.vocab_size) for config in self.cells)


def matmul_parameters(config: RunConfig, vocab_size: int) -> int:
    """N: the number of parameters that multiply a token."""
    return parameter_table(config.model.resolve(), vocab_size).matmul


def training_flops(config: RunConfig, vocab_size: int) -> float:
    """C = 6 N D of a run."""
    return 6.0 * matmul_parameters(config, vocab_size) * config.total_tokens


# -- the plan --------------------------------------------------------------------------------------


def plan_ladder(
    base: RunConfig, budget: str, runner: Runner, study: Path, notify: Notify
) -> Ladder:
    """Fix the sizes and steps of all runs so that they fit the budget, and write plan.json.

    `budget` is a time ("40m") or, as a plain number of at least a million, FLOPs. Raises InputError
    if it is too small.
    """
    flags = to_json_types([to_dict(base), budget])
    if saved := load_plan(study, flags):
        rungs = [[from_dict(RunConfig, config) for config in rung] for rung in saved["rungs"]]
        return Ladder(
            base=from_dict(RunConfig, saved["base"]),
            rungs=rungs,
            vocab_size=saved["vocab_size"],
            unique_tokens=saved["unique_tokens"],
            compute=from_dict(ComputeConfig, saved["compute"]),
            final_tokens=saved.get("final_tokens"),
        )
    base, dataset = prepare_recipe(base, notify)
    flops = study_plan.parse_flops(budget)
    if flops is None:
        ladder, speed = _fit_time(base, parse_duration(budget), runner, dataset)
        ladder_time, extrapolation_time = map(format_duration, speed.predict_seconds(ladder))
        expected = (
            f"about {ladder_time}, {runner.slots} runs at once, then {extrapolation_time} for the "
            "predicted run"
        )
    else:
        ladder, speed = build_ladder(base, flops / STUDY_FLOPS, dataset, runner.compute), None
        expected = f"{flops:.3g} FLOPs, without the tuning of learning rates"
    if ladder.min_steps < MIN_STEPS:
        smallest = _smallest_budget(base, dataset, runner.compute, speed)
        raise InputError(
            f"--budget {budget} leaves {ladder.min_steps} steps to the shortest run, expected "
            f"{MIN_STEPS}: give --budget {smallest} or more, or a smaller --block-size"
        )
    warn_of_slow_kernel(ladder.compute, notify)
    sizes = ladder.sizes
    notify(
        f"{len(ladder.cells)} runs of {len(sizes)} sizes, {sizes[0]:,} to {sizes[-1]:,} "
        f"parameters, up to {ladder.largest_C:.3g} FLOPs: {expected}"
    )
    save_plan(
        study,
        flags,
        {
            "base": to_dict(ladder.base),
            "rungs": [[to_dict(config) for config in rung] for rung in ladder.rungs],
            "vocab_size": ladder.vocab_size,
            "unique_tokens": ladder.unique_tokens,
            "compute": to_dict(ladder.compute),
            "final_tokens": ladder.final_tokens,
        },
    )
    return ladder


def build_ladder(
    base: RunConfig, largest_C: float, dataset: Dataset, compute: ComputeConfig
) -> Ladder:
    """The ladder with this largest compute.

    The middle size of each compute has MIDDLE_TOKENS_PER_PARAMETER, unless smaller sizes would be
    narrower than the narrowest model. Raises InputError if the recipe cannot be made wide enough.
    """
    V = dataset.tokenizer.vocab_size
    widths = _list_widths(base, V)
    computes = [
        largest_C / COMPUTE_GROWTH ** (COMPUTE_LEVELS - 1 - k) for k in range(COMPUTE_LEVELS)
    ]
    smallest = math.sqrt(computes[0] / (6 * MIDDLE_TOKENS_PER_PARAMETER)) / COMPUTE_GROWTH ** (
        (SIZES_PER_LEVEL - 1) / 4
    )
    first = max(smallest, widths[1][1])
    chosen: list[int] = []
    for i in range(COMPUTE_LEVELS + SIZES_PER_LEVEL - 1):
        target_N = first * COMPUTE_GROWTH ** (i / 2)
        larger = [pair for pair in widths if not chosen or pair[0] > chosen[-1]]
        if not larger or larger[-1][1] < target_N / 2:
            raise InputError(
                f"{largest_C:.3g} FLOPs need models of {target_N:.3g} parameters, but the widest "
                f"model of this recipe has {widths[-1][1]:,} (width {widths[-1][0]}): give a "
                "smaller budget, or more --n-layers"
            )
        chosen.append(min(larger, key=lambda pair: abs(math.log(pair[1] / target_N)))[0])
    models = [with_model(base, d_model=d) for d in chosen]
    batch = base.train.batch_size
    largest_of_first = models[SIZES_PER_LEVEL - 1]
    shortest_rows = (
        computes[0] / (6 * matmul_parameters(largest_of_first, V)) / base.model.block_size
    )
    while batch > 1 and shortest_rows / batch < TARGET_MIN_STEPS:
        batch //= 2
    base = with_flags(base, {"batch_size": batch})
    rungs = [
        [
            with_compute(with_flags(model, {"batch_size": batch}), C, V)
            for model in models[k : k + SIZES_PER_LEVEL]
        ]
        for k, C in enumerate(computes)
    ]
    compute = resolve_compute(compute, models[-1], V)
    measured = study_plan.final_tokens(rungs[COMPUTE_LEVELS // 2][SIZES_PER_LEVEL // 2], dataset)
    return Ladder(base, rungs, V, len(dataset.train.tokens), compute, measured)


@cache
def _list_widths(base: RunConfig, vocab_size: int) -> list[tuple[int, int]]:
    """(width, N) of the models that the recipe can be widened to, the narrowest first."""
    step = 2 * base.model.n_heads  # rotary positions need an even head size
    return [
        (d, matmul_parameters(with_model(base, d_model=d), vocab_size))
        for d in range(step, MAX_WIDTHS * step + 1, step)
    ]


def with_compute(config: RunConfig, C: float, vocab_size: int) -> RunConfig:
    """`config` with the number of steps that C = 6 N D allows its size."""
    batch_tokens = config.tokens_per_step
    step_flops = 6.0 * matmul_parameters(config, vocab_size) * batch_tokens
    return with_steps_and_warmup(config, max(1, round(C / step_flops)))


def with_steps_and_warmup(config: RunConfig, steps: int) -> RunConfig:
    """`config` with this number of steps, of which at most a tenth are warmup."""
    warmup = min(config.optimizer.warmup_steps, steps // 10)
    changed = with_flags(config, {"max_steps": steps, "warmup_steps": warmup})
    return with_sparse_logging(changed).resolve()


def _fit_time(
    base: RunConfig, budget_s: float, runner: Runner, dataset: Dataset
) -> tuple[Ladder, SpeedModel]:
    """The largest ladder whose runs end within the budget, and the speeds that were measured.

    Speeds are measured on a first guess and again on its result, whose batch size may differ.
    """
    V, workers = dataset.tokenizer.vocab_size, runner.slots
    step_s = measure_speed(base, resolve_compute(runner.compute, base, V), dataset).step
    one_step = dataclasses.replace(base, train=dataclasses.replace(base.train, max_steps=1))
    max_flops = training_flops(one_step, V) / step_s
    max_flops *= budget_s * workers
    ladder = build_ladder(base, max_flops / 15, dataset, runner.compute)
    for _ in range(2):
        speed = SpeedModel.measure(ladder, runner, dataset)
        low, high = 1e6, max_flops
        for _ in range(24):
            middle = math.sqrt(low * high)
            try:
                candidate = build_ladder(base, middle, dataset, runner.compute)
                fits = sum(speed.predict_seconds(candidate)) <= PLANNED_SHARE * budget_s
            except InputError:  # it needs wider models than there are
                fits = False
            low, high = (middle, high) if fits else (low, middle)
        ladder = build_ladder(base, low, dataset, runner.compute)
    return ladder, speed


def _smallest_budget(
    base: RunConfig, dataset: Dataset, compute: ComputeConfig, speed: SpeedModel | None
) -> str:
    """The smallest --budget that leaves MIN_STEPS to each run: a time, or FLOPs without `speed`."""
    C = smallest_compute(base, dataset, compute)
    if speed is not None:
        return round_up_duration(required_seconds(build_ladder(base, C, dataset, compute), speed))
    return f"{1.01 * C * STUDY_FLOPS:.2e}"


def smallest_compute(base: RunConfig, dataset: Dataset, compute: ComputeConfig) -> float:
    """The smallest largest compute, in FLOPs, that leaves MIN_STEPS to every run."""
    low = high = 1e6
    while build_ladder(base, high, dataset, compute).min_steps < MIN_STEPS:
        low, high = high, 2 * high
    for _ in range(10):
        middle = math.sqrt(low * high)
        has_steps = build_ladder(base, middle, dataset, compute).min_steps >= MIN_STEPS
        low, high = (low, middle) if has_steps else (middle, high)
    return high


def required_seconds(ladder: Ladder, speed: SpeedModel) -> float:
    """The budget for a ladder, a tenth longer than the measured speed requires."""
    return 1.1 * sum(speed.predict_seconds(ladder)) / PLANNED_SHARE


@dataclass(frozen=True)
class SpeedModel:
    """The speed of runs on this machine: measured at three sizes, interpolated in logarithms."""

    dataset: Dataset
    workers: int
    batch_size: int
    log_sizes: NDArray[np.float64]  # (3,)
    log_times: NDArray[np.float64]  # (3, 2) seconds of a step and of a window of an evaluation
    speedup: float  # of the predicted run by all cores; small batches gain little from several

    @staticmethod
    def measure(ladder: Ladder, runner: Runner, dataset: Dataset) -> SpeedModel:
        V, batch_size = ladder.vocab_size, ladder.base.train.batch_size
        models = sorted(
            ladder.rungs[0][:1] + ladder.rungs[-1][:1] + ladder.rungs[-1][-1:],
            key=lambda config: matmul_parameters(config, V),
        )
        log_sizes = np.log([matmul_parameters(config, V) for config in models])
        log_times = np.log(
            [measure_speed(config, ladder.compute, dataset)[:2] for config in models]
        )
        one_core = SpeedModel(dataset, runner.slots, batch_size, log_sizes, log_times, 1.0)
        last = _slowest_extrapolation_run(ladder)
        all_cores = runner.with_all_cores(ladder.compute).compute
        all_cores_s = measure_speed(last, all_cores, dataset).step
        return dataclasses.replace(
            one_core, speedup=one_core.interpolate(last, V).step / all_cores_s
        )

    def interpolate(self, config: RunConfig, vocab_size: int) -> StepTimer:
        """The times of a run of this size on one core."""
        x = math.log(matmul_parameters(config, vocab_size))
        i = 0 if x < self.log_sizes[1] else 1
        slope = (self.log_times[i + 1] - self.log_times[i]) / max(
            self.log_sizes[i + 1] - self.log_sizes[i], 1e-9
        )
        step, window = np.exp(self.log_times[i] + slope * (x - self.log_sizes[i]))
        return StepTimer(
            float(step) * config.train.batch_size / self.batch_size, float(window), 0.0, 0.1
        )

    def predict_seconds(self, ladder: Ladder) -> tuple[float, float]:
        """The time of the ladder with its tuning, and that of the predicted run."""

        def one_core_seconds(configs: Sequence[RunConfig]) -> float:
            V, n = ladder.vocab_size, windows_of(ladder.final_tokens, ladder.base)
            return sum(
                study_plan.RUN_START_S
                + step_timer.run_seconds(config, self.dataset, self.interpolate(config, V), n)
                for config in configs
            )

        repeats = [rung[SIZES_PER_LEVEL // 2] for rung in ladder.rungs]
        tuning = [trial.config for trial in tuning_trials(ladder).values()]
        return (
            one_core_seconds(ladder.cells + repeats + tuning) / self.workers,
            one_core_seconds([_slowest_extrapolation_run(ladder)]) / self.speedup,
        )


def _slowest_extrapolation_run(ladder: Ladder) -> RunConfig:
    """The predicted run at its slowest size: small models make less use of a processor."""
    return extrapolation_run(ladder, ladder.sizes[len(ladder.sizes) // 2])


def tuning_trials(ladder: Ladder) -> dict[tuple[int, float], Trial]:
    """Three learning rates at a small, a middle and a large size, by (N, multiple).

    All have the same number of tokens. The number of tokens is that of the large size at the last
    compute but one: the best rate of a shorter run is too high for long ones.
    """
    V, seed = ladder.vocab_size, ladder.base.train.seed + TUNING_SEED_OFFSET
    models = [
        ladder.rungs[0][0],
        ladder.rungs[0][COMPUTE_LEVELS - 1],
        ladder.rungs[-1][SIZES_PER_LEVEL - 2],
    ]
    C = training_flops(ladder.rungs[-2][0], V)
    steps = with_compute(models[-1], C, V).train.max_steps
    trials = {}
    for model in models:
        N, config = matmul_parameters(model, V), with_steps_and_warmup(model, steps)
        for multiple in RATE_MULTIPLES:
            tuned = with_rate_and_seed(config, config.optimizer.lr * multiple, seed)
            trials[N, multiple] = Trial(f"tune-n{N}-x{multiple:.2g}", tuned)
    return trials


def extrapolation_run(ladder: Ladder, optimal_N: float) -> RunConfig:
    """The run with EXTRAPOLATION_FACTOR times the largest compute, nearest to `optimal_N`.

    The size is at least the ladder's median and at most twice its largest.
    """
    V = ladder.vocab_size
    min_N, max_N = ladder.sizes[len(ladder.sizes) // 2], 2 * ladder.sizes[-1]
    widths = [(d, N) for d, N in _list_widths(ladder.base, V) if min_N <= N <= max_N]
    d = min(widths, key=lambda pair: abs(math.log(pair[1] / optimal_N)))[0]
    C = EXTRAPOLATION_FACTOR * ladder.largest_C
    config = with_compute(with_model(ladder.base, d_model=d), C, V)
    while training_flops(config, V) < C:  # rounding may leave a step too few
        config = with_steps_and_warmup(config, config.train.max_steps + 1)
    return config
