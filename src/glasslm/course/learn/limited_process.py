"""The check of a file in a process of its own, which may hang, crash or print without harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from glasslm.course.learn.exercises import load_exercise
from glasslm.course.learn.verdict import Verdict, failed_verdict

# Of one exercise. The worker stops itself earlier, unless a library call holds the interpreter.
WALL_SECONDS = 12.0
MAX_ANSWER_BYTES = 4 << 20
TIME_SIGNALS = (9, 24)  # SIGKILL of this module, SIGXCPU of the worker's limit
THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def check_in_process(path: Path, exercises: list[str], seed: int) -> list[Verdict]:
    """The verdicts of one worker, at least one; fewer than exercises where the worker died."""
    request = json.dumps({"path": os.fspath(path.absolute()), "exercises": exercises, "seed": seed})
    process = _start_worker()
    try:
        output, _ = process.communicate(request.encode(), timeout=WALL_SECONDS * len(exercises))
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate()
    finally:
        _kill(process)
    verdicts, stage = _read_answers(output[:MAX_ANSWER_BYTES])
    if len(verdicts) < len(exercises):
        verdicts.append(_died(exercises[len(verdicts)], stage, process.returncode))
    return verdicts


def _start_worker() -> subprocess.Popen[bytes]:
    """The worker: it writes no bytecode, imports nothing from here, and uses one thread."""
    root = Path(__file__).parents[3]  # the folder of the package glasslm
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-B", "-P", "-m", "glasslm.course.learn.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ
        | dict.fromkeys(THREAD_LIMITS, "1")
        | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"},
        start_new_session=os.name == "posix",
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the worker, and the processes that the learner's code has started."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _read_answers(output: bytes) -> tuple[list[Verdict], str]:
    """The verdicts that the worker wrote, and the last thing that it began."""
    verdicts, stage = [], ""
    for line in output.splitlines():
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # the end of a line that was cut
        if "stage" in answer:
            stage = answer["stage"]
        else:
            verdicts.append(Verdict(**answer | {"also": tuple(answer["also"])}))
    return verdicts, stage


def _died(name: str, stage: str, exit_code: int | None) -> Verdict:
    """The verdict on code that ended its process or did not let it stop."""
    during = f" while {stage}" if stage else ""
    if exit_code is None or exit_code >= 0:
        sentence = f"the code ended its process (exit code {exit_code}){during}: remove os._exit"
    elif -exit_code in TIME_SIGNALS:
        sentence = f"the code did not end in time{during}, or its process was killed"
    else:
        sentence = f"the code crashed Python (signal {-exit_code}){during}"
    return failed_verdict(load_exercise(name), sentence)
