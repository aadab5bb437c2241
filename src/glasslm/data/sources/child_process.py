"""Run a module of glasslm in a process of its own and read its lines.

Libraries that may hang, crash or need another environment run there. The process is killed when it
is no longer needed.
"""

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

from glasslm.text import to_one_line

MAX_WAITING_LINES = 16  # read from the process and not yet taken


class ChildProcess:
    """`python -m MODULE ARGUMENTS`, used in a `with` block.

    Python's flag -P keeps it from importing modules of the working folder.
    """

    def __init__(
        self, module: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._lines: queue.Queue[bytes] = queue.Queue(MAX_WAITING_LINES)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, env=environment,
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, daemon=True, name=module)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def read_line(self, timeout_s: float) -> bytes:
        """The next line of its output, b"" when it has ended. Raises TimeoutError."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                # A short timeout lets Ctrl-C through on every system.
                return self._lines.get(timeout=0.5)
            except queue.Empty:
                if time.monotonic() > deadline_s:
                    raise TimeoutError from None

    def last_error_line(self) -> str:
        """The last line of its standard error as " (LINE)", or ""."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f" ({to_one_line(lines[-1])})" if lines else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill the process and release its pipes."""
        self._process.kill()
        self._process.wait()
        while self._listener.is_alive():  # It may wait for room in the queue.
            with suppress(queue.Empty):
                self._lines.get(timeout=0.05)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
