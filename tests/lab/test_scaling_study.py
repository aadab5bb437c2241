"""A scaling study: its rates, and a prediction that is written before its run is trained."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from glasslm import cli
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.dataset import Dataset, prepare_dataset
from glasslm.data.sources.corpora import find_source
from glasslm.errors import InputError
from glasslm.inference.proportions import Proportion
from glasslm.lab.scaling.law import Law
from glasslm.lab.scaling.table import read_runs
from glasslm.lab.studies import scaling_report, scaling_study, sweep
from glasslm.lab.studies.ladder import (
    LADDER_SHAPES,
    matmul_parameters,
)
from glasslm.lab.studies.scaling_study import ScalingStudy
from glasslm.lab.studies.sweep import Runner, Trial, TrialOutcome
from glasslm.lab.studies.trial_results import TrialResult
from glasslm.runs.run_folder import Run
from glasslm.runs.run_lock import LOCK_FILE
from small_runs import small_config, wait_for, without_report, write_text

TRUE = Law(alpha=0.36, beta=0.31, A=35.0, B=55.0, E=1.1)
COMPUTE = ComputeConfig(engine="numpy", precision="fp32", threads=1)
RUNNER = Runner(COMPUTE, workers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 300)


@pytest.fixture(scope="module")
def dataset(text: Path) -> Dataset:
    data = small_config(text).data
    return prepare_dataset(data, find_source(data, lambda message: None), lambda message: None)


@pytest.fixture(scope="module")
def V(dataset: Dataset) -> int:
    return dataset.tokenizer.vocab_size


def base(text: Path, **flags: Any) -> RunConfig:
    return small_config(
        text, **{"d_model": 128, "n_heads": 4, "n_layers": 4, "block_size": 64} | flags
    ).resolve()


# -- rates -----------------------------------------------------------------------------------------


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


# -- a whole study, of runs that a law stands for --------------------------------------------------


class SimulatedTraining:
    """Replaces training: the loss of a run is the law's with noise. Records the trials."""

    def __init__(
        self, V: int, noise: float, patch: pytest.MonkeyPatch, diverged: str = "-"
    ) -> None:
        self.V, self.noise, self.diverged, self.trained = V, noise, diverged, list[str]()
        self.by_path: dict[Path, RunConfig] = {}
        patch.setattr(scaling_study, "read_trial", self.read_trial)
        patch.setattr(scaling_study.sweep, "run_all", self.run_all)

    def run_all(
        self, folder: Path, trials: list[Trial], *_: Any, **__: Any
    ) -> dict[str, TrialOutcome]:
        for trial in trials:
            if trial.name.startswith("beyond"):
                assert (folder / "prediction.json").exists()
            self.trained.append(trial.name)
            self.by_path[folder / "runs" / trial.name] = trial.config
        return {
            trial.name: TrialOutcome("finished", Run(folder / "runs" / trial.name))
            for trial in trials
        }

    def read_trial(self, seed: int, outcome: TrialOutcome) -> TrialResult:
        config = self.by_path[outcome.run.path]
        if outcome.status == "failed":
            return TrialResult(seed, "failed", None, None, None, 0.0, None, None, "", outcome.run)
        rate = 0.012 * (matmul_parameters(config, self.V) / 1e5) ** -0.25
        rng = np.random.default_rng(
            [seed % 2**32, matmul_parameters(config, self.V), config.train.max_steps]
        )
        loss: float | None = TRUE.loss(
            matmul_parameters(config, self.V), config.total_tokens
        ) * math.exp(rng.normal(0, self.noise))
        if config.train.seed > 10_000:  # a tuning run
            loss = 3 + 0.05 * math.log(config.optimizer.lr / rate) ** 2
        if outcome.run.path.name.startswith(self.diverged):
            loss = None
        vars(outcome.run)["config"] = config
        return TrialResult(
            seed, "finished" if loss else "diverged", loss, loss, loss, 1.0, 1.0, 1, "", outcome.run
        )


@pytest.fixture(scope="module")
def exact(
    text: Path, V: int, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ScalingStudy, SimulatedTraining, Path]:
    """A study whose runs follow the law without noise."""
    folder = tmp_path_factory.mktemp("exact")
    with pytest.MonkeyPatch.context() as patch:
        training = SimulatedTraining(V, 0.0, patch)
        return (
            scaling_study.run_study(base(text), "1e14", RUNNER, folder, lambda message: None),
            training,
            folder,
        )


def test_an_exact_law_is_found_and_what_lies_beyond_predicted(
    exact: tuple[ScalingStudy, SimulatedTraining, Path],
) -> None:
    study, training, folder = exact
    fit, forecast = study.analysis.bootstrap.fit, study.analysis.extrapolation
    for name in ("alpha", "beta", "A", "B", "E"):
        assert getattr(fit, name) == pytest.approx(getattr(TRUE, name), rel=1e-4)
    assert study.rule.slope == pytest.approx(-0.25, abs=1e-6)
    assert study.rule.rate(1e5) == pytest.approx(0.012)
    assert forecast is not None
    assert forecast.run.C / fit.largest_C >= 4
    assert forecast.relative_error == pytest.approx(0, abs=1e-5)
    assert forecast.is_inside
    assert [name.split("-")[0] for name in training.trained][-1] == "beyond"
    assert len(study.analysis.frontiers) == 3  # the three approaches
    for frontier in study.analysis.frontiers:
        assert frontier.a.value == pytest.approx(TRUE.a, abs=0.05)
    assert len(study.analysis.size_laws) == 2
    page = scaling_report.write(folder, study).read_text(encoding="utf-8")
    assert "inside its 95% interval" in page
    assert "a power -0.25 of N" in page
    runs = read_runs(folder / "runs.csv").runs
    assert len(runs) == LADDER_SHAPES[0].n_levels * (LADDER_SHAPES[0].n_sizes + 1)
    assert json.loads((folder / "fit.json").read_text(encoding="utf-8"))["beyond"]["inside"] is True
    written = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
    assert written["loss"]["value"] == pytest.approx(
        TRUE.loss(written["N"], written["D"]), rel=1e-5
    )


@pytest.mark.usefixtures("no_figures")
def test_what_was_predicted_stands_whatever_came_of_it(
    exact: tuple[ScalingStudy, SimulatedTraining, Path], V: int, tmp_path: Path
) -> None:
    study = exact[0]
    prediction = study.prediction | {"loss": {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6}}
    (tmp_path / "prediction.json").write_text(json.dumps(prediction), encoding="utf-8")
    assert (
        scaling_study.write_prediction(study.ladder, study.analysis.bootstrap, study.rule, tmp_path)
        == prediction
    )
    with pytest.MonkeyPatch.context() as patch:
        training = SimulatedTraining(V, 0.0, patch)
        forecast = scaling_study.check_prediction(
            prediction, lambda trials: training.run_all(tmp_path, trials)
        )
    assert forecast is not None
    assert not forecast.is_inside
    missed = dataclasses.replace(
        study,
        analysis=dataclasses.replace(study.analysis, extrapolation=forecast),
        prediction=prediction,
    )
    assert "outside its 95% interval" in scaling_report.write(tmp_path, missed).read_text(
        encoding="utf-8"
    )


@pytest.mark.usefixtures("no_figures")
def test_diverged_runs_are_told_and_left_out_and_so_is_repeated_text(
    text: Path, tmp_path: Path, V: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        SimulatedTraining(V, 0.001, patch, diverged="c0-")
        study = scaling_study.run_study(base(text), "1e14", RUNNER, tmp_path, lambda message: None)
    assert len(study.analysis.runs) == (LADDER_SHAPES[0].n_levels - 1) * (
        LADDER_SHAPES[0].n_sizes + 1
    )
    assert sum("diverged" in line for line in study.analysis.notes) == LADDER_SHAPES[0].n_sizes + 1
    scaling_report.write(tmp_path, study)
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert sum(row["loss"] == "" for row in rows) == LADDER_SHAPES[0].n_sizes + 1
    assert sum("times over the" in line for line in study.analysis.notes) == 1  # a text of a few kB


def test_without_a_run_that_failed_nothing_is_decided(text: Path, tmp_path: Path, V: int) -> None:
    """Going on would find another rate, another fit, another prediction."""
    for lost in ("tune-", "c2-"):
        folder = tmp_path / lost
        with pytest.MonkeyPatch.context() as patch:
            training = SimulatedTraining(V, 0.001, patch)
            real = training.run_all

            def failing(
                folder: Path, trials: list[Trial], *_: Any, real: Any = real, lost: str = lost
            ) -> Any:
                outcomes = real(folder, trials)
                name = next((name for name in outcomes if name.startswith(lost)), None)
                return outcomes | (
                    {name: TrialOutcome("failed", outcomes[name].run, "the disk was full")}
                    if name
                    else {}
                )

            patch.setattr(scaling_study.sweep, "run_all", failing)
            with pytest.raises(InputError, match="the disk was full"):
                scaling_study.run_study(base(text), "1e14", RUNNER, folder, lambda message: None)
        assert not (folder / "prediction.json").exists()


# -- a whole study, by the command -----------------------------------------------------------------

TINY = "--d-model 16 --n-heads 2 --n-layers 1 --block-size 8 --batch-size 4 --budget 1e9".split()  # noqa: SIM905 - as one types it


def tables(study: Path) -> list[str]:
    """runs.csv, and the numbers of fit.json and prediction.json without times."""
    prediction = json.loads((study / "prediction.json").read_text(encoding="utf-8"))
    del prediction["written"]
    texts = [(study / name).read_text(encoding="utf-8") for name in ("runs.csv", "fit.json")]
    return [*texts, json.dumps(prediction)]


# The command, with the smallest ladder: 22 runs instead of 34.
SMALLEST_LADDER = (
    "import sys; from glasslm import cli; from glasslm.lab.studies import ladder; "
    "ladder.FULL_LADDER = ladder.LADDER_SHAPES[-1:]; sys.exit(cli.main())"
)


def count_started_runs(study: Path) -> int:
    return len(list(study.glob("runs/*/metrics.jsonl")))


def wait_until_unused(study: Path) -> None:
    """Wait until the runs of a killed study have noticed it, saved, and left their locks."""
    for run in study.glob("runs/*"):
        with FileLock(run / LOCK_FILE, timeout=120):
            pass


@pytest.mark.slow
def test_killed_at_random_it_goes_on_to_the_same_tables(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other study trains its runs in one process, one after another, and without reports."""

    def run_in_turn(folder: Path, trials: list[Trial], runner: Runner, *_: Any) -> Any:
        compute = dataclasses.replace(runner.compute, threads=1)
        with without_report():
            return sweep.run_in_turn(folder, trials, compute, lambda message: None)

    out, whole = tmp_path / "killed", tmp_path / "whole"
    words = ["scale", "--text-file", str(text), "--engine", "numpy", *TINY, "--out"]
    program = [sys.executable, "-c", SMALLEST_LADDER, *words, str(out)]
    rng = np.random.default_rng(3)
    for i, earliest in enumerate((1, 10, 22)):  # tuning, the ladder, the predicted run
        child = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = min(22, earliest + int(rng.integers(8)))
        wait_for(lambda started=started: count_started_runs(out) >= started, child, 300)  # type: ignore[misc]
        os.kill(child.pid, signal.SIGKILL if i % 2 else signal.SIGTERM)
        assert child.wait(120) != 0 or started == 22  # the last run may end before the signal
        wait_until_unused(out)
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with monkeypatch.context() as patch:
        shortened = functools.partial(scaling_study.run_study, shapes=LADDER_SHAPES[-1:])
        patch.setattr(scaling_study, "run_study", shortened)
        patch.setattr(sweep, "run_all", run_in_turn)
        assert cli.main([*words, str(whole)]) == 0
    assert tables(out) == tables(whole)
    assert (out / "scaling_curve.png").stat().st_size > 1000


def test_a_ladder_of_a_task_fits_the_error_rate() -> None:
    result = TrialResult(
        1, "finished", 0.7, 0.7, None, 1.0, 1.0, 1, "", Run(Path("nowhere")),
        accuracy=Proportion(1990, 2000).facts,
    )  # fmt: skip
    for measure, expected in (("accuracy", 10.5 / 2001), ("loss", 0.7)):
        observation = scaling_study.LadderRun(100, 10, 1e-3, result, measure).observation
        assert observation is not None
        assert observation.loss == pytest.approx(expected)


def test_the_error_rate_needs_a_task(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="counts the answers of a task"):
        scaling_study.run_study(
            base(text), "1e14", RUNNER, tmp_path, lambda message: None, measure="accuracy"
        )


def test_the_report_says_that_it_shows_error_rates(
    exact: tuple[ScalingStudy, SimulatedTraining, Path],
) -> None:
    study, _, _ = exact
    ladder = dataclasses.replace(study.ladder, measure="accuracy")
    analysis = scaling_study.analyse_ladder(ladder, study.rule, study.runs)
    assert scaling_study.ERROR_RATE_NOTE in analysis.notes
    assert analysis.measured == "wrong answers, share"
