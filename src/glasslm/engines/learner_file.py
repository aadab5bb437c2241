"""A Python file with somebody's own functions: read, run once as a module, and never changed.

The functions of such a file replace operations of the engines (operations.py). The file stands
alone: nothing beside it is imported and nothing is written beside it, so that its text in run.json
is all that a run depends on. Reading a file runs its code.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasslm.errors import InputError
from glasslm.text import describe_error

MAX_FILE_BYTES = 1_000_000  # its text is stored in run.json

Function = Callable[..., Any]


@dataclass(frozen=True)
class LearnerFile:
    """The text of a Python file and the functions that it defines."""

    name: str  # its path as it was given; messages and tracebacks show it
    text: str
    sha256: str  # of its bytes
    functions: dict[str, Function]  # by name: what the file defines itself, not what it imports
    imports: frozenset[str]  # packages whose modules or members are global names of the file

    def find_line(self, error: BaseException) -> int | None:
        """The line of this file in which `error` arose or that called its origin; None: no line."""
        if isinstance(error, SyntaxError) and error.filename == self.name:
            return error.lineno
        lines, traceback = [], error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == self.name:
                lines.append(traceback.tb_lineno)
            traceback = traceback.tb_next
        return lines[-1] if lines else None

    def first_line(self, function: Function) -> int | None:
        """The line in which a function of this file begins; None for a function of another file."""
        code = getattr(_unwrap(function), "__code__", None)
        if code is None or code.co_filename != self.name:
            return None
        line: int = code.co_firstlineno
        return line


def read_learner_file(path: Path | str) -> LearnerFile:
    """Run a Python file, once, as a module, and return its functions.

    Its `print` writes to standard error. `if __name__ == "__main__":` is not run. Raises
    InputError, in one line with the line number, for a path that is no UTF-8 file of Python, a
    syntax error, an import that is missing, and any other error while the file runs.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give the path of a Python file")
    if not path.is_file():
        raise InputError(f"{path} is not a file: give the path of a Python file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes: expected Python code, at most "
            f"{MAX_FILE_BYTES:,} bytes"
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 (byte {error.start}): save the file as UTF-8"
        ) from None
    return run_text(text, str(path), hashlib.sha256(content).hexdigest())


def run_text(text: str, name: str, sha256: str) -> LearnerFile:
    """Run the text of a Python file, as `read_learner_file` does."""
    module = types.ModuleType(f"glasslm_learner_{sha256[:16]}")
    module.__file__ = name
    # Standard output is for results.
    module.__dict__["print"] = functools.partial(print, file=sys.stderr)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    initial_names = frozenset(vars(module))
    file = LearnerFile(name, text, sha256, {}, frozenset())
    with _isolated_imports(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the syntax, such as an unknown escape
        try:
            exec(compile(text, name, "exec", dont_inherit=True), vars(module))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too: the file is not the program
            raise InputError(_explain_error(file, error)) from None
    members = {key: value for key, value in vars(module).items() if key not in initial_names}
    functions = {
        key: value for key, value in members.items() if _is_own_function(value, module.__name__)
    }
    return LearnerFile(
        name, text, sha256, functions, frozenset(map(_package_name, members.values()))
    )


def _is_own_function(value: Any, module_name: str) -> bool:
    """Whether a global name of a module is a callable that the module itself defines."""
    if isinstance(value, type) or not callable(value):
        return False
    function = _unwrap(value)
    return getattr(function, "__module__", type(function).__module__) == module_name


def _unwrap(function: Any) -> Any:
    """The function inside decorators and partial applications."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function


def _package_name(value: Any) -> str:
    """The package that a global name comes from: a module, or a member of one."""
    name = value.__name__ if isinstance(value, types.ModuleType) else _module_name(value)
    return name.partition(".")[0]


def _module_name(value: Any) -> str:
    name = getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""


@contextmanager
def _isolated_imports() -> Iterator[None]:
    """A context in which nothing is imported from the working folder and no bytecode is written."""
    path, writes_no_bytecode = sys.path, sys.dont_write_bytecode
    here = Path.cwd()
    sys.path = [folder for folder in path if folder and Path(folder) != here]
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path, sys.dont_write_bytecode = path, writes_no_bytecode


def _explain_error(file: LearnerFile, error: BaseException) -> str:
    """The one line about an error while a file runs."""
    line = file.find_line(error)
    place = f"{file.name}, line {line}" if line else file.name
    match error:
        case SyntaxError():
            return f"{place}: {error.msg}: mend the syntax"
        case ModuleNotFoundError():
            return (
                f"{place}: there is no module '{error.name}': install it, or write what you need "
                "into this file, which stands alone"
            )
        case SystemExit():
            return f"{place}: the file ends the program: leave out exit()"
        case _:
            return f"{place}: {describe_error(error)}"
