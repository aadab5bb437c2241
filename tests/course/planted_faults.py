"""The planted faults and the right solutions of the exercises, from the texts in `faults/`.

`unread_faults/` has faults in the same format that were written without reading the checker.

A text `faults/EXERCISE.txt` has sections `== VERDICT: NAME`, and a section is a solution with that
verdict. It is either source without `import numpy as np`, or a patch of the last complete right
solution above it: lines with "-" are replaced by the lines with "+" that follow them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "faults"
UNREAD_FOLDER = Path(__file__).parent / "unread_faults"


@dataclass(frozen=True)
class Solution:
    """One solution: the exercise, a name, the verdict that it deserves, and its source."""

    exercise: str
    name: str
    verdict: str
    source: str

    @property
    def label(self) -> str:
        return f"{self.exercise}: {self.name}"

    def load(self) -> Callable[..., Any]:
        """The function of the source."""
        namespace: dict[str, Any] = {"__name__": "solution"}
        exec(compile(self.source, f"{self.exercise}.py", "exec"), namespace)
        function: Callable[..., Any] = namespace[self.exercise]
        return function


def list_exercises(folder: Path = FOLDER) -> list[str]:
    """The exercises that have planted faults."""
    return sorted(path.stem for path in folder.glob("*.txt"))


def read_solutions(exercise: str, folder: Path = FOLDER) -> list[Solution]:
    """The solutions of one exercise, right and wrong, in the order of the file."""
    solutions: list[Solution] = []
    base: list[str] = []
    text = (folder / f"{exercise}.txt").read_text(encoding="utf-8")
    for section in f"\n{text}".split("\n== ")[1:]:
        head, *lines = section.rstrip("\n").split("\n")
        verdict, _, name = head.partition(": ")
        is_patch = lines[0].startswith(("-", "+"))
        source = patch(base, lines) if is_patch else lines
        if verdict == "right" and not is_patch:
            base = source
        text = "\n".join(["import numpy as np", "", "", *source]) + "\n"
        solutions.append(Solution(exercise, name, verdict, text))
    return solutions


def patch(base: list[str], lines: list[str]) -> list[str]:
    """The lines of a base with the blocks of a patch replaced; each must occur exactly once."""
    result, position = list(base), 0
    while position < len(lines):
        old, new = [], []
        while position < len(lines) and lines[position].startswith("-"):
            old.append(lines[position][1:])
            position += 1
        while position < len(lines) and lines[position].startswith("+"):
            new.append(lines[position][1:])
            position += 1
        position += lines[position : position + 1] == ["@"]
        assert old, f"a patch must begin with a line to replace: {lines[position - 1]}"
        places = [i for i in range(len(result)) if result[i : i + len(old)] == old]
        assert len(places) == 1, f"these lines occur {len(places)} times: {old}"
        result[places[0] : places[0] + len(old)] = new
    return result
