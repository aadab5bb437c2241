"""Several marking processes side by side."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

from glasslm.course.grading.marking import Job, Record, mark

_POLL_S = 0.5  # between two looks for Ctrl-C, which Windows does not deliver to a waiting thread


def mark_all(jobs: Sequence[Job], workers: int) -> Iterator[Record]:
    """The records of all jobs, each as soon as it is ready, in any order.

    Args:
        jobs: The files to mark.
        workers: The number of processes.

    When the caller stops, for example by Ctrl-C, the processes end with it.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    records: queue.SimpleQueue[Record | BaseException] = queue.SimpleQueue()
    processes = [_MarkingProcess() for _ in range(min(workers, len(jobs)))]
    for process in processes:
        threading.Thread(target=_work, args=(process, waiting, records), daemon=True).start()
    try:
        n_left = len(jobs)
        while n_left:
            try:
                record = records.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(record, BaseException):
                raise record
            n_left -= 1
            yield record
    finally:
        for process in processes:
            process.stop()


def _work(
    process: _MarkingProcess,
    waiting: queue.SimpleQueue[Job],
    records: queue.SimpleQueue[Record | BaseException],
) -> None:
    """Give jobs to one process until none is left; an error ends the whole."""
    while True:
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            records.put(process.mark(job))
        except BaseException as error:
            records.put(error)
            return


class _MarkingProcess:
    """One marking process, which is started again when a file has ended it."""

    def __init__(self) -> None:
        self._process = _start()
        self._is_stopped = False

    def mark(self, job: Job) -> Record:
        """The record of a job; one that says so where the process ends instead of answering."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if line:
            record: Record = json.loads(line)
            return record
        code = self._end()
        if not self._is_stopped:
            self._process = _start()
        problem = f"marking this file ended the marking process (exit code {code})"
        return mark(job | {"problem": problem}, None)

    def stop(self) -> None:
        """End the process."""
        self._is_stopped = True
        self._process.kill()
        self._end()

    def _end(self) -> int:
        """Wait for the end of the process; returns its exit code."""
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        return code


def _start() -> subprocess.Popen[str]:
    """Without the working folder on its path: it may have a student's numpy.py."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "glasslm.course.grading.marking_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )
