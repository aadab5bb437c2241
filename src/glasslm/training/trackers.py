"""Trackers: wandb or TensorBoard shows the metrics of a run while it trains.

A tracker is a process of its own (tracker_process.py), which reads metrics.jsonl as it grows. So
its library cannot change a run, whatever threads and handlers it has; where it fails or hangs, the
run loses a few seconds at its end. A tracker ends when the process that trains ends: it holds the
other end of the tracker's standard input.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glasslm.errors import InputError
from glasslm.runs.checkpoint import TrainingPosition
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, to_one_line
from glasslm.training.interruption import SignalEvent, catch_signals
from glasslm.training.tracker_process import MAX_CLOSE_S, POLL_S, TRACKERS

MAX_START_S = 30.0  # wait for the trackers before the first step
SILENT_WAIT_S = 2.0  # of MAX_CLOSE_S, before a message says what the run waits for


def parse_trackers(track: str) -> tuple[str, ...]:
    """The names in "wandb,tensorboard".

    Raises InputError for another name, and where the library is not installed.
    """
    names = tuple(dict.fromkeys(word for part in track.split(",") if (word := part.strip())))
    for name in names:
        if name not in TRACKERS:
            raise InputError(
                f"there is no tracker '{name}': choose from {', '.join(TRACKERS)}, or both with a "
                "comma"
            )
        spec = find_spec(name)
        # A folder of that name, such as wandb leaves behind, has a spec without origin.
        if spec is None or spec.origin is None:
            raise InputError(
                f"--track {name} needs {name}, which is not installed: `pip install "
                "'glasslm[track]'`, or leave it out"
            )
    return names


@contextmanager
def track_run(
    names: tuple[str, ...], run: Run, position: TrainingPosition | None, notify: Notify
) -> Iterator[SignalEvent]:
    """Run the trackers during the block; the log of the run is open in it.

    `notify` receives the address of each tracker, and its failure. The yielded event is set where a
    signal came while the run waited for its trackers to start.
    """
    processes: list[_TrackerProcess] = []
    try:
        for name in names:
            try:
                processes.append(_TrackerProcess(name, run.path, position))
            except OSError as error:  # no memory, or too many processes
                notify(_failure_warning(name, str(error)))
        end = time.monotonic() + MAX_START_S
        with catch_signals() as interrupt:
            for process in processes:
                process.wait_for_start(end, notify, interrupt)
        yield interrupt
    finally:
        end = time.monotonic() + MAX_CLOSE_S
        for process in processes:
            process.finish()
        for process in processes:
            process.wait_for_end(end, notify)


def _failure_warning(name: str, reason: str) -> str:
    # The reason may hold a long path.
    return f"warning: {name} no longer tracks this run: {to_one_line(reason, max_chars=400)}"


class _TrackerProcess:
    """A tracker's process, as the run sees it."""

    def __init__(self, name: str, run_dir: Path, position: TrainingPosition | None) -> None:
        """Start the tracker `name`.

        It reads metrics.jsonl from the checkpoint of a resumed run on, or from the beginning where
        this run was not tracked before.
        """
        self.name, self.has_failed = name, False
        start, step = 0, 0
        if position and (run_dir / name).is_dir():
            start, step = position.metrics_bytes, position.step
        module = "glasslm.training.tracker_process"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, name, str(run_dir), str(start), str(step)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run
        )
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True, name=name)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # Python itself may print when it starts
                    self._messages.put(json.loads(line))
        self._messages.put({"failed": "its process ended without a message"})

    def wait_for_start(self, end: float, notify: Notify, interrupt: SignalEvent) -> None:
        """Wait until the tracker is ready, `end` (time.monotonic) or a signal."""
        is_ready = self._wait_for_message(("where", "failed"), end, notify, interrupt)
        if not is_ready and not interrupt.is_set():
            notify(f"note: {self.name} is not ready yet: the run starts without waiting for it")

    def finish(self) -> None:
        """Signal the end of the run to the tracker."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait_for_end(self, end: float, notify: Notify) -> None:
        """Wait for the tracker until `end` or Ctrl-C, then kill it; the run is saved already."""
        done = ("done", "failed")
        try:
            silent_end = time.monotonic() + SILENT_WAIT_S
            if not self.has_failed and not self._wait_for_message(done, silent_end, notify):
                notify(
                    f"waiting for {self.name}, at most {MAX_CLOSE_S:.0f} seconds; Ctrl-C ends it"
                )
                if not self._wait_for_message(done, end, notify):
                    reason = f"it did not end within {MAX_CLOSE_S:.0f} seconds"
                    notify(_failure_warning(self.name, reason))
            self._process.wait(timeout=SILENT_WAIT_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            # A timeout: its library may hang when Python exits.
            if isinstance(error, KeyboardInterrupt):
                notify(_failure_warning(self.name, "Ctrl-C ended it"))
            self._process.kill()
            self._process.wait()
        self._listener.join()

    def _wait_for_message(
        self,
        kinds: tuple[str, ...],
        end: float,
        notify: Notify,
        interrupt: SignalEvent | None = None,
    ) -> bool:
        """Whether a message of one of these kinds came before `end` or a signal.

        Addresses and failures in the messages are passed to `notify`.
        """
        while True:
            try:
                timeout = max(0.0, min(POLL_S, end - time.monotonic()))
                message = self._messages.get(timeout=timeout)
            except queue.Empty:
                if time.monotonic() < end and not (interrupt and interrupt.is_set()):
                    continue
                return False
            if "where" in message:
                notify(f"{self.name}: {message['where']}")
            if "failed" in message:
                self.has_failed = True
                notify(_failure_warning(self.name, message["failed"]))
            if not message.keys().isdisjoint(kinds):
                return True
