"""The process that runs a learner's code: it reads a request from its input and writes verdicts.

It limits its own memory, and a thread watches its time: the thread also ends code that catches
every exception. Whatever the code prints is discarded.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from glasslm.course.learn.checking import check_function
from glasslm.course.learn.exercise import Exercise
from glasslm.course.learn.exercises import load_exercise
from glasslm.course.learn.observation import locate_error
from glasslm.course.learn.verdict import Verdict, failed_verdict
from glasslm.text import describe_error

MODULE_NAME = "glasslm_learner"  # of the file: its own name may be that of a library
CPU_SECONDS = 1.5  # of one exercise
IDLE_SECONDS = 3.0  # of one exercise that uses hardly any CPU: code that sleeps or waits
IDLE_CPU_SECONDS = 0.3
WALL_SECONDS = 10.0  # of one exercise, on a machine that is busy with other work
HARD_CPU_SECONDS = 1  # beyond the others: for a library call that never lets the watch thread run
MEMORY_BYTES = 1 << 30
WATCH_INTERVAL = 0.02  # seconds


class Answers:
    """Where the worker writes: the standard output that it was started with."""

    def __init__(self) -> None:
        self.descriptor = os.dup(1)
        self.lock = threading.Lock()

    def write(self, answer: dict[str, Any]) -> None:
        """Write one line."""
        os.write(self.descriptor, json.dumps(answer).encode() + b"\n")


class Watch:
    """A thread that ends the process when an exercise takes too long or too much memory."""

    def __init__(self, answers: Answers, file: str) -> None:
        self.answers, self.file = answers, file
        self.exercise: Exercise | None = None
        self.main = threading.get_ident()
        self.start(None)
        threading.Thread(target=self._run, daemon=True).start()

    def start(self, exercise: Exercise | None) -> None:
        """Begin the time of an exercise."""
        self.exercise = exercise
        self.cpu, self.wall = time.process_time(), time.monotonic()
        _limit_cpu(self.cpu + CPU_SECONDS + HARD_CPU_SECONDS)

    def _run(self) -> None:
        while True:
            time.sleep(WATCH_INTERVAL)
            exercise, where = self.exercise, self._line()
            cpu, wall = time.process_time() - self.cpu, time.monotonic() - self.wall
            is_idle = wall > IDLE_SECONDS and cpu < IDLE_CPU_SECONDS
            if cpu > CPU_SECONDS or is_idle or wall > WALL_SECONDS:
                cause = "it waits" if is_idle else "an endless loop"
                sentence = f"{where}no end after {wall:.1f} s: {cause}?"
            elif _peak_memory() > 2 * MEMORY_BYTES:
                sentence = f"{where}more than {MEMORY_BYTES >> 20} MiB of memory"
            else:
                continue
            if exercise is not None:
                with self.answers.lock:
                    self.answers.write(failed_verdict(exercise, sentence).to_json())
            os._exit(0)

    def _line(self) -> str:
        """ "line 12: ", the learner's line that runs now."""
        frame = sys._current_frames().get(self.main)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return f"line {frame.f_lineno}: " if frame is not None else ""


def main() -> NoReturn:
    """Answer one request: a line of JSON for each exercise that was finished."""
    request = json.loads(sys.stdin.buffer.read())
    answers = Answers()
    _discard_output()
    _limit_memory()
    if hasattr(os, "register_at_fork"):
        # Copies of this process would check the file, too, and hold the parent's pipe open.
        os.register_at_fork(after_in_child=lambda: os._exit(0))
    path = Path(request["path"])
    watch = Watch(answers, path.name)
    exercises = [load_exercise(name) for name in request["exercises"]]
    watch.start(exercises[0])
    answers.write({"stage": "loading the file"})
    namespace, problem = _load(path)
    for exercise in exercises:
        watch.start(exercise)
        answers.write({"stage": f"checking {exercise.name}"})
        verdict = (
            failed_verdict(exercise, problem)
            if problem
            else _check(exercise, namespace, path.name, request["seed"])
        )
        with answers.lock:  # the watch thread must not answer, too
            answers.write(verdict.to_json())
    os._exit(0)  # threads of the learner's code may still run


def _discard_output() -> None:
    """Send what the learner's code prints, and its children, nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # Windows has no limits, macOS not all
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_cpu(seconds: float) -> None:
    """End this process when it has used so much CPU in all."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), hard))


def _peak_memory() -> int:
    """The peak memory of this process, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _load(path: Path) -> tuple[dict[str, Any], str]:
    """Run the file; returns its names, and why it failed or ""."""
    module = types.ModuleType(MODULE_NAME)
    module.__file__ = str(path)
    sys.modules[MODULE_NAME] = module  # dataclasses look their module up
    namespace = vars(module)
    sys.path.append(str(path.parent))  # last: a learner's random.py must not replace Python's
    try:
        text = path.read_text(encoding="utf-8-sig")
        code = compile(text, path.name, "exec", dont_inherit=True)
        exec(code, namespace)
    except BaseException as error:  # SystemExit and MemoryError, too
        return namespace, _explain(error, path.name)
    return namespace, ""


def _check(exercise: Exercise, namespace: dict[str, Any], file: str, seed: int) -> Verdict:
    function = namespace.get(exercise.name)
    if not callable(function):
        return failed_verdict(
            exercise, f"{exercise.name} is {type(function).__name__}, not a function"
        )
    try:
        return check_function(exercise, function, seed)
    except BaseException as error:
        return failed_verdict(exercise, _explain(error, file))


def _explain(error: BaseException, file: str) -> str:
    """An error in one line, with the learner's line."""
    where = locate_error(error, file)
    description = describe_error(error)
    if isinstance(error, MemoryError):
        description = f"MemoryError: more than {MEMORY_BYTES >> 20} MiB of memory"
    if not where and not isinstance(error, (MemoryError, RecursionError)):
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"inside {Path(last.filename).name}, line {last.lineno}: "
    return where + description


if __name__ == "__main__":
    main()
