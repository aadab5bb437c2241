"""A learner's file in a process of its own, seen from the process that judges it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy

from glasslm.course.isolation import wire
from glasslm.course.isolation.evidence import Flag
from glasslm.course.isolation.process_limits import Limits
from glasslm.course.isolation.remote_error import LearnerStopped, raise_remote_error
from glasslm.course.isolation.wire import ClosedError, WireError, read_message, write_message

HAS_FORK_SERVER = sys.platform == "linux"
MAX_FLAGS = 200  # of one file


class LearnerProcess:
    """One learner's file in its process. A context manager; the process ends with the block.

    Attributes:
        flags: The evidence that the process has reported so far.
        limits_kept: Which limits the system keeps: "cpu", "memory", "network".
        counts_instructions: Whether calls count the instructions of Python in the learner's file.
        instructions: Their sum over the calls that were counted.
    """

    def __init__(self, server: ForkServer | None = None, limits: Limits | None = None) -> None:
        """Start the process, by a server where the system has one."""
        self._limits = limits or Limits()
        self.flags: list[Flag] = []
        self._n_messages = 0
        self._offered: list[Any] = []  # functions of this process that the learner's may call
        self.counts_instructions, self.instructions = False, 0
        self._file = "learner.py"
        self._lines: list[str] = []
        self._is_out_of_time = False
        self._lock = threading.Lock()
        self._start = _Forked(server, self._limits) if server else _Spawned(self._limits)
        self._timer = threading.Timer(self._limits.wall_s, self._end_in_time)
        self._timer.daemon = True
        self._timer.start()
        self.limits_kept: dict[str, bool] = self._receive()[0]["limits"]

    def load(self, file: str, source: str) -> list[str]:
        """Run a file's text as a module. Returns the names of what can be called in it.

        Raises the error of the file, or LearnerStopped.
        """
        self._file, self._lines = file, source.splitlines()
        answer, arrays = self.ask({"do": "load", "file": file, "source": source}, [])
        names = wire.decode(answer["value"], arrays, lambda code: None)
        return [name for name in names if isinstance(name, str)]

    def ask(
        self, message: dict[str, Any], arrays: list[bytes]
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Send a message; returns the answer and the bytes of its arrays.

        Raises the learner's error, and LearnerStopped where the process has ended or answers with
        nonsense.
        """
        self._n_messages += 1
        self._send(message | {"id": self._n_messages}, arrays)
        while True:
            answer, replies = self._receive()
            if "report" in answer:
                self._note(answer["report"])
            elif "callback" in answer:
                self._answer_callback(answer, replies)
            elif answer.get("id") != self._n_messages:
                raise self.reject("an answer that was not asked for")
            elif "error" in answer:
                raise_remote_error(answer["error"], self._file)
            elif "value" in answer:
                return answer, replies
            else:
                raise self.reject("a message without a value")

    def offer(self, function: Any) -> dict[str, Any]:
        """Let the learner's code call a function of this process; returns its description.

        It gets arrays and numbers, and returns them, or further functions such as a backward pass.
        """
        if not callable(function):
            raise WireError(f"a {type(function).__name__} cannot be sent to a learner's process")
        self._offered.append(function)
        return {"callback": len(self._offered) - 1}

    def finish(self) -> list[Flag]:
        """All evidence about the file, after a last look at what it leaves behind."""
        with suppress(LearnerStopped, Exception):  # it may be gone, or send what it likes
            self.ask({"do": "finish"}, [])
        return sorted(set(self.flags))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._timer.cancel()
        with self._lock:
            self._start.end()

    def reject(self, what: str) -> LearnerStopped:
        """The error for a message that only a forger sends; it is evidence, too."""
        self.flags.append(Flag("checker", 0, f"its process has sent {what}"))
        with self._lock:
            self._start.end()
        return LearnerStopped(f"the process has sent {what}: does it write to open files?")

    def _send(self, message: dict[str, Any], arrays: list[bytes]) -> None:
        try:
            write_message(self._start.writer, message, arrays)
        except (OSError, ValueError):
            raise self._explain_end() from None

    def _receive(self) -> tuple[dict[str, Any], list[bytes]]:
        try:
            return read_message(self._start.reader)
        except (ClosedError, OSError, ValueError):
            raise self._explain_end() from None
        except WireError as error:
            raise self.reject(f"what is no answer ({error})") from None

    def _answer_callback(self, message: dict[str, Any], arrays: list[bytes]) -> None:
        """Call a function of this process for the learner's code, and send its result."""
        replies: list[bytes] = []
        try:
            arguments = [wire.decode(code, arrays, lambda code: None) for code in message["args"]]
            result = self._offered[message["callback"]](*arguments)
            answer: dict[str, Any] = {"value": wire.encode(result, replies, self.offer)}
        except Exception as error:  # the arguments are the learner's
            replies.clear()
            answer = {"error": f"{type(error).__name__}: {error}"}
        self._send(answer, replies)

    def _note(self, report: Any) -> None:
        """Keep a report, if it is one."""
        with suppress(KeyError, TypeError, ValueError):
            line = int(report["line"])
            text = self._lines[line - 1].strip() if 0 < line <= len(self._lines) else ""
            flag = Flag(report["kind"], line, str(report["detail"])[:200], text[:200])
            if len(self.flags) < MAX_FLAGS:
                self.flags.append(flag)

    def _end_in_time(self) -> None:
        with self._lock:
            self._is_out_of_time = True
            self._start.kill()

    def _explain_end(self) -> LearnerStopped:
        """The error for a process that does not answer any more."""
        with self._lock:
            status = self._start.end()
        if self._is_out_of_time:
            return LearnerStopped(f"no end within {self._limits.wall_s:g} s")
        if status >= 0:
            return LearnerStopped("the process ended before its answer: is there an exit in it?")
        name = signal.Signals(-status).name
        if name in ("SIGXCPU", "SIGKILL"):
            return LearnerStopped(
                f"no end within {self._limits.cpu_s} s of CPU time, or no memory left: the process "
                "was killed"
            )
        return LearnerStopped(f"the process crashed ({name})")


class ForkServer:
    """A process with NumPy loaded that forks a process for each file (Linux). Not thread-safe."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            _command("fork"),
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )
        theirs.close()

    def close(self) -> None:
        """End the server."""
        self.control.close()
        self._process.kill()
        self._process.wait()


class _Forked:
    """A process that a server has forked."""

    def __init__(self, server: ForkServer, limits: Limits) -> None:
        ours, theirs = socket.socketpair()
        self._control = server.control
        text = json.dumps(limits.to_json()).encode()
        socket.send_fds(self._control, [text], [theirs.fileno()])
        theirs.close()
        self._pid = int(self._control.recv(32))
        self.reader: BinaryIO = ours.makefile("rb")
        self.writer: BinaryIO = ours.makefile("wb")
        ours.close()
        self._status: int | None = None

    def kill(self) -> None:
        if self._status is None:  # else its number may belong to another process
            os.kill(self._pid, signal.SIGKILL)

    def end(self) -> int:
        """End the process; returns its exit code, negative for a signal."""
        if self._status is None:
            self._control.send(b"end")
            self._status = int(self._control.recv(32))
            for stream in (self.writer, self.reader):
                with suppress(OSError):
                    stream.close()
        return self._status


class _Spawned:
    """A process of a fresh interpreter, where there is no server."""

    def __init__(self, limits: Limits) -> None:
        self._process = subprocess.Popen(
            _command("single"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.reader: BinaryIO = self._process.stdout  # type: ignore[assignment]
        self.writer: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self.writer.write(json.dumps(limits.to_json()).encode() + b"\n")
        self.writer.flush()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """End the process; returns its exit code, negative for a signal."""
        if self._process.poll() is None:
            self._process.kill()
        for stream in (self.writer, self.reader):
            with suppress(OSError):
                stream.close()
        return self._process.wait()


def _command(kind: str) -> list[str]:
    """A fresh interpreter without the user's settings, with the folders of NumPy and glasslm."""
    folders = [str(Path(numpy.__file__).parents[1]), str(Path(__file__).parents[3])]
    program = (
        f"import sys; sys.path[:0] = {folders!r}; "
        f"from glasslm.course.isolation.learner_server import main; main({kind!r})"
    )
    return [sys.executable, "-I", "-c", program]


def _environment() -> dict[str, str]:
    """Nothing of this process's environment; one thread for each BLAS. Windows needs SYSTEMROOT."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    return kept | dict.fromkeys(names, "1")
