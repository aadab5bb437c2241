"""Functions of a learner's process as if they were here: arrays go there, results come back."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from glasslm.course.isolation import wire
from glasslm.course.isolation.learner_process import LearnerProcess
from glasslm.course.isolation.remote_error import MAX_LINE


class RemoteObject:
    """An object in a learner's process; its attributes are fetched when they are read."""

    def __init__(self, process: LearnerProcess, file: str, handle: int, type_name: str) -> None:
        self._process, self._file, self._handle = process, file, handle
        self._type_name = type_name
        # Arrays here that belong to those which the call got and returned that made this object.
        self._passed: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy and inspect ask for many
            raise AttributeError(name)
        message = {"do": "get", "target": self._handle, "name": name}
        answer, arrays = self._process.ask(message, [])
        return self._read(answer, arrays, [])

    def __repr__(self) -> str:
        return f"<{self._type_name} of {self._file}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteObject) and self._type_name == other._type_name

    __hash__ = object.__hash__

    def _read(self, answer: dict[str, Any], arrays: list[bytes], watched: list[Any]) -> Any:
        """The value of an answer, after the arrays that the call has changed are changed here."""
        made: list[RemoteObject] = []

        def get(code: dict[str, Any]) -> RemoteObject:
            made.append(self._make(code))
            return made[-1]

        try:
            value = wire.decode(answer["value"], arrays, get)
            for here, code in zip(watched, answer.get("watched", [])):
                replace_content(here, wire.decode(code, arrays, get))
        except wire.WireError as error:
            raise self._process.reject(str(error)) from None
        results = value if isinstance(value, tuple) else (value,)
        passed = [*watched, *(item for item in results if wire.is_mutable(item))]
        for item in made:
            item._passed = passed
        return value

    def _make(self, code: dict[str, Any]) -> RemoteObject:
        """The stand-in for an object that the learner's process has described."""
        handle, type_name = int(code["handle"]), str(code["type"])
        if code["function"]:
            function = RemoteFunction(self._process, self._file, handle, type_name)
            function.describe(code["function"])
            return function
        kind = type(type_name, (RemoteObject,), {})  # messages name the type
        return kind(self._process, self._file, handle, type_name)


class RemoteFunction(RemoteObject):
    """A function in a learner's process. Arrays that it changes in place are changed here, too.

    An error that it raises is raised here with the learner's line, and has the same built-in base.
    """

    def describe(self, function: dict[str, Any]) -> None:
        """Take over name, line and signature, as `inspect.signature` and tracebacks show them."""
        self.__name__ = str(function["name"])
        line = max(1, min(int(function["line"]), MAX_LINE))
        self.__code__ = compile("", self._file, "exec").replace(co_firstlineno=line)
        if function["parameters"] is not None:
            self.__signature__ = inspect.Signature(
                [
                    inspect.Parameter(
                        name,
                        _PARAMETER_KINDS[kind],
                        default=default if has_default else inspect.Parameter.empty,
                    )
                    for name, kind, has_default, default in function["parameters"]
                ]
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arrays: list[bytes] = []
        message = {
            "do": "call",
            "target": self._handle,
            "args": [wire.encode(value, arrays, self._describe) for value in args],
            "kwargs": {name: wire.encode(v, arrays, self._describe) for name, v in kwargs.items()},
            "counted": self._process.counts_instructions,
        }
        answer, replies = self._process.ask(message, arrays)
        self._process.instructions += int(answer.get("instructions", 0))
        watched = [value for value in (*args, *kwargs.values()) if wire.is_mutable(value)]
        return self._read(answer, replies, watched + self._passed)

    def _describe(self, value: Any) -> dict[str, Any]:
        """An object of the learner's process, or a function that it may call here."""
        if isinstance(value, RemoteObject):
            return {"handle": value._handle}
        return self._process.offer(value)


_PARAMETER_KINDS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
)


def load_function(process: LearnerProcess, file: str, name: str) -> RemoteFunction | None:
    """A function of the file that the process has loaded; None where it has none of that name."""
    value = getattr(RemoteObject(process, file, 0, "module"), name)
    return value if isinstance(value, RemoteFunction) else None


def replace_content(here: Any, new: Any) -> None:
    """Give an array, list, dict or set the content of another."""
    if isinstance(here, np.ndarray):
        if isinstance(new, np.ndarray) and new.shape == here.shape and new.dtype == here.dtype:
            here[...] = new
    elif isinstance(here, list):
        here[:] = new
    else:
        here.clear()
        here.update(new)
