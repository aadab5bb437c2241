"""Commands of glasslm in forks of one process, which has its modules in memory: POSIX only."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from glasslm import cli

HANG_S = 30.0  # after which a command is killed: a guard, not a measure of its speed


class Result(NamedTuple):
    """The end of a command; the code of a signal that ended it is negative."""

    code: int
    out: str
    err: str


def load_commands() -> None:
    """Import the modules of all commands, which their forks then have in memory."""
    for name in (*cli.COMMANDS, "parsing"):
        importlib.import_module(f"glasslm.cli.{name}")
    for name in ("tyro", "rich.console", "glasslm.interop.gguf_file", "glasslm.report.run_report",
                 "glasslm.lab.verification.integrity", "glasslm.training.launch"):  # fmt: skip
        importlib.import_module(name)


def run_forked(
    argv: list[str],
    prepare: Callable[[Callable[[], None]], None] = lambda ready: None,
    numbers: tuple[int, ...] = (),
    place: Path = Path(),
) -> Result:
    """Run the program with `argv` in a fork.

    `prepare` patches the fork. It gets a function to call when the command is in the middle of its
    work; then the signals `numbers` are sent.
    """
    reading, writing = os.pipe()
    log = [place / f"{stream}.{os.getpid()}" for stream in ("out", "err")]
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        for number, path in enumerate(log, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["glasslm", *argv]
        code = 99
        try:
            prepare(lambda: (os.write(writing, b"r"), None)[1])
            if sys.stdout is not None:  # as Python opens them when it starts
                sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", 1, encoding="utf-8", closefd=False)  # noqa: SIM115
            code = cli.main()
        except SystemExit as request:
            code = request.code if isinstance(request.code, int) else 0
        except BaseException as error:
            sys.__stderr__.write(f"Traceback: {error!r}")  # type: ignore[union-attr]
            sys.__stderr__.flush()  # type: ignore[union-attr]
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb", buffering=0) as pipe:
        if numbers and pipe.read(1):
            for number in numbers:
                time.sleep(0.3)
                os.kill(pid, number)
    end = time.monotonic() + HANG_S
    while not (waited := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            end += HANG_S
        time.sleep(0.02)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in log]
    return Result(os.waitstatus_to_exitcode(waited[1]), *texts)


def run_script(file: str, folder: Path, *more: str) -> dict[str, Any]:
    """The JSON that a test file prints last when it runs as a program with `folder` and `more`."""
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", file, str(folder), *more]
    previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results
