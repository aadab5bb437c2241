"""A study ends with the same runs, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from glasslm.config.schema import ComputeConfig
from glasslm.data.dataset import prepare_dataset
from glasslm.data.sources.corpora import find_source
from glasslm.errors import InputError
from glasslm.lab.studies import study_plan, sweep
from glasslm.lab.studies.sweep import (
    Runner,
    Trial,
    TrialOutcome,
    require_results,
    run_all,
    run_flops,
)
from glasslm.lab.studies.trial_results import describe_sample, read_trial
from glasslm.runs.run_folder import Run
from glasslm.runs.run_lock import lock_run
from glasslm.training import launch
from small_runs import (
    COMPUTE,
    comparable_results,
    ignore_message,
    logged_lines,
    small_config,
    train,
    wait_for,
    without_report,
    write_text,
)

STEPS = 12
RUNNER = Runner(ComputeConfig(engine="numpy", threads=1))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    data = small_config(path).data
    prepare_dataset(data, find_source(data, lambda message: None), lambda message: None)
    return path


def trial(text: Path, name: str, **flags: Any) -> Trial:
    return Trial(name, small_config(text, **{"max_steps": STEPS, "sample_interval": 0} | flags))


def test_each_run_is_the_run_that_train_makes(text: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    trials = [trial(text, "one"), trial(text, "two", seed=7, n_layers=1)]
    ended = run_all(tmp_path / "study", trials, RUNNER, 20, messages.append)
    assert {name: end.status for name, end in ended.items()} == {
        "one": "finished",
        "two": "finished",
    }
    alone = train(
        text, tmp_path / "alone", max_steps=STEPS, sample_interval=0, seed=7, n_layers=1
    ).run_dir
    assert comparable_results(ended["two"].run.path, STEPS) == comparable_results(alone, STEPS)
    assert not (ended["one"].run.path / "report.html").exists()  # `glasslm report` makes it
    assert any("0 runs to go" in message for message in messages)
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*") if path.is_file()
    }
    again = run_all(tmp_path / "study", trials, RUNNER, 20, messages.append)
    assert {name: end.status for name, end in again.items()} == {
        "one": "finished",
        "two": "finished",
    }
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*") if path.is_file()
    }
    assert "2 of 2 runs are finished already" in messages


def test_a_diverged_run_is_an_outcome_and_a_failed_one_does_not_end_the_study(
    text: Path, tmp_path: Path
) -> None:
    sick = trial(
        text, "sick", lr=1.0, warmup_steps=0, max_steps=150, eval_interval=50, schedule="constant"
    )
    impossible = trial(text, "impossible", batch_size=4, init_from=str(tmp_path / "nothing"))
    trials = [impossible, sick, trial(text, "well")]
    ended = run_all(tmp_path / "study", trials, RUNNER, 20, lambda message: None)
    assert {name: end.status for name, end in ended.items()} == {
        "impossible": "failed",
        "sick": "diverged",
        "well": "finished",
    }
    assert "exit code 2" in ended["impossible"].error
    assert "nothing" in ended["impossible"].error


def test_other_settings_in_the_same_folder_are_refused(text: Path, tmp_path: Path) -> None:
    run_all(tmp_path / "study", [trial(text, "one")], RUNNER, 20, lambda message: None)
    with pytest.raises(InputError, match="other settings"):
        run_all(tmp_path / "study", [trial(text, "one", lr=0.5)], RUNNER, 20, lambda message: None)
    other = Runner(ComputeConfig(engine="numpy", precision="fp64", threads=1))
    with pytest.raises(InputError, match=r"precision fp32, .* with fp64: give --precision fp32"):
        run_all(tmp_path / "study", [trial(text, "one")], other, 20, lambda message: None)
    with pytest.raises(InputError, match="same name"):
        run_all(tmp_path / "study", [trial(text, "one")] * 2, RUNNER, 20, lambda message: None)


def test_a_larger_model_costs_more(text: Path) -> None:
    base = small_config(text)
    assert run_flops(small_config(text, n_layers=4), 20) > 1.5 * run_flops(base, 20)
    assert run_flops(small_config(text, max_steps=40), 20) == 2 * run_flops(base, 20)


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from glasslm.lab.studies.sweep import Runner, Trial, run_all
    from glasslm.config.schema import ComputeConfig
    from small_runs import small_config
    flags = {{
        "max_steps": 400, "sample_interval": 0, "checkpoint_interval": 25,
        "eval_interval": 300, "keep": 2,
    }}
    text = Path({text!r})
    trials = [Trial(f"seed-{{seed}}", small_config(text, seed=seed, **flags)) for seed in (1, 2, 3)]
    runner = Runner(ComputeConfig(engine="numpy", threads=1), workers=2)
    outcomes = run_all(Path({study!r}), trials, runner, 20, print)
    print(sorted((name, outcome.status) for name, outcome in outcomes.items()))
"""


def study_of(text: Path, study: Path) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    script = textwrap.dedent(SCRIPT).format(tests=tests, text=str(text), study=str(study))
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def training(study: Path) -> set[str]:
    """The runs with a checkpoint of their training; older ones go as newer ones come."""
    return {
        path.parts[-3] for path in study.glob("runs/*/checkpoints/000*") if path.name != "000000"
    }


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the study's runs, made alone."""
    return train(
        text,
        tmp_path_factory.mktemp("alone") / "run",
        seed=2,
        max_steps=400,
        sample_interval=0,
        checkpoint_interval=25,
        eval_interval=300,
        keep=2,
    ).run_dir


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
    assert (
        out.splitlines()[-1]
        == "[('seed-1', 'finished'), ('seed-2', 'finished'), ('seed-3', 'finished')]"
    )
    assert comparable_results(study / "runs" / "seed-2", 400) == comparable_results(
        undisturbed, 400
    )


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
    ended = run_all(
        tmp_path / "study",
        trials,
        dataclasses.replace(RUNNER, name="ray"),
        20,
        lambda message: None,
    )
    assert {name: end.status for name, end in ended.items()} == {
        "one": "finished",
        "two": "finished",
    }
    alone = train(text, tmp_path / "alone", max_steps=STEPS, sample_interval=0, seed=7).run_dir
    assert comparable_results(ended["two"].run.path, STEPS) == comparable_results(alone, STEPS)
    assert json.loads((alone / "run.json").read_text(encoding="utf-8"))["seed"] == 7
    assert Run(alone).best_val_loss is not None


# -- what a killed study leaves --------------------------------------------------------------------


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(
    text: Path, tmp_path: Path
) -> None:
    trials, path = [trial(text, "one")], tmp_path / "study" / "runs" / "one"
    run_all(tmp_path / "whole", trials, RUNNER, 20, lambda message: None)
    complete = tmp_path / "whole" / "runs" / "one"
    (path / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "tokenizer.json", "run.lock"):
        shutil.copy(complete / name, path / name)
    (path / "metrics.jsonl").write_text(
        '{"kind": "plan", "step": 0, "max_steps": 12}\n', encoding="utf-8"
    )
    ended = run_all(tmp_path / "study", trials, RUNNER, 20, lambda message: None)
    assert ended["one"].status == "finished"
    assert comparable_results(path, STEPS) == comparable_results(complete, STEPS)


def test_a_run_that_is_still_saving_is_waited_for(text: Path, tmp_path: Path) -> None:
    path, began = tmp_path / "study" / "runs" / "one", time.monotonic()
    path.mkdir(parents=True)
    is_locked = threading.Event()

    def hold() -> None:
        with lock_run(path):
            is_locked.set()
            time.sleep(2.5)

    holder = threading.Thread(target=hold)
    holder.start()
    is_locked.wait()
    ended = run_all(tmp_path / "study", [trial(text, "one")], RUNNER, 20, lambda message: None)
    holder.join()
    assert ended["one"].status == "finished"
    assert time.monotonic() - began > 2.5


def test_what_fails_says_why_and_nothing_is_built_on_it() -> None:
    run = Run("nowhere")
    require_results({"one": TrialOutcome("finished", run), "two": TrialOutcome("diverged", run)})
    with pytest.raises(
        InputError, match=r"1 of 2 runs failed.*two: the disk was full.*tries them again"
    ):
        require_results(
            {
                "one": TrialOutcome("finished", run),
                "two": TrialOutcome("failed", run, "the disk was full"),
            }
        )


def test_as_many_at_once_as_there_are_cores_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "available_cores", lambda: [0, 1, 2, 3])
    assert Runner(ComputeConfig()).slots == 4
    assert Runner(ComputeConfig(threads=2)).slots == 2
    assert Runner(ComputeConfig(threads=8)).slots == 1
    assert Runner(ComputeConfig(device="cuda")).slots == 1
    assert Runner(ComputeConfig(device="cuda"), workers=3).slots == 3


# -- what every study begins with ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epochs": 2.0}, "--max-steps, or by --budget"),
        ({"max_time": "10s"}, "another number of steps: leave it out"),
        ({"patience": 3}, "end each run at another step"),
        ({"stop_at_loss": 2.0}, "end each run at another step"),
        ({"init_from": "runs/old"}, "start from initial weights"),
        ({"block_size": 8000}, "tokens"),
    ],
)
def test_a_recipe_that_makes_no_study_is_refused(
    text: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        study_plan.prepare_recipe(small_config(text, **flags), lambda message: None)


def test_text_through_a_pipe_is_read_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Piped:
        buffer = io.BytesIO(text.read_bytes())

    monkeypatch.setattr(sys, "stdin", Piped())
    base, dataset = study_plan.prepare_recipe(small_config(Path("-")), lambda message: None)
    assert base.data.text_file != ("-",)
    again, same = study_plan.prepare_recipe(base, lambda message: None)
    assert again == base
    assert same.facts["sha256"] == dataset.facts["sha256"]


def test_one_engine_serves_a_whole_study(text: Path) -> None:
    for compute in (ComputeConfig(), ComputeConfig(engine="numpy", threads=3)):
        resolved = study_plan.resolve_compute(compute, small_config(text), 20)
        assert "auto" not in (resolved.engine, resolved.device, resolved.precision)
        assert resolved.threads == (compute.threads or 1)


def test_all_runs_of_a_study_are_measured_on_the_same_tokens(text: Path, tmp_path: Path) -> None:
    """A runner's final_tokens become windows of each run's size, and the results say sampled."""
    runner = Runner(ComputeConfig(threads=1), final_tokens=160)
    flags = {"val_fraction": 0.5, "sample_interval": 0, "max_steps": 2, "eval_interval": 1}
    lines, results = [], []
    for block_size in (4, 8):
        trial = Trial(f"b{block_size}", small_config(text, block_size=block_size, **flags))
        job = sweep._make_job(tmp_path, trial, runner, "")
        assert job["final_windows"] == 160 // block_size
        run_dir = tmp_path / "runs" / trial.name
        with without_report():
            launch.train(trial.config, COMPUTE, run_dir, final_windows=40, notify=ignore_message)
        lines += [logged_lines(run_dir, "eval")[-1]]
        results.append(read_trial(1, TrialOutcome("finished", Run(run_dir))))
    assert [line["tokens"] for line in lines] == [160, 320]
    (sentence,) = describe_sample(results[:1])
    assert "on the same 160 tokens" in sentence
    assert f"standard error up to {lines[0]['stderr']:.4f} nats" in sentence
    (sentence,) = describe_sample(results)
    assert "160 (block size 4), 320 (block size 8), standard error" in sentence
    assert "on the same 160" not in sentence
    assert not describe_sample([])
