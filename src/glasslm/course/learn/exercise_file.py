"""A learner's file, read without running it: its text, its functions, and its exercises."""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass
from pathlib import Path

from glasslm.course.learn.exercises import COURSE, require_exercise
from glasslm.errors import InputError, explain_system_errors
from glasslm.text import similar_names, to_one_line

MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class ExerciseFile:
    """A file that is valid Python, and the exercises that its functions are for."""

    path: Path
    exercises: list[str]


def read_exercise_file(path: Path, exercise: str | None = None) -> ExerciseFile:
    """The file and its exercises: `exercise`, or the one of its name, or all that it defines.

    Raises InputError, in one line with the learner's line number, where the file cannot be read or
    has no function of an exercise.
    """
    tree = parse_source(path)
    functions = find_functions(tree)
    if exercise:
        require_exercise(exercise)
    wanted = exercise or (path.stem if path.stem in COURSE else "")
    if wanted:
        if wanted not in functions:
            raise InputError(f"{path}: no function {wanted}{_nearest(wanted, functions)}")
        return ExerciseFile(path, [wanted])
    found = [name for name in functions if name in COURSE]
    if not found:
        raise InputError(f"{path}: {_explain_unknown(functions)}")
    return ExerciseFile(path, [name for name in found if not _is_helper(name, tree)] or found)


def _is_helper(name: str, tree: ast.Module) -> bool:
    """Whether a function of the file calls `name`, which returns no pair of output and backward."""
    is_called = any(
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name
        for node in tree.body
        if getattr(node, "name", name) != name
        for call in ast.walk(node)
    )
    returns = [
        statement
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == name
        for statement in node.body
        if isinstance(statement, ast.Return)
    ]
    returns_pair = any(isinstance(r.value, ast.Tuple) for r in returns)
    return is_called and bool(returns) and not returns_pair


def parse_source(path: Path) -> ast.Module:
    """The syntax tree of a file. Raises InputError where it is no UTF-8 or no Python."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a Python file")
    with (
        explain_system_errors(
            path, lambda why: InputError(f"{path} cannot be read ({why}): check its name")
        ),
        path.open("rb") as file,
    ):
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: expected Python source")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is no UTF-8: save it as UTF-8"
        ) from None
    if not text.strip():
        raise InputError(f"{path} is empty: begin with glasslm learn start NAME")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, filename=path.name)
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise InputError(f"{path}{where}: {to_one_line(error.msg)}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # NUL bytes, too deep nesting
        raise InputError(f"{path} is no Python: {to_one_line(str(error))}") from None


def find_functions(tree: ast.Module) -> dict[str, int]:
    """The functions, classes and names that a file defines at its top, with their lines."""
    lines = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            lines[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    lines[target.id] = node.lineno
    return lines


def _nearest(wanted: str, functions: dict[str, int]) -> str:
    """A hint at the function that may be meant."""
    flat = {name.replace("_", "").lower(): name for name in functions}
    near = flat.get(wanted.replace("_", ""))
    if near is None:
        near = next(iter(similar_names(wanted, functions)), None)
    if near is not None:
        return f"; line {functions[near]} has '{near}': rename it to {wanted}"
    return f": it defines {', '.join(functions)}" if functions else ": it defines no function"


def _explain_unknown(functions: dict[str, int]) -> str:
    """The sentence for a file without a function of an exercise."""
    for name in COURSE:
        hint = _nearest(name, functions)
        if hint.startswith(";"):
            return f"no function of an exercise{hint}"
    defined = f"it defines {', '.join(functions)}" if functions else "it defines no function"
    return f"no function of an exercise: {defined}; see glasslm learn list for the names"
