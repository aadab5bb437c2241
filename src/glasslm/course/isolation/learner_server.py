"""The process that starts learners' processes, or is one: `main` runs in a fresh interpreter.

It imports NumPy and nothing that knows an answer. On Linux it forks a process for each file, which
takes milliseconds; elsewhere it is the process of one file itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile

from glasslm.course.isolation.learner_loop import serve
from glasslm.course.isolation.library_snapshot import load_watched_modules
from glasslm.course.isolation.process_limits import Limits, hide_standard_streams, limit_process
from glasslm.course.isolation.system_calls import end_with_parent
from glasslm.course.isolation.wire import write_message


def main(kind: str) -> None:
    """Serve on standard input: "fork" starts processes, "single" is the process of one file."""
    load_watched_modules()
    os.environ.clear()
    os.chdir(tempfile.gettempdir())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started it
    if kind == "fork":
        _fork_for_each_file()
    else:
        limits = Limits(**json.loads(sys.stdin.buffer.readline()))
        reader, writer = os.dup(0), os.dup(1)
        _run_learner(reader, writer, limits)


def _fork_for_each_file() -> None:
    """Standard input is a socket: each message is the limits of a file, with its connection."""
    import socket

    end_with_parent()
    control = socket.socket(fileno=os.dup(0))
    while True:
        text, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not text:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            os.setsid()
            end_with_parent()
            connection = descriptors[0]
            try:
                _run_learner(connection, os.dup(connection), Limits(**json.loads(text)))
            finally:
                os._exit(0)
        os.close(descriptors[0])
        control.send(str(pid).encode())
        control.recv(16)  # the other side has finished with the process
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        control.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run_learner(reader: int, writer: int, limits: Limits) -> None:
    """Set the limits, say which of them are kept, and answer until the connection is closed."""
    hide_standard_streams()
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb") as sink:
        write_message(sink, {"limits": limit_process(limits)}, [])
        serve(source, sink)
    os._exit(0)  # functions that the learner has registered do not run
