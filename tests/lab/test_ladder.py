"""A ladder of runs: its sizes, its budgets and the run that it predicts."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration
from glasslm.data.dataset import Dataset, prepare_dataset
from glasslm.data.sources.corpora import find_source
from glasslm.errors import InputError
from glasslm.lab.scaling.law import Observation
from glasslm.lab.scaling.parabolas import fit_parabolas
from glasslm.lab.studies import ladder, ladder_budget
from glasslm.lab.studies.ladder import (
    COMPUTE_GROWTH,
    LADDER_SHAPES,
    Ladder,
    LadderShape,
    matmul_parameters,
    training_flops,
)
from glasslm.lab.studies.sweep import Runner
from glasslm.model.flops import flops_per_token
from glasslm.training.step_timer import StepTimer
from small_runs import small_config, write_text

COMPUTE = ComputeConfig(engine="numpy", precision="fp32", threads=1)
RUNNER = Runner(COMPUTE, workers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 300)


@pytest.fixture(scope="module")
def dataset(text: Path) -> Dataset:
    data = small_config(text).data
    return prepare_dataset(data, find_source(data, lambda message: None), lambda message: None)


def base(text: Path, **flags: Any) -> RunConfig:
    return small_config(
        text, **{"d_model": 128, "n_heads": 4, "n_layers": 4, "block_size": 64} | flags
    ).resolve()


@pytest.mark.parametrize("shape", LADDER_SHAPES)
@pytest.mark.parametrize("largest_C", [3e11, 2e13, 1e16])
def test_sizes_share_each_compute_and_move_on_with_it(
    largest_C: float, shape: LadderShape, text: Path, dataset: Dataset
) -> None:
    design = ladder.build_ladder(base(text), largest_C, dataset, COMPUTE, shape)
    V = design.vocab_size
    n_levels, n_sizes = design.shape
    assert design.shape == shape
    assert [len(rung) for rung in design.rungs] == [n_sizes] * n_levels
    for k, rung in enumerate(design.rungs):
        spent = [training_flops(config, V) for config in rung]
        assert spent == pytest.approx(
            [largest_C / COMPUTE_GROWTH ** (n_levels - 1 - k)] * n_sizes, rel=0.02
        )
    assert len(design.sizes) == n_levels + n_sizes - 1
    for pair in pairwise(design.rungs):  # each size but the ends is met by several computes
        sizes = [[matmul_parameters(config, V) for config in rung] for rung in pair]
        assert sizes[0][1:] == sizes[1][:-1]
    growth = [math.log(b / a) / math.log(COMPUTE_GROWTH) for a, b in pairwise(design.sizes)]
    assert np.mean(growth) == pytest.approx(0.5, abs=0.1)
    assert min(growth) > 0.2
    middle = design.rungs[-1][n_sizes // 2]
    if largest_C >= 2e13:
        assert middle.total_tokens / matmul_parameters(middle, V) == pytest.approx(
            ladder.MIDDLE_TOKENS_PER_PARAMETER, rel=0.5
        )
    observations = [
        Observation(matmul_parameters(config, V), config.total_tokens, 1.0)
        for config in design.cells
    ]
    assert len(fit_parabolas(observations)) == n_levels


def test_only_the_width_grows_and_every_run_is_decayed_in_its_own_time(
    text: Path, dataset: Dataset
) -> None:
    design = ladder.build_ladder(base(text, warmup_steps=50), 2e13, dataset, COMPUTE)
    for config in design.cells:
        c = config.model
        assert (c.n_layers, c.n_heads, c.block_size) == (4, 4, 64)
        assert c.head_size % 2 == 0
        assert config.optimizer.warmup_steps <= config.train.max_steps / 10
        assert config.train.max_steps >= ladder.TARGET_MIN_STEPS
        assert config.train.batch_size == design.base.train.batch_size
        assert config.optimizer.schedule == "cosine"


def test_portions_are_halved_until_the_shortest_run_has_steps_enough(
    text: Path, dataset: Dataset
) -> None:
    large = ladder.build_ladder(base(text, batch_size=64), 3e11, dataset, COMPUTE)
    assert large.base.train.batch_size < 64
    assert min(config.train.max_steps for config in large.cells) >= ladder.TARGET_MIN_STEPS
    assert max(config.train.max_steps for config in large.cells) < 100 * ladder.TARGET_MIN_STEPS


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_ladder_fits_its_time_and_uses_it(text: Path, tmp_path: Path, gain: float) -> None:
    def pace(config: RunConfig, compute: ComputeConfig, dataset: Dataset) -> StepTimer:
        """20 GFLOP/s a core plus a millisecond a step; several cores are faster by the gain."""
        flops = (
            flops_per_token(config.model, dataset.tokenizer.vocab_size) * config.model.block_size
        )
        per_second = 20e9 * (1.0 if compute.threads == 1 else gain)
        return StepTimer(
            config.train.batch_size * flops / per_second + 1e-3 / gain,
            flops / 3 / per_second,
            0.0,
            0.0,
        )

    def seconds(design: Ladder) -> float:
        """Two at once, and the last one alone."""
        every = [*design.cells, *(rung[len(rung) // 2] for rung in design.rungs)]
        every += [trial.config for trial in ladder.tuning_trials(design).values()]
        one_core, two_cores = (ComputeConfig(threads=threads) for threads in (1, 2))
        last = ladder.extrapolation_run(design, design.sizes[-1])
        of_each = sum(
            config.train.max_steps * pace(config, one_core, dataset).step for config in every
        )
        return of_each / 2 + last.train.max_steps * pace(last, two_cores, dataset).step

    messages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder_budget, "measure_speed", pace)
        data = small_config(text).data
        dataset = prepare_dataset(
            data, find_source(data, lambda message: None), lambda message: None
        )
        hour, day = (
            ladder_budget.plan_ladder(
                base(text), budget, RUNNER, tmp_path / budget, messages.append
            )
            for budget in ("1h", "24h")
        )
        assert 0.5 * 3600 < seconds(hour) < 3600
        assert 0.7 * 86400 < seconds(day) < 86400
        assert day.largest_C > 15 * hour.largest_C
        assert "2 runs at once" in messages[-1]
        patch.setattr(
            ladder_budget, "measure_speed", lambda *arguments: StepTimer(1.0, 1.0, 1.0, 1.0)
        )  # by now another machine
        again = ladder_budget.plan_ladder(
            base(text), "1h", RUNNER, tmp_path / "1h", messages.append
        )
        assert again == hour
        with pytest.raises(InputError, match="other settings"):
            ladder_budget.plan_ladder(
                base(text, lr=0.5), "1h", RUNNER, tmp_path / "1h", messages.append
            )
        fp64 = Runner(ComputeConfig(precision="fp64"))
        with pytest.raises(InputError, match="give --precision fp32, or choose another folder"):
            ladder_budget.plan_ladder(base(text), "1h", fp64, tmp_path / "1h", messages.append)


@pytest.mark.parametrize(("budget", "gflops"), [("1s", 20), ("8s", 1), ("1.5e6", 20), ("3e9", 20)])
def test_a_budget_that_is_too_small_names_the_smallest_that_works(
    budget: str, gflops: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_speed(config: RunConfig, compute: ComputeConfig, dataset: Dataset) -> StepTimer:
        tokens = config.train.batch_size * config.model.block_size
        flops = tokens * flops_per_token(config.model, dataset.tokenizer.vocab_size)
        return StepTimer(flops / (gflops * 1e9) + 1e-3, 1e-3, 0.0, 0.0)

    def plan(budget: str) -> Ladder:
        return ladder_budget.plan_ladder(
            base(text), budget, RUNNER, tmp_path / budget, lambda message: None
        )

    monkeypatch.setattr(ladder_budget, "measure_speed", fake_speed)
    with pytest.raises(InputError, match=r"expected 30: give --budget (\S+) or more") as refused:
        plan(budget)
    named = str(refused.value).partition("give --budget ")[2].partition(" ")[0]
    assert plan(named).min_steps >= ladder_budget.MIN_STEPS
    unit = "s" if named.endswith(("s", "m")) else ""
    number = parse_duration(named) if unit else float(named)
    with pytest.raises(InputError, match="give --budget"):
        plan(f"{number * 0.6:g}{unit}")


def test_a_budget_in_flops_is_what_is_spent(text: Path, tmp_path: Path) -> None:
    design = ladder_budget.plan_ladder(base(text), "1e13", RUNNER, tmp_path, lambda message: None)
    V = design.vocab_size
    spent = sum(training_flops(config, V) for config in design.cells)
    spent += sum(training_flops(rung[len(rung) // 2], V) for rung in design.rungs)
    assert spent + training_flops(
        ladder.extrapolation_run(design, design.sizes[4]), V
    ) == pytest.approx(1e13, rel=0.02)


def test_the_run_beyond_has_four_times_the_compute_wherever_the_law_wants_it(
    text: Path, dataset: Dataset
) -> None:
    design = ladder.build_ladder(base(text), 2e13, dataset, COMPUTE)
    for wanted in (1.0, design.sizes[-1], 1e12):
        config = ladder.extrapolation_run(design, wanted)
        N = matmul_parameters(config, design.vocab_size)
        assert 4 <= training_flops(config, design.vocab_size) / design.largest_C < 4.1
        assert design.sizes[0] < N <= 2 * design.sizes[-1]
    assert (
        matmul_parameters(ladder.extrapolation_run(design, 1e12), design.vocab_size)
        > 1.5 * design.sizes[-1]
    )
