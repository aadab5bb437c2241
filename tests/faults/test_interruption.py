"""Signals and kills, real ones to real processes.

Whatever happens, the run ends with the bits it would have had.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli
from glasslm.config.schema import ComputeConfig
from glasslm.training import launch
from small_runs import (
    comparable_results,
    ignore_message,
    interrupt_at,
    logged_lines,
    resume,
    run_program,
    small_config,
    start_program,
    train,
    train_command,
    wait_for,
    without_report,
    write_text,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
LONG: dict[str, Any] = {
    "max_steps": 120,
    "eval_interval": 30,
    "sample_interval": 0,
    "checkpoint_interval": 20,
    "dropout": 0.2,
}
# The program, with an empty report: the real one takes longer than the run.
PROGRAM = """
import sys
from glasslm import cli
from glasslm.report import run_report
run_report.write = lambda folder, *_: (folder / "report.html").touch()
sys.exit(cli.main())
"""
WITHOUT_REPORT = [sys.executable, "-c", PROGRAM]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupted."""
    return train(text, tmp_path_factory.mktemp("runs") / "whole", **LONG).run_dir


@pytest.fixture(scope="module")
def uninterrupted_torch(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    compute = ComputeConfig(engine="torch", device="cpu", precision="fp32", threads=1)
    with without_report():
        return launch.train(
            small_config(text, **LONG),
            compute,
            tmp_path_factory.mktemp("runs") / "whole",
            notify=ignore_message,
        ).run_dir


def count_logged_steps(run_dir: Path) -> int:
    return len(logged_lines(run_dir, "step")) if (run_dir / "metrics.jsonl").exists() else 0


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resume_ends_the_same(
    number: signal.Signals, code: int, text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start_program(*train_command(text, run, **LONG))
    wait_for(lambda: count_logged_steps(run) >= 7, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert out.splitlines()[-1] == f"run: {run}"
    assert "glasslm resume" in out + err
    (end,) = logged_lines(run, "end")
    assert end["status"] == "interrupted"
    assert (run / "checkpoints" / f"{end['step']:06d}" / "manifest.json").is_file()
    if number == signal.SIGINT:
        done = run_program("resume", run, "--threads", "2")
        assert done.returncode == 0, done.stderr
        assert (run / "report.html").is_file()
    else:
        assert resume(run).status == "finished"
    assert comparable_results(run, 120) == comparable_results(uninterrupted, 120)


def test_ctrl_c_before_the_first_step_leaves_no_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the loop is prepared: there is no checkpoint to resume from."""

    def raise_interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launch, "MetricsLog", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(text, tmp_path / "run", max_steps=2)
    assert train(text, tmp_path / "run", max_steps=2).status == "finished"


@posix
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_the_signals_of_schedulers_save_a_checkpoint(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a closed terminal and of batch systems; an ignored SIGHUP (nohup) stays ignored."""
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch, number)
        outcome = train(text, tmp_path / "run", max_steps=6)
    assert (outcome.status, outcome.exit_code) == ("interrupted", 128 + number)
    assert (tmp_path / "run/checkpoints/000003/manifest.json").is_file()
    previous_handler = signal.signal(number, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            interrupt_at(3, patch, number)
            assert train(text, tmp_path / "ignored", max_steps=6).status == "finished"
    finally:
        signal.signal(number, previous_handler)
    assert resume(tmp_path / "run").status == "finished"
    assert comparable_results(tmp_path / "run", 6) == comparable_results(tmp_path / "ignored", 6)


@posix
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_pytorch_loses_nothing_either(
    number: signal.Signals, code: int, text: Path, uninterrupted_torch: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    by_torch = {"engine": "torch", "device": "cpu", "precision": "fp32"}
    process = start_program(*train_command(text, run, **LONG | by_torch))
    wait_for(lambda: count_logged_steps(run) >= 27, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert [line["status"] for line in logged_lines(run, "end")] == ["interrupted"] * (
        number != signal.SIGKILL
    )
    assert resume(run).status == "finished"
    assert comparable_results(run, 120) == comparable_results(uninterrupted_torch, 120)


@posix
def test_a_second_signal_leaves_at_once_and_nothing_is_lost(text: Path, tmp_path: Path) -> None:
    """In the middle of a step that takes long."""
    run = tmp_path / "run"
    program = (  # whose steps are never abandoned, as with several ranks
        "import sys, time; from glasslm import cli; from glasslm.training.loop import Loop; "
        "Loop.advance = lambda self: time.sleep(60); sys.exit(cli.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *train_command(text, run, **LONG)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and bool(logged_lines(run, "checkpoint")), process
    )
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first signal waits for the end of the step"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert count_logged_steps(run) == 0, "it waited for the end of the step"
    assert logged_lines(run, "end") == []


@posix
def test_ctrl_c_before_there_is_anything_to_save_is_no_traceback(tmp_path: Path) -> None:
    """While it waits for text on standard input."""
    process = start_program(
        "train", "--text-file", "-", "--run-dir", tmp_path / "run", stdin=subprocess.PIPE
    )
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT)
    assert process.returncode == 130 or err == ""  # so early that Python itself was not up yet
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@posix
def test_a_job_in_the_background_of_a_shell_obeys_too(text: Path, tmp_path: Path) -> None:
    """Such a job starts with SIGINT ignored."""
    run = tmp_path / "run"
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "glasslm", *map(str, train_command(text, run, **LONG))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    wait_for(lambda: count_logged_steps(run) >= 2, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130


@posix
@pytest.mark.parametrize("stage", ["from the start", "under way"])
def test_a_pipe_that_nobody_reads_does_not_stop_the_training(
    stage: str, text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """As in `glasslm train 2>&1 | head`, with an exit code that tells how the training went."""
    run = tmp_path / "run"
    reading, writing = os.pipe()
    command = [*WITHOUT_REPORT, *train_command(text, run, **LONG)]
    process = subprocess.Popen(command, stdout=writing, stderr=writing)
    os.close(writing)
    if stage == "under way":
        while count_logged_steps(run) < 5:
            assert process.poll() is None
            time.sleep(0.01)
    os.close(reading)
    assert process.wait(timeout=60) == 0
    assert logged_lines(run, "end")[0]["status"] == "finished"
    assert (run / "report.html").is_file()
    assert comparable_results(run, 120) == comparable_results(uninterrupted, 120)


@posix
def test_output_that_nobody_reads_is_no_error(uninterrupted: Path) -> None:
    """As in `glasslm generate RUN | head -c 1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [
        sys.executable,
        "-m",
        "glasslm",
        "generate",
        str(uninterrupted),
        "--prompt",
        "the",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def kill_and_resume(text: Path, uninterrupted: Path, run: Path, after: int) -> None:
    """kill -9 when about `after` steps are logged, and the rest in this process."""
    process = start_program(*train_command(text, run, **LONG))
    wait_for(lambda: count_logged_steps(run) >= after, process)
    process.kill()
    process.communicate(timeout=120)
    assert logged_lines(run, "end") == []
    assert resume(run).status == "finished"
    assert comparable_results(run, 120) == comparable_results(uninterrupted, 120)


def test_kill_9_at_a_random_moment(text: Path, uninterrupted: Path, tmp_path: Path) -> None:
    kill_and_resume(text, uninterrupted, tmp_path / "run", random.randint(1, 90))


@pytest.mark.slow
def test_kill_9_at_ten_moments(text: Path, uninterrupted: Path, tmp_path: Path) -> None:
    for after in range(1, 100, 10):
        kill_and_resume(text, uninterrupted, tmp_path / str(after), after)


@posix
def test_killed_again_and_again_it_still_arrives(
    text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = train_command(text, run, **LONG)
    for after in (30, 60, 90):
        process = start_program(*command)
        wait_for(lambda after=after: count_logged_steps(run) >= after, process)  # type: ignore[misc]
        process.kill()
        process.communicate(timeout=120)
        command = ["resume", str(run), "--threads", "1"]
    assert resume(run).status == "finished"
    assert comparable_results(run, 120) == comparable_results(uninterrupted, 120)
    assert not list(run.rglob("*.tmp-*"))


def test_a_stale_lock_is_taken_over_and_a_live_one_is_not(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_program(*train_command(text, run, **LONG | {"max_steps": 2000}))
    wait_for(lambda: count_logged_steps(run) >= 1, process)
    rival = run_program("resume", run)
    assert rival.returncode == 5, rival.stderr
    assert str(process.pid) in rival.stderr
    assert cli.main(train_command(text, run, **LONG)) == 5
    process.kill()
    process.communicate(timeout=120)
    second = start_program(
        "resume", run, "--threads", "1"
    )  # the lock file of the dead process is still there
    wait_for(lambda: bool(logged_lines(run, "resume")), second)
    second.kill()
    second.communicate(timeout=120)
