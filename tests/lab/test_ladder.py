"""A ladder of scaling: its design, its rates, and a prediction that is written before what it predicts is trained."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import cli
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data import shards
from glasslm.data.shards import Dataset
from glasslm.data.sources.corpora import find
from glasslm.errors import InputError
from glasslm.lab.scaling import isoflop
from glasslm.lab.scaling.law import Law, Observation
from glasslm.lab.scaling.table import read
from glasslm.lab.studies import ladder, scaling_report, scaling_study
from glasslm.lab.studies.ladder import (
    COMPUTES,
    GROWTH,
    SIZES,
    Ladder,
    compute_of,
    size_of,
    tokens_of,
)
from glasslm.lab.studies.scaling_study import Study
from glasslm.lab.studies.sweep import Ended, Runner, Trial
from glasslm.lab.studies.trial_results import Row
from glasslm.model.flops import flops_per_token
from glasslm.runs.run_folder import Run
from glasslm.training.step_timer import Pace
from small_runs import small, write_text

TRUE = Law(alpha=0.36, beta=0.31, A=35.0, B=55.0, E=1.1)
COMPUTE = ComputeConfig(engine="numpy", precision="fp32", threads=1)
RUNNER = Runner(COMPUTE, workers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 300)


@pytest.fixture(scope="module")
def dataset(text: Path) -> Dataset:
    data = small(text).data
    return shards.prepare(data, find(data, lambda message: None), lambda message: None)


@pytest.fixture(scope="module")
def V(dataset: Dataset) -> int:
    return dataset.tokenizer.vocab_size


def base(text: Path, **flags: Any) -> RunConfig:
    return small(
        text, **{"d_model": 128, "n_heads": 4, "n_layers": 4, "block_size": 64} | flags
    ).resolved()


# -- the design -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest_C", [3e11, 2e13, 1e16])
def test_sizes_share_each_compute_and_move_on_with_it(
    largest_C: float, text: Path, dataset: Dataset
) -> None:
    made = ladder.built(base(text), largest_C, dataset, COMPUTE)
    V = made.vocab_size
    assert [len(rung) for rung in made.rungs] == [SIZES] * COMPUTES
    for k, rung in enumerate(made.rungs):
        spent = [compute_of(config, V) for config in rung]
        assert spent == pytest.approx([largest_C / GROWTH ** (COMPUTES - 1 - k)] * SIZES, rel=0.02)
    assert len(made.sizes) == COMPUTES + SIZES - 1
    for one, following in pairwise(made.rungs):  # each size but the ends is met by several computes
        sizes = [[size_of(config, V) for config in rung] for rung in (one, following)]
        assert sizes[0][1:] == sizes[1][:-1]
    growth = [math.log(b / a) / math.log(GROWTH) for a, b in pairwise(made.sizes)]
    assert np.mean(growth) == pytest.approx(0.5, abs=0.1)
    assert min(growth) > 0.2
    middle = made.rungs[-1][SIZES // 2]
    if largest_C >= 2e13:
        assert tokens_of(middle) / size_of(middle, V) == pytest.approx(ladder.MIDDLE, rel=0.5)
    observations = [Observation(size_of(one, V), tokens_of(one), 1.0) for one in made.cells]
    assert len(isoflop.parabolas(observations)) == COMPUTES


def test_only_the_width_grows_and_every_run_is_decayed_in_its_own_time(
    text: Path, dataset: Dataset
) -> None:
    made = ladder.built(base(text, warmup_steps=50), 2e13, dataset, COMPUTE)
    for config in made.cells:
        c = config.model
        assert (c.n_layers, c.n_heads, c.block_size) == (4, 4, 64)
        assert c.head_size % 2 == 0
        assert config.optimizer.warmup_steps <= config.train.max_steps / 10
        assert config.train.max_steps >= ladder.FEWEST_STEPS
        assert config.train.batch_size == made.base.train.batch_size
        assert config.optimizer.schedule == "cosine"


def test_portions_are_halved_until_the_shortest_run_has_steps_enough(
    text: Path, dataset: Dataset
) -> None:
    large = ladder.built(base(text, batch_size=64), 3e11, dataset, COMPUTE)
    assert large.base.train.batch_size < 64
    assert min(config.train.max_steps for config in large.cells) >= ladder.FEWEST_STEPS
    assert max(config.train.max_steps for config in large.cells) < 100 * ladder.FEWEST_STEPS


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_ladder_fits_its_time_and_uses_it(text: Path, tmp_path: Path, gain: float) -> None:
    def pace(config: RunConfig, compute: ComputeConfig, dataset: Dataset) -> Pace:
        """A core of 20 GFLOP/s, with a millisecond a step besides; several make one run faster by the gain."""
        flops = (
            flops_per_token(config.model, dataset.tokenizer.vocab_size) * config.model.block_size
        )
        per_second = 20e9 * (1.0 if compute.threads == 1 else gain)
        return Pace(
            config.train.batch_size * flops / per_second + 1e-3 / gain,
            flops / 3 / per_second,
            0.0,
            0.0,
        )

    def seconds(made: Ladder) -> float:
        """Two at once, and the last one alone."""
        every = [*made.cells, *(rung[SIZES // 2] for rung in made.rungs)]
        every += [one.config for one in ladder.tuning(made).values()]
        one, all_of = (ComputeConfig(threads=threads) for threads in (1, 2))
        last = ladder.beyond(made, made.sizes[-1])
        of_each = sum(config.train.max_steps * pace(config, one, dataset).step for config in every)
        return of_each / 2 + last.train.max_steps * pace(last, all_of, dataset).step

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "measured", pace)
        data = small(text).data
        dataset = shards.prepare(data, find(data, lambda message: None), lambda message: None)
        hour, day = (
            ladder.plan(base(text), budget, RUNNER, tmp_path / budget, said.append)
            for budget in ("1h", "24h")
        )
        assert 0.5 * 3600 < seconds(hour) < 3600
        assert 0.7 * 86400 < seconds(day) < 86400
        assert day.largest_C > 15 * hour.largest_C
        assert "2 runs at once" in said[-1]
        patch.setattr(
            ladder, "measured", lambda *arguments: Pace(1.0, 1.0, 1.0, 1.0)
        )  # by now another machine
        again = ladder.plan(base(text), "1h", RUNNER, tmp_path / "1h", said.append)
        assert again == hour
        with pytest.raises(InputError, match="other settings"):
            ladder.plan(base(text, lr=0.5), "1h", RUNNER, tmp_path / "1h", said.append)
        with pytest.raises(InputError, match="longer --budget"):
            ladder.plan(base(text), "2s", RUNNER, tmp_path / "2s", said.append)


def test_a_budget_in_flops_is_what_is_spent(text: Path, tmp_path: Path) -> None:
    made = ladder.plan(base(text), "1e13", RUNNER, tmp_path, lambda message: None)
    V = made.vocab_size
    spent = sum(compute_of(config, V) for config in made.cells)
    spent += sum(compute_of(rung[SIZES // 2], V) for rung in made.rungs)
    assert spent + compute_of(ladder.beyond(made, made.sizes[4]), V) == pytest.approx(
        1e13, rel=0.02
    )


def test_the_run_beyond_has_four_times_the_compute_wherever_the_law_wants_it(
    text: Path, dataset: Dataset
) -> None:
    made = ladder.built(base(text), 2e13, dataset, COMPUTE)
    for wanted in (1.0, made.sizes[-1], 1e12):
        config = ladder.beyond(made, wanted)
        N = size_of(config, made.vocab_size)
        assert 4 <= compute_of(config, made.vocab_size) / made.largest_C < 4.1
        assert made.sizes[0] < N <= 2 * made.sizes[-1]
    assert size_of(ladder.beyond(made, 1e12), made.vocab_size) > 1.5 * made.sizes[-1]


# -- rates ------------------------------------------------------------------------------------------------------------


def test_the_best_rate_is_the_parabolas_and_stays_within_what_was_tried() -> None:
    def losses(best: float) -> list[tuple[float, float | None]]:
        return [(rate, 2 + 0.1 * math.log(rate / best) ** 2) for rate in (0.003, 0.01, 0.03)]

    for pairs, best, at_edge in (
        (losses(0.007), 0.007, False),
        (losses(0.3), 0.03, True),
        ([(0.003, 2.0), (0.01, 1.9), (0.03, None)], 0.01, False),  # diverged
        ([(0.003, 2.0), (0.01, 2.1), (0.03, 2.1)], 0.003, True),  # no minimum
        ([(0.003, None), (0.01, None), (0.03, None)], 0.003, True),
    ):
        assert scaling_study.best_rate(pairs) == (pytest.approx(best), at_edge)


# -- a whole study, of runs that a law stands for ---------------------------------------------------------------------


class Standing:
    """Stands for training: a run's loss is the law's, times what seeds do. Remembers what was asked for when."""

    def __init__(self, V: int, noise: float, patch: pytest.MonkeyPatch, lost: str = "-") -> None:
        self.V, self.noise, self.lost, self.trained = V, noise, lost, list[str]()
        self.by_path: dict[Path, RunConfig] = {}
        patch.setattr(scaling_study, "row", self.row)
        patch.setattr(scaling_study.sweep, "run_all", self.run_all)

    def run_all(self, folder: Path, trials: list[Trial], *_: Any, **__: Any) -> dict[str, Ended]:
        for trial in trials:
            if trial.name.startswith("beyond"):
                assert (folder / "prediction.json").exists()
            self.trained.append(trial.name)
            self.by_path[folder / "runs" / trial.name] = trial.config
        return {
            trial.name: Ended("finished", Run(folder / "runs" / trial.name)) for trial in trials
        }

    def row(self, seed: int, ended: Ended) -> Row:
        config = self.by_path[ended.run.path]
        if ended.status == "failed":
            return Row(seed, "failed", None, None, None, 0.0, None, None, "", ended.run)
        rate = 0.012 * (size_of(config, self.V) / 1e5) ** -0.25
        rng = np.random.default_rng([seed % 2**32, size_of(config, self.V), config.train.max_steps])
        loss: float | None = TRUE.loss(size_of(config, self.V), tokens_of(config)) * math.exp(
            rng.normal(0, self.noise)
        )
        if config.train.seed > 10_000:  # a tuning run
            loss = 3 + 0.05 * math.log(config.optimizer.lr / rate) ** 2
        if ended.run.path.name.startswith(self.lost):
            loss = None
        vars(ended.run)["config"] = config
        return Row(
            seed, "finished" if loss else "diverged", loss, loss, loss, 1.0, 1.0, 1, "", ended.run
        )


@pytest.fixture(scope="module")
def exact(
    text: Path, V: int, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Study, Standing, Path]:
    """A study whose runs follow the law without noise."""
    folder = tmp_path_factory.mktemp("exact")
    with pytest.MonkeyPatch.context() as patch:
        standing = Standing(V, 0.0, patch)
        return (
            scaling_study.study(base(text), "1e14", RUNNER, folder, lambda message: None),
            standing,
            folder,
        )


def test_an_exact_law_is_found_and_what_lies_beyond_predicted(
    exact: tuple[Study, Standing, Path],
) -> None:
    study, standing, folder = exact
    fit, beyond = study.found.boot.fit, study.found.beyond
    for name in ("alpha", "beta", "A", "B", "E"):
        assert getattr(fit, name) == pytest.approx(getattr(TRUE, name), rel=1e-4)
    assert study.rule.slope == pytest.approx(-0.25, abs=1e-6)
    assert study.rule.rate(1e5) == pytest.approx(0.012)
    assert beyond is not None
    assert beyond.run.C / fit.largest_C >= 4
    assert beyond.relative_error == pytest.approx(0, abs=1e-5)
    assert beyond.inside
    assert [name.split("-")[0] for name in standing.trained][-1] == "beyond"
    assert len(study.found.frontiers) == 3  # the three approaches
    for one in study.found.frontiers:
        assert one.a.value == pytest.approx(TRUE.a, abs=0.05)
    assert len(study.found.size_laws) == 2
    page = scaling_report.write(folder, study).read_text(encoding="utf-8")
    assert "inside its 95% interval" in page
    assert "a power -0.25 of N" in page
    runs, lost = read(folder / "runs.csv")
    assert len(runs) == COMPUTES * (SIZES + 1)
    assert not lost
    assert json.loads((folder / "fit.json").read_text(encoding="utf-8"))["beyond"]["inside"] is True
    written = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
    assert written["loss"]["value"] == pytest.approx(
        TRUE.loss(written["N"], written["D"]), rel=1e-5
    )


def test_what_was_predicted_stands_whatever_came_of_it(
    exact: tuple[Study, Standing, Path], V: int, tmp_path: Path
) -> None:
    study = exact[0]
    held = study.prediction | {"loss": {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6}}
    (tmp_path / "prediction.json").write_text(json.dumps(held), encoding="utf-8")
    assert scaling_study.predict(study.ladder, study.found.boot, study.rule, tmp_path) == held
    with pytest.MonkeyPatch.context() as patch:
        standing = Standing(V, 0.0, patch)
        found = scaling_study.check(held, lambda trials: standing.run_all(tmp_path, trials))
    assert found is not None
    assert not found.inside
    missed = dataclasses.replace(
        study, found=dataclasses.replace(study.found, beyond=found), prediction=held
    )
    assert "outside its 95% interval" in scaling_report.write(tmp_path, missed).read_text(
        encoding="utf-8"
    )


def test_diverged_runs_are_told_and_left_out_and_so_is_repeated_text(
    text: Path, tmp_path: Path, V: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Standing(V, 0.001, patch, lost="c0-")
        study = scaling_study.study(base(text), "1e14", RUNNER, tmp_path, lambda message: None)
    assert len(study.found.runs) == (COMPUTES - 1) * (SIZES + 1)
    assert sum("diverged" in line for line in study.found.why) == SIZES + 1
    scaling_report.write(tmp_path, study)
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert sum(row["loss"] == "" for row in rows) == SIZES + 1
    assert sum("times over the" in line for line in study.found.why) == 1  # a text of a few kB


def test_without_a_run_that_failed_nothing_is_decided(text: Path, tmp_path: Path, V: int) -> None:
    """Going on would find another rate, another fit, another prediction."""
    for lost in ("tune-", "c2-"):
        folder = tmp_path / lost
        with pytest.MonkeyPatch.context() as patch:
            standing = Standing(V, 0.001, patch)
            real = standing.run_all

            def failing(
                folder: Path, trials: list[Trial], *_: Any, real: Any = real, lost: str = lost
            ) -> Any:
                found = real(folder, trials)
                name = next((name for name in found if name.startswith(lost)), None)
                return found | (
                    {name: Ended("failed", found[name].run, "the disk was full")} if name else {}
                )

            patch.setattr(scaling_study.sweep, "run_all", failing)
            with pytest.raises(InputError, match="the disk was full"):
                scaling_study.study(base(text), "1e14", RUNNER, folder, lambda message: None)
        assert not (folder / "prediction.json").exists()


# -- a whole study, by the command ------------------------------------------------------------------------------------

TINY = "--d-model 16 --n-heads 2 --n-layers 1 --block-size 8 --batch-size 4 --budget 6e9".split()  # noqa: SIM905 - as one types it


def tables(study: Path) -> list[str]:
    """What must be the same again: runs.csv, and the numbers of fit.json and prediction.json without the clock's."""
    prediction = json.loads((study / "prediction.json").read_text(encoding="utf-8"))
    del prediction["written"]
    texts = [(study / name).read_text(encoding="utf-8") for name in ("runs.csv", "fit.json")]
    return [*texts, json.dumps(prediction)]


@pytest.mark.slow
def test_killed_at_random_it_goes_on_to_the_same_tables(text: Path, tmp_path: Path) -> None:
    def words(out: Path) -> list[str]:
        return ["scale", "--text-file", str(text), "--engine", "numpy", "--out", str(out), *TINY]

    assert cli.main(words(tmp_path / "whole")) == 0
    rng, out = np.random.default_rng(3), tmp_path / "killed"
    for i in range(4):
        child = subprocess.Popen(
            [sys.executable, "-m", "glasslm", *words(out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(float(rng.uniform(1.0, 5.0)))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL if i % 2 else signal.SIGTERM)
        child.wait()
        time.sleep(0.5)  # the runs notice, and save
    assert cli.main(words(out)) == 0
    assert tables(out) == tables(tmp_path / "whole")
    assert (out / "scaling_curve.png").stat().st_size > 1000
