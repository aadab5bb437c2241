"""The ladder of a budget: sizes and steps of all runs that fit a time or a compute in FLOPs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.conversion import from_dict, to_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration, round_up_duration
from glasslm.data.dataset import Dataset
from glasslm.errors import InputError
from glasslm.lab.studies import study_plan
from glasslm.lab.studies.ladder import (
    FULL_LADDER,
    Ladder,
    LadderShape,
    build_ladder,
    extrapolation_run,
    matmul_parameters,
    training_flops,
    tuning_trials,
)
from glasslm.lab.studies.measures import MeasureName, require_measure
from glasslm.lab.studies.study_plan import (
    load_plan,
    measure_speed,
    prepare_recipe,
    resolve_compute,
    save_plan,
)
from glasslm.lab.studies.sweep import Runner
from glasslm.runs.blas import warn_of_slow_kernel
from glasslm.runs.metrics import to_json_types
from glasslm.text import Notify, format_duration
from glasslm.training import step_timer
from glasslm.training.evaluation_windows import windows_of
from glasslm.training.plan import LONG_RUN_S
from glasslm.training.step_timer import StepTimer

MIN_STEPS = 30  # of the shortest run: the budget must allow it
CANNOT_GROW = (
    ". A ladder is not extended: its sizes, its learning rates and its prediction follow from its "
    "largest compute"
)
MANY_FLOPS = 1e14  # half an hour on two cores: the time is estimated
PLANNED_SHARE = 0.85  # of a budget of time


def plan_ladder(
    base: RunConfig,
    budget: str,
    runner: Runner,
    study: Path,
    notify: Notify,
    shapes: Sequence[LadderShape] = FULL_LADDER,
    measure: MeasureName = "loss",
) -> Ladder:
    """Fix the sizes and steps of all runs so that they fit the budget, and write plan.json.

    `budget` is a time ("40m") or, as a plain number of at least a million, FLOPs. The first of
    `shapes` is taken that leaves MIN_STEPS to each run. Raises InputError if the budget is too
    small for each of them.
    """
    require_measure(measure, base)
    # A study of the loss has the settings that 0.1.0 wrote.
    settings = [to_dict(base), budget] if measure == "loss" else [to_dict(base), budget, measure]
    flags = to_json_types(settings)
    if saved := load_plan(study, flags, runner.compute, CANNOT_GROW):
        return restore_ladder(saved)
    base, dataset = prepare_recipe(base, notify)
    for shape in shapes:
        ladder, speed, expected = _fit_budget(base, budget, runner, dataset, shape)
        if ladder.min_steps >= MIN_STEPS:
            break
    else:
        smallest = _smallest_budget(base, dataset, runner.compute, speed, shape)
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
            "measure": measure,
        },
    )
    return dataclasses.replace(ladder, measure=measure)


def restore_ladder(saved: dict[str, Any]) -> Ladder:
    """The ladder that plan.json contains."""
    return Ladder(
        base=from_dict(RunConfig, saved["base"]),
        rungs=[[from_dict(RunConfig, config) for config in rung] for rung in saved["rungs"]],
        vocab_size=saved["vocab_size"],
        unique_tokens=saved["unique_tokens"],
        compute=from_dict(ComputeConfig, saved["compute"]),
        final_tokens=saved.get("final_tokens"),
        measure=saved.get("measure", "loss"),
    )


def _fit_budget(
    base: RunConfig, budget: str, runner: Runner, dataset: Dataset, shape: LadderShape
) -> tuple[Ladder, SpeedModel | None, str]:
    """The ladder of this shape for a budget, its speed if the budget is a time, and its length."""
    flops = study_plan.parse_flops(budget)
    if flops is not None:
        ladder = build_ladder(base, flops / shape.study_flops, dataset, runner.compute, shape)
        expected = f"{flops:.3g} FLOPs, without the tuning of learning rates"
        return ladder, None, expected + _long_run_note(ladder, flops, runner, dataset)
    ladder, speed = _fit_time(base, parse_duration(budget), runner, dataset, shape)
    ladder_time, extrapolation_time = map(format_duration, speed.predict_seconds(ladder))
    expected = (
        f"about {ladder_time}, {runner.slots} runs at once, then {extrapolation_time} for the "
        "predicted run"
    )
    return ladder, speed, expected


def _long_run_note(ladder: Ladder, flops: float, runner: Runner, dataset: Dataset) -> str:
    """The expected time of many FLOPs, with the flag that makes it fit; empty for few."""
    if flops < MANY_FLOPS:
        return ""
    seconds = sum(SpeedModel.measure(ladder, runner, dataset).predict_seconds(ladder))
    cure = "; --budget 1h makes it fit into an hour" if seconds > LONG_RUN_S else ""
    return f", about {format_duration(seconds)}{cure}"


def _fit_time(
    base: RunConfig, budget_s: float, runner: Runner, dataset: Dataset, shape: LadderShape
) -> tuple[Ladder, SpeedModel]:
    """The largest ladder whose runs end within the budget, and the speeds that were measured.

    Speeds are measured on a first guess and again on its result, whose batch size may differ.
    """
    V, workers = dataset.tokenizer.vocab_size, runner.slots
    step_s = measure_speed(base, resolve_compute(runner.compute, base, V), dataset).step
    one_step = dataclasses.replace(base, train=dataclasses.replace(base.train, max_steps=1))
    max_flops = training_flops(one_step, V) / step_s
    max_flops *= budget_s * workers
    ladder = build_ladder(base, max_flops / 15, dataset, runner.compute, shape)
    for _ in range(2):
        speed = SpeedModel.measure(ladder, runner, dataset)
        low, high = 1e6, max_flops
        for _ in range(24):
            middle = math.sqrt(low * high)
            try:
                candidate = build_ladder(base, middle, dataset, runner.compute, shape)
                fits = sum(speed.predict_seconds(candidate)) <= PLANNED_SHARE * budget_s
            except InputError:  # it needs wider models than there are
                fits = False
            low, high = (middle, high) if fits else (low, middle)
        ladder = build_ladder(base, low, dataset, runner.compute, shape)
    return ladder, speed


def _smallest_budget(
    base: RunConfig,
    dataset: Dataset,
    compute: ComputeConfig,
    speed: SpeedModel | None,
    shape: LadderShape,
) -> str:
    """The smallest --budget that leaves MIN_STEPS to each run: a time, or FLOPs without `speed`."""
    C = smallest_compute(base, dataset, compute, shape)
    if speed is not None:
        smallest = build_ladder(base, C, dataset, compute, shape)
        return round_up_duration(required_seconds(smallest, speed))
    return f"{1.01 * C * shape.study_flops:.2e}"


def smallest_compute(
    base: RunConfig, dataset: Dataset, compute: ComputeConfig, shape: LadderShape
) -> float:
    """The smallest largest compute, in FLOPs, that leaves MIN_STEPS to every run."""
    low = high = 1e6
    while build_ladder(base, high, dataset, compute, shape).min_steps < MIN_STEPS:
        low, high = high, 2 * high
    for _ in range(10):
        middle = math.sqrt(low * high)
        has_steps = build_ladder(base, middle, dataset, compute, shape).min_steps >= MIN_STEPS
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
                study_plan.run_start_seconds()
                + step_timer.run_seconds(config, self.dataset, self.interpolate(config, V), n)
                for config in configs
            )

        repeats = [rung[len(rung) // 2] for rung in ladder.rungs]
        tuning = [trial.config for trial in tuning_trials(ladder).values()]
        return (
            one_core_seconds(ladder.cells + repeats + tuning) / self.workers,
            one_core_seconds([_slowest_extrapolation_run(ladder)]) / self.speedup,
        )


def _slowest_extrapolation_run(ladder: Ladder) -> RunConfig:
    """The predicted run at its slowest size: small models make less use of a processor."""
    return extrapolation_run(ladder, ladder.sizes[len(ladder.sizes) // 2])
