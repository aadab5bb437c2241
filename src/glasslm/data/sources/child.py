"""A process beside this one for libraries that may hang, crash or want another environment: a module that reads and
writes lines, and that is ended when it is no longer needed."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from glasslm.text import one_line

ROOM = 16  # lines that wait to be taken, at most


class Child:
    """`python -m MODULE ARGUMENTS`, which does not find modules in the working folder. Used in a `with` block."""

    def __init__(
        self, module: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._lines: queue.Queue[bytes] = queue.Queue(ROOM)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, daemon=True, name=module)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def tell(self, line: bytes) -> None:
        """Write a line to its standard input; one that is gone does not hear it."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def line(self, patience: float) -> bytes:
        """Its next line, b"" when it has ended. Raises TimeoutError after `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            try:
                return self._lines.get(timeout=0.5)  # short, so that Ctrl-C gets through everywhere
            except queue.Empty:
                if time.monotonic() > until:
                    raise TimeoutError from None

    def last_words(self) -> str:
        """The last line that it wrote to its standard error, in brackets, or nothing."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        words = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f" ({one_line(words[-1])})" if words else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """It is ended, whatever it is doing, and nothing of it stays."""
        self._process.kill()
        self._process.wait()
        while self._listener.is_alive():  # it may wait for room
            with suppress(queue.Empty):
                self._lines.get(timeout=0.05)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            with suppress(OSError):  # of what it was told and did not read
                stream.close()
