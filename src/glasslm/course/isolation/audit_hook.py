"""What a learner's code does while it runs, seen by Python's audit hook (PEP 578).

A hook cannot be removed. Each event is reported to the other side at once, before the call that
raised it goes on, so code that finds the hook later cannot take a report back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from glasslm.course.isolation.evidence import FlagKind, module_kind

Report = Callable[[FlagKind, int, str], None]  # kind, line of the learner's file, detail

# Events of Python's table of audit events, or their first names: what they are evidence of.
EVENT_KINDS: dict[str, FlagKind] = {
    "sys._getframe": "checker",
    "sys._current_frames": "checker",
    "sys._current_exceptions": "checker",
    "sys.settrace": "checker",
    "sys.setprofile": "checker",
    "sys.addaudithook": "checker",
    "object.__getattr__": "checker",
    "gc": "checker",
    "ctypes": "memory",
    "mmap": "memory",
    "subprocess": "program",
    "pty": "program",
    "os.system": "program",
    "os.exec": "program",
    "os.fork": "program",
    "os.forkpty": "program",
    "os.posix_spawn": "program",
    "os.spawn": "program",
    "os.startfile": "program",
    "os.kill": "program",
    "os.killpg": "program",
    "os.putenv": "environment",
    "os.unsetenv": "environment",
    "os": "file",
    "shutil": "file",
    "glob": "file",
    "tempfile": "file",
    "sqlite3": "file",
    "socket": "network",
    "urllib": "network",
    "http": "network",
    "ftplib": "network",
    "smtplib": "network",
    "_thread": "survives",
    "exec": "text_as_code",
    "compile": "text_as_code",
}
# The library uses these for itself (namedtuple, dataclasses, warnings), so only a call from the
# learner's own line counts, or one of the learner's to `inspect`.
DIRECT_EVENTS = frozenset(EVENT_KINDS) & {
    "sys._getframe", "sys.settrace", "sys.setprofile", "object.__getattr__", "exec", "compile",
}  # fmt: skip
FRAME_ATTRIBUTES = frozenset(("tb_frame", "f_code", "gi_frame", "cr_frame", "__code__"))


def watch(file: str, report: Report) -> None:
    """Report from here on what code of `file` does besides computing, and refuse most of it.

    Args:
        file: The name of the learner's file in its code objects.
        report: Receives the events.
    """
    get_frame, is_busy = sys._getframe, False
    folders = _library_folders()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_busy
        if is_busy:  # the hook itself looks at frames
            return
        kind = EVENT_KINDS.get(event) or EVENT_KINDS.get(event.partition(".")[0])
        if kind is None and event not in ("import", "open"):
            return
        is_busy = True
        try:
            frame = get_frame(1)
            line, is_importing = _find_learner(file, frame)
            if not line:
                return
            caller = _caller_file(frame, event)
            is_direct = caller in (file, "<string>")
            if event == "import":
                _judge_import(str(arguments[0]), line, is_direct, is_importing)
            elif event == "open":
                is_of_library = is_importing and not is_direct and not _is_importer(caller)
                _judge_opening(arguments[0], line, is_direct, is_of_library)
            elif kind and not is_importing:  # a library that is imported may do as it likes
                _judge_event(event, arguments, kind, line, is_direct)
        finally:
            is_busy = False

    def _judge_import(module: str, line: int, is_direct: bool, is_importing: bool) -> None:
        kind = module_kind(module)
        if kind and (is_direct or (kind == "library" and not is_importing)):
            report(kind, line, f"import {module}")
        if kind == "library":
            raise ImportError(f"{module} is not available here: use NumPy")

    def _judge_opening(path: Any, line: int, is_direct: bool, is_of_library: bool) -> None:
        if path == os.devnull:
            return
        package = _package_of(path, folders) if isinstance(path, (str, bytes)) else None
        is_answer = package is not None and module_kind(package) == "library"
        if not is_answer and (is_of_library or (package is not None and not is_direct)):
            return  # an import, or a traceback that shows a line
        detail = f"opens files of {package}" if is_answer else f"open({path!r})"
        report("library" if is_answer else "file", line, detail)
        raise PermissionError(f"{path!r} is not opened here: an exercise reads and writes no file")

    def _judge_event(
        event: str, arguments: tuple[Any, ...], kind: FlagKind, line: int, is_direct: bool
    ) -> None:
        if event in DIRECT_EVENTS and not is_direct:
            return
        if event == "object.__getattr__" and arguments[1] not in FRAME_ATTRIBUTES:
            return
        report(kind, line, describe_event(event, arguments))
        if kind != "text_as_code":  # what the text does is watched as well
            raise PermissionError(f"{event} is refused here: it is no part of an exercise")

    sys.addaudithook(hook)


def describe_event(event: str, arguments: tuple[Any, ...]) -> str:
    """An event and its arguments of text and numbers, in one line."""
    words = [repr(value)[:60] for value in arguments if isinstance(value, (str, bytes, int))]
    return f"{event}({', '.join(words[:3])})"


def _find_learner(file: str, frame: FrameType | None) -> tuple[int, bool]:
    """The line of `file` that runs, 0 if none does, and whether it is importing a module."""
    is_importing = False
    while frame is not None:
        if frame.f_code.co_filename == file:
            return frame.f_lineno, is_importing
        is_importing |= (
            _is_importer(frame.f_code.co_filename) and frame.f_code.co_name == "_find_and_load"
        )
        frame = frame.f_back
    return 0, False


def _is_importer(file: str) -> bool:
    """Whether a file of a code object is that of Python's import system."""
    return file.startswith("<frozen importlib")


def _caller_file(frame: FrameType, event: str) -> str:
    """The file whose code raised an event, or that called a module which hands out frames."""
    helpers = ("inspect", "traceback") if event == "sys._getframe" else ("inspect",)
    while frame.f_globals.get("__name__") in helpers and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename


def _library_folders() -> list[str]:
    """The folders of installed modules, the longest paths first."""
    folders = {os.path.realpath(folder) for folder in (*sys.path, sys.prefix, sys.base_prefix)}
    return sorted(folders, key=len, reverse=True)


def _package_of(path: str | bytes, folders: list[str]) -> str | None:
    """The first name of a path below the folders of installed modules; None outside of them."""
    real = os.path.realpath(os.fsdecode(path))
    for folder in folders:
        if real.startswith(folder + os.sep):
            return real[len(folder) + 1 :].split(os.sep)[0]
    return None
