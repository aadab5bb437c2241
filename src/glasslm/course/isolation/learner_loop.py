"""The learner's side: load a file, call its functions as the other side asks, and send results.

The references and the right results never are in this process.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import linecache
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from glasslm.course.isolation import audit_hook, wire
from glasslm.course.isolation.evidence import FlagKind
from glasslm.course.isolation.library_snapshot import find_replaced, take_snapshot
from glasslm.course.isolation.wire import (
    WireError,
    pack_message,
    read_message,
    write_bytes,
    write_message,
)

MODULE_NAME = "learner"  # no "__main__": what stands under that condition does not run
MAX_REPORTS = 100
MAX_OBJECTS = 20_000  # a check makes some hundred calls, each with one backward function
MAX_MESSAGE_CHARS = 300


class LearnerLoop:
    """Answers the messages of one connection until it is closed.

    Messages have "do": load (file, source), get (target, name), call (target, args, kwargs,
    counted), finish. Each answer has "value", or "error" with the learner's line. Before it come
    any "report" of evidence, and any "callback": a call of a function of the other side that the
    learner's function got as an argument, which the other side answers.
    """

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader, self._writer = reader, writer
        self._objects: list[Any] = []
        self._file = "learner.py"
        # Arrays that a call got and returned, by the handles of what it returned: its backward
        # pass may change them.
        self._passed: dict[int, list[Any]] = {}
        self._reports: set[tuple[str, int, str]] = set()
        self._snapshot = take_snapshot()

    def run(self) -> None:
        """Answer until the other side closes the connection."""
        actions = {
            "load": self._load, "get": self._get, "call": self._call, "finish": self._finish,
        }  # fmt: skip
        while True:
            try:
                message, arrays = read_message(self._reader)
            except WireError:
                return
            replies: list[bytes] = []
            try:
                answer = actions[message["do"]](message, arrays, replies)
                data = pack_message(answer | {"id": message["id"]}, replies)
            except BaseException as error:  # SystemExit and KeyboardInterrupt of the learner's code
                description = describe_error(error, self._file)
                data = pack_message({"error": description, "id": message["id"]}, [])
            write_bytes(self._writer, data)

    def _load(
        self, message: dict[str, Any], arrays: list[bytes], replies: list[bytes]
    ) -> dict[str, Any]:
        """Run the file as a module of its own."""
        self._file, source = message["file"], message["source"]
        code = compile(source, self._file, "exec", dont_inherit=True)
        module = types.ModuleType(MODULE_NAME)
        sys.modules[MODULE_NAME] = module  # dataclasses look their module up
        linecache.cache[self._file] = (len(source), None, source.splitlines(True), self._file)
        self._watch_function(np.random, "seed", "random")
        self._watch_function(np.random, "set_state", "random")
        self._watch_function(atexit, "register", "survives")
        self._snapshot = take_snapshot()
        audit_hook.watch(self._file, self._report)
        try:
            exec(code, module.__dict__)
        finally:
            self._report_replaced()
        self._objects.append(module)
        names = [name for name, value in vars(module).items() if callable(value)]
        return {"value": wire.encode(names, replies, self._put)}

    def _get(
        self, message: dict[str, Any], arrays: list[bytes], replies: list[bytes]
    ) -> dict[str, Any]:
        """An attribute of an object."""
        value = getattr(self._objects[message["target"]], message["name"])
        return {"value": wire.encode(value, replies, self._put)}

    def _call(
        self, message: dict[str, Any], arrays: list[bytes], replies: list[bytes]
    ) -> dict[str, Any]:
        """Call a function. The answer has its result, and the arguments that have changed."""
        target = message["target"]
        arguments = [wire.decode(code, arrays, self._take) for code in message["args"]]
        options = {
            name: wire.decode(code, arrays, self._take) for name, code in message["kwargs"].items()
        }
        watched = [value for value in (*arguments, *options.values()) if wire.is_mutable(value)]
        watched += self._passed.get(target, [])
        count = 0
        with np.errstate(all="ignore"):
            function = self._objects[target]
            if message["counted"]:
                result, count = count_instructions(function, arguments, options, self._file)
            else:
                result = function(*arguments, **options)
        first_handle = len(self._objects)
        value = wire.encode(result, replies, self._put)
        results = list(result) if isinstance(result, tuple) else [result]
        passed = [*watched, *(item for item in results if wire.is_mutable(item))]
        self._passed |= dict.fromkeys(range(first_handle, len(self._objects)), passed)
        now = [wire.encode(item, replies, self._put) for item in watched]
        return {"value": value, "watched": now, "instructions": count}

    def _finish(
        self, message: dict[str, Any], arrays: list[bytes], replies: list[bytes]
    ) -> dict[str, Any]:
        """Report what the code has left behind."""
        self._report_replaced()
        if threading.active_count() > 1:
            self._report("survives", 0, f"{threading.active_count() - 1} threads still run")
        return {"value": {"plain": None}}

    def _put(self, value: Any) -> dict[str, Any]:
        """Keep an object here, and describe it to the other side."""
        if len(self._objects) > MAX_OBJECTS:
            raise WireError(f"more than {MAX_OBJECTS:,} objects and functions were returned")
        self._objects.append(value)
        return {
            "handle": len(self._objects) - 1,
            "type": type(value).__name__,
            "function": describe_function(value) if callable(value) else None,
        }

    def _take(self, code: dict[str, Any]) -> Any:
        """The object of a handle that comes back, or a function of the other side."""
        if "callback" in code:
            return functools.partial(self._call_back, code["callback"])
        return self._objects[code["handle"]]

    def _call_back(self, number: int, *arguments: Any) -> Any:
        """Call a function of the other side, and wait for its result."""
        arrays: list[bytes] = []
        codes = [wire.encode(value, arrays, self._put) for value in arguments]
        write_message(self._writer, {"callback": number, "args": codes}, arrays)
        answer, replies = read_message(self._reader)
        if "error" in answer:
            raise ValueError(answer["error"])
        return wire.decode(answer["value"], replies, self._take)

    def _report(self, kind: FlagKind, line: int, detail: str) -> None:
        """Send evidence to the other side, each once."""
        if (kind, line, detail) not in self._reports and len(self._reports) < MAX_REPORTS:
            self._reports.add((kind, line, detail))
            report = {"kind": kind, "line": line, "detail": detail}
            write_message(self._writer, {"report": report}, [])

    def _report_replaced(self) -> None:
        for name in find_replaced(self._snapshot):
            self._report("patch", 0, f"{name} is replaced")

    def _watch_function(self, module: types.ModuleType, name: str, kind: FlagKind) -> None:
        """Report calls of a function of the library from the learner's file."""
        function = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            if frame.f_code.co_filename == self._file:
                self._report(kind, frame.f_lineno, f"{module.__name__}.{name}()")
            return function(*arguments, **options)

        setattr(module, name, call)


def serve(reader: BinaryIO, writer: BinaryIO) -> None:
    """Answer the messages of one connection until it is closed."""
    warnings.simplefilter("ignore")
    for name in [name for name in sys.modules if name.partition(".")[0] == "glasslm"]:
        del sys.modules[name]  # a learner's `import glasslm` is then an import, which is reported
    LearnerLoop(reader, writer).run()


def describe_error(error: BaseException, file: str) -> dict[str, Any]:
    """The type of an error with its built-in base, its message, and the learner's line."""
    if isinstance(error, WireError):
        error = ValueError(f"the result cannot be read: {error}")
    bases = [base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"]
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # the learner's own class of errors
        text = ""
    return {
        "type": type(error).__name__,
        "base": bases[0],
        "message": text[:MAX_MESSAGE_CHARS],
        "line": line or (lines[-1] if lines else 0),
    }


def describe_function(value: Any) -> dict[str, Any]:
    """Name, first line and parameters of something that can be called, as JSON types.

    A parameter is its name, its kind, whether it has a default, and that default if it is plain.
    Those of a class, and of a built-in function without a signature, are None.
    """
    name = getattr(value, "__name__", type(value).__name__)
    code = getattr(value, "__code__", None)
    line = code.co_firstlineno if isinstance(code, types.CodeType) else 1
    try:
        signature = None if inspect.isclass(value) else inspect.signature(value)
    except (ValueError, TypeError):
        signature = None
    parameters = signature and [
        [p.name, int(p.kind), p.default is not inspect.Parameter.empty, plain_or_none(p.default)]
        for p in signature.parameters.values()
    ]
    return {"name": str(name), "line": line, "parameters": parameters}


def plain_or_none(value: Any) -> Any:
    """`value` if it is a number, a short text or a truth value, else None."""
    is_plain = type(value) in (bool, int, float, str) and len(repr(value)) < 100
    return value if is_plain else None


def count_instructions(
    function: Callable[..., Any],
    arguments: list[Any],
    options: dict[str, Any],
    file: str,
) -> tuple[Any, int]:
    """The result of a call, and how many instructions of Python its code in `file` has run.

    Instructions inside NumPy do not count, so the number shows loops of Python over elements. It
    does not depend on the speed of the machine.
    """
    count = 0

    def count_in_frame(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return count_in_frame

    def enter(frame: types.FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return count_in_frame

    sys.settrace(enter)
    try:
        return function(*arguments, **options), count
    finally:
        sys.settrace(None)
