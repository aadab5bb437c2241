"""The runs of a scaling study: sizes x compute, and a larger run that is predicted.

At each of four budgets of compute, five sizes share it (an IsoFLOP design,
approach 2 of arXiv:2203.15556): small models see more tokens, large ones fewer. From one budget to
the next, sizes grow by the square root of the compute, so that each size occurs in several budgets
and each number of tokens with several sizes. C = 6 N D throughout, where N counts the parameters
that multiply a token, the head included. Only the width grows; depth and the number of heads stay
the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from glasslm.config.conversion import with_flags, with_model
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.dataset import Dataset
from glasslm.errors import InputError
from glasslm.lab.studies import study_plan
from glasslm.lab.studies.measures import MeasureName
from glasslm.lab.studies.study_plan import (
    TUNING_SEED_OFFSET,
    resolve_compute,
    with_rate_and_seed,
    with_sparse_logging,
)
from glasslm.lab.studies.sweep import Trial
from glasslm.model.parameters import parameter_table

COMPUTE_GROWTH = 3.0  # the factor from budget to budget
# At the middle size. The optimum is 32 to 56 for characters (docs/log.md) and about 20 for
# subwords.
MIDDLE_TOKENS_PER_PARAMETER = 40.0
EXTRAPOLATION_FACTOR = 4.0  # the compute of the predicted run, in multiples of the ladder's largest
TARGET_MIN_STEPS = 100  # of the shortest run: the batch is halved to reach it
RATE_MULTIPLES = (1 / 3, 1.0, 3.0)  # of the recipe's learning rate, tried at three sizes
MAX_WIDTHS = 256


class LadderShape(NamedTuple):
    """The number of runs of a ladder."""

    n_levels: int  # budgets of compute
    n_sizes: int  # at each budget

    @property
    def n_runs(self) -> int:
        """The runs of the ladder; the middle size of each budget has two seeds."""
        return self.n_levels * (self.n_sizes + 1)

    @property
    def study_flops(self) -> float:
        """The FLOPs of all runs but the tuning of rates, in multiples of the largest compute."""
        levels = sum(COMPUTE_GROWTH**-k for k in range(self.n_levels))
        return (self.n_sizes + 1) * levels + EXTRAPOLATION_FACTOR


# The ladder of a study, and smaller ones for a time that is too short for it. A law needs three
# sizes at three budgets.
LADDER_SHAPES = (LadderShape(4, 5), LadderShape(3, 4), LadderShape(3, 3))
FULL_LADDER = LADDER_SHAPES[:1]


@dataclass(frozen=True)
class Ladder:
    """Everything that determines the runs of a scaling study, except their learning rates."""

    base: RunConfig
    rungs: list[list[RunConfig]]  # the sizes of each compute, the smallest first
    vocab_size: int
    unique_tokens: int
    compute: ComputeConfig  # of each run
    final_tokens: int | None = None  # of the final measurement; None: the whole split
    measure: MeasureName = "loss"

    @property
    def shape(self) -> LadderShape:
        return LadderShape(len(self.rungs), len(self.rungs[0]))

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


def build_ladder(
    base: RunConfig,
    largest_C: float,
    dataset: Dataset,
    compute: ComputeConfig,
    shape: LadderShape = LADDER_SHAPES[0],
) -> Ladder:
    """The ladder with this largest compute.

    The middle size of each compute has MIDDLE_TOKENS_PER_PARAMETER, unless smaller sizes would be
    narrower than the narrowest model. Raises InputError if the recipe cannot be made wide enough.
    """
    V = dataset.tokenizer.vocab_size
    widths = _list_widths(base, V)
    n_levels, n_sizes = shape
    computes = [largest_C / COMPUTE_GROWTH ** (n_levels - 1 - k) for k in range(n_levels)]
    smallest = math.sqrt(computes[0] / (6 * MIDDLE_TOKENS_PER_PARAMETER)) / COMPUTE_GROWTH ** (
        (n_sizes - 1) / 4
    )
    first = max(smallest, widths[1][1])
    chosen: list[int] = []
    for i in range(n_levels + n_sizes - 1):
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
    largest_of_first = models[n_sizes - 1]
    shortest_rows = (
        computes[0] / (6 * matmul_parameters(largest_of_first, V)) / base.model.block_size
    )
    while batch > 1 and shortest_rows / batch < TARGET_MIN_STEPS:
        batch //= 2
    base = with_flags(base, {"batch_size": batch})
    rungs = [
        [
            with_compute(with_flags(model, {"batch_size": batch}), C, V)
            for model in models[k : k + n_sizes]
        ]
        for k, C in enumerate(computes)
    ]
    compute = resolve_compute(compute, models[-1], V)
    measured = study_plan.final_tokens(rungs[n_levels // 2][n_sizes // 2], dataset)
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


def tuning_trials(ladder: Ladder) -> dict[tuple[int, float], Trial]:
    """Three learning rates at a small, a middle and a large size, by (N, multiple).

    All have the same number of tokens. The number of tokens is that of the large size at the last
    compute but one: the best rate of a shorter run is too high for long ones.
    """
    V, seed = ladder.vocab_size, ladder.base.train.seed + TUNING_SEED_OFFSET
    models = [
        ladder.rungs[0][0],
        ladder.rungs[0][ladder.shape.n_levels - 1],
        ladder.rungs[-1][ladder.shape.n_sizes - 2],
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
