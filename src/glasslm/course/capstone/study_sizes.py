"""The sizes of a capstone's studies: the largest that fits its time is made, instead of none.

An ablation shrinks in its baseline, then in its axes; a scaling study in its sizes and budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from glasslm.config.conversion import with_flags, with_model
from glasslm.config.schema import RunConfig
from glasslm.errors import InputError
from glasslm.lab.studies import ablation, ladder_budget
from glasslm.lab.studies.ablation import AblationSpec
from glasslm.lab.studies.ablation_axes import variants
from glasslm.lab.studies.ablation_budget import affordable_steps, relative_costs, required_seconds
from glasslm.lab.studies.ladder import LADDER_SHAPES, build_ladder
from glasslm.lab.studies.study_plan import measure_speed, prepare_recipe, resolve_compute
from glasslm.lab.studies.sweep import Runner, run_flops
from glasslm.text import Notify, plural

SEEDS = 3
# Layers, width and heads of the study that courses ask for, and of smaller ones like it. The first
# that allows MIN_STEPS is taken. The depths of the study are 1/3, 2/3, 1, 4/3 and 2 times the
# baseline's, its widths 1/6, 1/3, 2/3, 1 and 4/3 times.
BASELINES = ((6, 384, 6), (6, 192, 6), (6, 96, 6), (3, 96, 6), (3, 48, 6))
MIN_STEPS, BATCH_SIZE, MAX_CONTEXT = 400, 16, 128
# The axes of each level, with multiples of the baseline's depth (in thirds) and width (in sixths).
LEVELS = (
    ("depth=1/2/3/4/6", "width=1/2/4/6/8", "heads", "activation", "norm"),
    ("depth=1/2/3", "width=2/4/6", "activation", "norm"),
    ("depth=2/3", "activation=relu/swiglu"),
)
SPARE_STEPS = 2.0  # times ablation.MIN_STEPS: with fewer, the next level has longer runs
SPEED_MARGIN = 1.3  # of the smallest times: studies measure the speed again, at another moment
MIN_RUN_SHARE = 0.1  # of the budget


class AblationDesign(NamedTuple):
    """What an ablation compares, and around which baseline."""

    shape: tuple[int, int, int]  # layers, width and heads of the baseline
    level: int = 0  # of LEVELS

    @property
    def axes(self) -> list[str]:
        """The axes with their values."""
        L, d, _ = self.shape
        units = {"depth": L / 3, "width": d / 6}
        axes = []
        for axis in LEVELS[self.level]:
            name, _, multiples = axis.partition("=")
            if name in units:
                values = [str(int(units[name] * int(times))) for times in multiples.split("/")]
                axis = f"{name}={'/'.join(values)}"
            axes.append(axis)
        return axes

    def baseline(self, recipe: RunConfig) -> RunConfig:
        """The recipe with the shape of this design."""
        block_size = min(MAX_CONTEXT, recipe.model.block_size)
        recipe = with_flags(recipe, {"batch_size": BATCH_SIZE, "block_size": block_size})
        L, d, n_heads = self.shape
        return with_model(recipe, n_layers=L, d_model=d, n_heads=n_heads, n_kv_heads=0, d_ff=0)

    def configs(self, recipe: RunConfig) -> list[RunConfig]:
        """The baseline, as the first one, and the variants."""
        base = self.baseline(recipe).resolve()
        return [base, *(variant.config for variant in variants(self.axes, base))]


class StudySize(NamedTuple):
    """A size of a part of a capstone: the time it needs, and its description."""

    seconds: float  # infinite for one that cannot be made
    description: str = ""


def list_sizes(
    base: RunConfig, runner: Runner, budget_s: float, notify: Notify
) -> dict[str, list[StudySize]]:
    """The sizes of each part, the largest first, with their smallest times on this machine."""
    recipe, dataset = prepare_recipe(base, notify)
    V = dataset.tokenizer.vocab_size
    smallest = AblationDesign(BASELINES[-1])
    baseline = smallest.baseline(recipe).resolve()
    compute = resolve_compute(runner.compute, baseline, V)
    step_s = measure_speed(baseline, compute, dataset).step
    ablations, ladders = [], []
    for level in range(len(LEVELS)):
        base, *others = smallest._replace(level=level).configs(recipe)
        costs = relative_costs(base, others, "tokens", V)
        seconds = required_seconds(ablation.MIN_STEPS, costs, SEEDS, runner.slots, step_s)
        described = f"{plural(len(others), 'variant')}, {plural(SEEDS, 'seed')}"
        ablations.append(StudySize(SPEED_MARGIN * seconds, described))
    for shape in LADDER_SHAPES:
        try:
            C = ladder_budget.smallest_compute(recipe, dataset, runner.compute, shape)
            rungs = build_ladder(recipe, C, dataset, runner.compute, shape)
            speed = ladder_budget.SpeedModel.measure(rungs, runner, dataset)
            seconds = ladder_budget.required_seconds(rungs, speed)
        except InputError:  # the recipe cannot be made wide enough
            seconds = math.inf
        ladders.append(StudySize(SPEED_MARGIN * seconds, f"{shape.n_runs} runs and a prediction"))
    run = [StudySize(SPEED_MARGIN * MIN_RUN_SHARE * budget_s)]
    return {"run": run, "ablation": ablations, "scaling": ladders}


def choose_design(
    recipe: RunConfig, budget_s: float, runner: Runner, notify: Notify
) -> AblationDesign:
    """The largest ablation for which there is time at the speed of this moment.

    The first baseline that allows MIN_STEPS with all axes; then, around the smallest baseline, the
    first level with SPARE_STEPS, or the last one.
    """
    recipe, dataset = prepare_recipe(recipe, notify)
    V = dataset.tokenizer.vocab_size

    def steps_of(design: AblationDesign) -> int:
        base, *others = configs = design.configs(recipe)
        most_expensive = max(configs, key=lambda config: run_flops(config, V))
        compute = resolve_compute(runner.compute, most_expensive, V)
        costs = relative_costs(base, others, "tokens", V)
        step_s = measure_speed(base, compute, dataset).step
        return affordable_steps(budget_s, costs, SEEDS, runner.slots, step_s)

    for shape in BASELINES:
        if steps_of(AblationDesign(shape)) >= MIN_STEPS:
            return AblationDesign(shape)
    designs = [AblationDesign(BASELINES[-1], level) for level in range(len(LEVELS))]
    for design in designs[:-1]:
        if steps_of(design) >= SPARE_STEPS * ablation.MIN_STEPS:
            return design
    return designs[-1]


def ablation_spec(design: Sequence[int], time_s: float) -> tuple[AblationDesign, AblationSpec]:
    """The design that capstone.json stores as numbers, and the study of it."""
    *shape, level = design if len(design) > 3 else (*design, 0)  # older ones have no level
    L, d, n_heads = shape
    chosen = AblationDesign((L, d, n_heads), level)
    return chosen, AblationSpec(tuple(chosen.axes), SEEDS, budget=f"{time_s:g}s")
