"""A terminal that is closed while a run trains, and a display that cannot start."""

import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glasslm.training import launch
from small_runs import (
    comparable_results,
    logged_lines,
    resume,
    train,
    train_command,
    without_report,
    write_text,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
STEPS = 250
FLAGS: dict[str, Any] = {"max_steps": STEPS, "eval_interval": STEPS, "sample_interval": 0}
FLAGS |= {"checkpoint_interval": STEPS}
PROGRAM = """
import sys
from glasslm import cli
from glasslm.report import run_report
run_report.write = lambda folder, *_: folder / "report.html"
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose terminal stays open."""
    return train(text, tmp_path_factory.mktemp("runs") / "whole", **FLAGS).run_dir


def count_steps(run: Path) -> int:
    return len(logged_lines(run, "step")) if (run / "metrics.jsonl").exists() else 0


@posix
@pytest.mark.parametrize("controls", [True, False], ids=["controlling", "another"])
def test_a_terminal_that_is_closed_ends_the_run_it_controls(
    controls: bool, text: Path, whole: Path, tmp_path: Path
) -> None:
    """The system sends SIGHUP then. Without it, the display stops and the run goes on."""
    import fcntl
    import pty
    import termios

    run = tmp_path / "run"
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def take_terminal() -> None:
        os.setsid()
        if controls:
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *train_command(text, run, **FLAGS)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=take_terminal,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(terminal)
    output, end = b"", time.monotonic() + 60
    while count_steps(run) < 5 and time.monotonic() < end:
        if select.select([master], [], [], 0.05)[0]:
            output += os.read(master, 1 << 16)
    os.close(master)
    try:
        code = process.wait(60)
    finally:
        process.kill()
    assert "╭".encode() in output  # the live panel
    assert b"Traceback" not in output
    (last,) = logged_lines(run, "end")
    if controls:
        assert (code, last["status"]) == (128 + signal.SIGHUP, "interrupted")
        assert (run / "checkpoints" / f"{last['step']:06d}" / "manifest.json").is_file()
        assert resume(run).status == "finished"
    assert code in (129, 0)
    assert comparable_results(run, STEPS) == comparable_results(whole, STEPS)


def test_no_run_is_created_before_its_display(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(launch, "Display", fail)
    with without_report(), pytest.raises(OSError, match="Input/output"):
        train(text, tmp_path / "run", max_steps=2)
    assert not (tmp_path / "run").exists()
