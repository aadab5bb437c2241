"""The texts of an exercise: the file to start with, the solution, the derivation."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from glasslm.course.learn.example import describe_case, to_numbers
from glasslm.course.learn.exercise import Exercise

PACKAGE = Path(__file__).parents[2]
WIDTH = 95
ALLOCATOR_NOTE = "# new(shape) returns an array without values; yours can do without `new`\n"
# The page is beside this module in an installed package, and in docs/ of a clone.
DERIVATIONS = (Path(__file__).parent / "backward.md", PACKAGE.parents[1] / "docs" / "backward.md")


def starter_text(exercise: Exercise) -> str:
    """The Python file in which a learner writes the function."""
    body = f"""{exercise.title[0].upper()}{exercise.title[1:]}.

{textwrap.fill(exercise.task, WIDTH)}

{exercise.shapes}

Example:
{_format_values(worked_example(exercise))}
"""
    if exercise.derivation:
        body += (
            f"\nThe derivation, for afterwards: docs/backward.md, section {exercise.derivation},\n"
            f"or glasslm learn solution {exercise.name}.\n"
        )
    lines = [f'"""{body}"""', "", "import numpy as np", "", "", *_stub(exercise)]
    return "\n".join(lines) + "\n"


def _stub(exercise: Exercise) -> list[str]:
    """The function that does nothing yet."""
    if not exercise.has_backward:
        return [f"def {exercise.signature}:", "    raise NotImplementedError"]
    return [
        f"def {exercise.signature}:",
        "    raise NotImplementedError",
        "",
        f"    def backward({_backward_argument(exercise)}):",
        "        raise NotImplementedError",
        "",
        f"    return {exercise.outputs[0]}, backward",
    ]


def _backward_argument(exercise: Exercise) -> str:
    """The name of what backward gets: dy, or the weight of a loss."""
    is_number = isinstance(_example_case(exercise).dy, float)
    return "weight" if is_number else "dy"


def _example_case(exercise: Exercise) -> Any:
    return exercise.draw_cases(exercise.sizes.small, seed=0)[-1]


def worked_example(exercise: Exercise) -> dict[str, Any]:
    """Inputs and right results of a small case, as numbers by name."""
    case = _example_case(exercise)
    reference = exercise.compute(case)
    values = describe_case(case, exercise.has_backward)
    del values["sizes"]
    if exercise.has_backward:
        values[_backward_argument(exercise)] = values.pop("dy")
    for name in exercise.outputs + exercise.gradients:
        values[name] = to_numbers(reference.total(name))
    return values


def _format_values(values: dict[str, Any]) -> str:
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        wrapped = textwrap.wrap(text, WIDTH - width - 5, break_on_hyphens=False) or [""]
        lines.append(f"    {name:<{width}} {wrapped[0]}")
        lines += [" " * (width + 5) + line for line in wrapped[1:]]
    return "\n".join(lines)


def solution_source(exercise: Exercise) -> str:
    """The source of the solution: the operation of the engine, or the exercise's reference."""
    if not exercise.solution:
        return inspect.getsource(exercise.reference)
    path, _, name = exercise.solution.partition(":")
    text = (PACKAGE / path).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            source = str(ast.get_source_segment(text, node))
            note = ALLOCATOR_NOTE if "new: New" in source else ""
            return f"# src/glasslm/{path}\n{note}{source}\n"
    raise AssertionError(f"{exercise.solution} is not in the source")


def derivation_text(exercise: Exercise) -> str:
    """The section of docs/backward.md on the exercise, in Markdown; "" if there is none."""
    page = next((path for path in DERIVATIONS if path.is_file()), None)
    if not exercise.derivation or page is None:
        return ""
    section: list[str] = []
    level = 0
    is_code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        is_code ^= line.startswith("```")
        heading = 0 if is_code else len(line) - len(line.lstrip("#"))
        if level and 0 < heading <= level:
            break
        if heading and line.lstrip("# ").strip("`") == exercise.derivation:
            level = heading
        if level:
            section.append(line)
    return "\n".join(section).strip()
