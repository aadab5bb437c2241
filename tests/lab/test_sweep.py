"""A study ends with the same runs, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from glasslm import tokens
from glasslm.config import ComputeConfig
from glasslm.corpora import find
from glasslm.errors import InputError
from glasslm.lab.study.sweep import Runner, Trial, cost, run_all
from glasslm.runs import Run
from small_runs import essence, small, train, wait_for, write_text

STEPS = 12
RUNNER = Runner(ComputeConfig(engine="numpy", threads=1))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    data = small(path).data
    tokens.prepare(data, find(data, lambda message: None), lambda message: None)
    return path


def trial(text: Path, name: str, **flags: Any) -> Trial:
    return Trial(name, small(text, **{"max_steps": STEPS, "sample_interval": 0} | flags))


def test_each_run_is_the_run_that_train_makes(text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    trials = [trial(text, "one"), trial(text, "two", seed=7, n_layers=1)]
    ended = run_all(tmp_path / "study", trials, RUNNER, 20, said.append)
    assert {name: end.status for name, end in ended.items()} == {"one": "finished", "two": "finished"}
    alone = train(text, tmp_path / "alone", max_steps=STEPS, sample_interval=0, seed=7, n_layers=1).run_dir
    assert essence(ended["two"].run.path, STEPS) == essence(alone, STEPS)
    assert not (ended["one"].run.path / "report.html").exists()  # `glasslm report` makes it
    assert any("0 runs to go" in message for message in said)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*") if path.is_file()}
    again = run_all(tmp_path / "study", trials, RUNNER, 20, said.append)
    assert {name: end.status for name, end in again.items()} == {"one": "finished", "two": "finished"}
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*") if path.is_file()}
    assert "2 of 2 runs are there already" in said


def test_a_diverged_run_is_an_outcome_and_a_failed_one_does_not_end_the_study(text: Path, tmp_path: Path) -> None:
    sick = trial(text, "sick", lr=1.0, warmup_steps=0, max_steps=150, eval_interval=50, schedule="constant")
    impossible = trial(text, "impossible", batch_size=4, init_from=str(tmp_path / "nothing"))
    trials = [impossible, sick, trial(text, "well")]
    ended = run_all(tmp_path / "study", trials, RUNNER, 20, lambda message: None)
    assert {name: end.status for name, end in ended.items()} == {
        "impossible": "failed", "sick": "diverged", "well": "finished"
    }  # fmt: skip
    assert "exit code 2" in ended["impossible"].why
    assert "nothing" in ended["impossible"].why


def test_other_settings_in_the_same_folder_are_refused(text: Path, tmp_path: Path) -> None:
    run_all(tmp_path / "study", [trial(text, "one")], RUNNER, 20, lambda message: None)
    with pytest.raises(InputError, match="other settings"):
        run_all(tmp_path / "study", [trial(text, "one", lr=0.5)], RUNNER, 20, lambda message: None)
    with pytest.raises(InputError, match="same name"):
        run_all(tmp_path / "study", [trial(text, "one")] * 2, RUNNER, 20, lambda message: None)


def test_a_larger_model_costs_more(text: Path) -> None:
    base = small(text)
    assert cost(small(text, n_layers=4), 20) > 1.5 * cost(base, 20)
    assert cost(small(text, max_steps=40), 20) == 2 * cost(base, 20)


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from glasslm.lab.study.sweep import Runner, Trial, run_all
    from glasslm.config import ComputeConfig
    from small_runs import small
    flags = {{"max_steps": 400, "sample_interval": 0, "checkpoint_interval": 25, "eval_interval": 300, "keep": 2}}
    trials = [Trial(f"seed-{{seed}}", small(Path({text!r}), seed=seed, **flags)) for seed in (1, 2, 3)]
    ended = run_all(Path({study!r}), trials, Runner(ComputeConfig(engine="numpy", threads=1), workers=2), 20, print)
    print(sorted((name, end.status) for name, end in ended.items()))
"""


def study_of(text: Path, study: Path) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    script = textwrap.dedent(SCRIPT).format(tests=tests, text=str(text), study=str(study))
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def training(study: Path) -> list[Path]:
    return list(study.glob("runs/*/checkpoints/000025"))


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the study's runs, made alone."""
    return train(text, tmp_path_factory.mktemp("alone") / "run", seed=2, max_steps=400, sample_interval=0,
                 checkpoint_interval=25, eval_interval=300, keep=2).run_dir  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on Unix")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_is_killed_goes_on_to_the_same_end(
    number: int, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Its processes save and end with it, also when it has no time to tell them."""
    study = tmp_path / "study"
    process = study_of(text, study)
    wait_for(lambda: len(training(study)) == 2, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    deadline = time.monotonic() + 30
    while any(_is_held(run) for run in study.glob("runs/*")):
        assert time.monotonic() < deadline, "a run goes on without its study"
        time.sleep(0.05)
    assert all(not (run / "checkpoints" / "000400").exists() for run in study.glob("runs/*"))
    again = study_of(text, study)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.splitlines()[-1] == "[('seed-1', 'finished'), ('seed-2', 'finished'), ('seed-3', 'finished')]"
    assert essence(study / "runs" / "seed-2", 400) == essence(undisturbed, 400)


def _is_held(run: Path) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(run / "run.lock", timeout=0):
            return False
    except Timeout:
        return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_cluster_makes_the_same_runs(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an extra")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    trials = [trial(text, "one"), trial(text, "two", seed=7)]
    ended = run_all(tmp_path / "study", trials, dataclasses.replace(RUNNER, name="ray"), 20, lambda message: None)
    assert {name: end.status for name, end in ended.items()} == {"one": "finished", "two": "finished"}
    alone = train(text, tmp_path / "alone", max_steps=STEPS, sample_interval=0, seed=7).run_dir
    assert essence(ended["two"].run.path, STEPS) == essence(alone, STEPS)
    assert json.loads((alone / "run.json").read_text(encoding="utf-8"))["seed"] == 7
    assert Run(alone).best_val_loss is not None
