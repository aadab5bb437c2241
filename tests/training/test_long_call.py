"""Ctrl-C in the middle of a long call of an engine: it is obeyed at once, and nothing is lost."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from glasslm.config.schema import ComputeConfig
from glasslm.engines.factory import make_engine
from glasslm.training import launch, long_call, step_timer
from small_runs import (
    comparable_results,
    ignore_message,
    logged_lines,
    run_program,
    small_config,
    start_program,
    train_command,
    wait_for,
    without_report,
    write_text,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
FLAGS: dict[str, Any] = {"max_steps": 4, "eval_interval": 2, "checkpoint_interval": 2}
MAX_WAIT_S = 2.0
HANG_S = 15.0  # of the call, if nothing abandons it


def compute(engine: str) -> ComputeConfig:
    if engine == "torch":
        pytest.importorskip("torch")
    return ComputeConfig(engine=engine, device="cpu", precision="fp32", threads=2)  # type: ignore[arg-type]


def run(text: Path, folder: Path, engine: str) -> launch.Outcome:
    with without_report():
        config = small_config(text, **FLAGS)
        return launch.train(config, compute(engine), folder, notify=ignore_message)


@posix
@pytest.mark.parametrize("method", ["accumulate", "losses"])
@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_a_signal_in_a_call_abandons_it_and_a_resume_makes_it_again(
    engine: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text.txt")
    whole = run(text, tmp_path / "whole", engine)  # its calls are short, and no threads
    monkeypatch.setattr(long_call, "MIN_LONG_FLOPS", 0.0)
    kind = type(make_engine(small_config(text), 20, compute(engine), training=True))
    original, end, calls = getattr(kind, method), threading.Event(), list[float]()

    def hang(self: Any, *arguments: Any) -> Any:
        """The call of step 4, or of the evaluation at step 2, takes long."""
        if self.updates == (3 if method == "accumulate" else 2) and not calls:
            calls.append(time.monotonic())
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            end.wait(HANG_S)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step_timer, "time_steps", lambda *_: step_timer.StepTimer(
            1e-3, 1e-4, 0.0, 1e-3, 1e-3))  # fmt: skip
        patch.setattr(kind, method, hang)
        cut = run(text, tmp_path / "cut", engine)
        waited_s = time.monotonic() - calls[0]
        end.set()
    assert (cut.status, cut.signal) == ("interrupted", signal.SIGINT)
    assert waited_s < MAX_WAIT_S
    last = logged_lines(tmp_path / "cut", "checkpoint")[-1]["step"]
    assert last == (3 if method == "accumulate" else 2)
    with without_report():
        launch.resume(tmp_path / "cut", compute(engine), notify=ignore_message)
    assert comparable_results(tmp_path / "cut", 4) == comparable_results(whole.run_dir, 4)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_a_step_of_many_seconds_ends_at_once(engine: str, tmp_path: Path) -> None:
    """A real step: one micro-batch takes seconds, and its backward pass in PyTorch is one call."""
    compute(engine)
    text, folder = write_text(tmp_path / "text.txt", sentences=4000), tmp_path / "run"
    large = {"d_model": 512, "n_layers": 4, "n_heads": 8, "block_size": 512, "batch_size": 64}
    more = {"micro_batch_size": 8, "max_steps": 3, "eval_interval": 3, "sample_interval": 0}
    command = train_command(text, folder, **large | more, optimizer="adamw", engine=engine)
    process = start_program(*command)
    wait_for(lambda: bool((folder / "metrics.jsonl").exists()
                          and logged_lines(folder, "checkpoint")), process, 300)  # fmt: skip
    time.sleep(1.5)  # the first step is under way
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    # The limit of MAX_WAIT_S and the end of a process on a busy machine; the step takes minutes.
    assert time.monotonic() - start < MAX_WAIT_S + 10, err
    assert logged_lines(folder, "end")[0]["step"] == 0
    assert run_program("verify", folder).returncode == 0
