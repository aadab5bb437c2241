"""What students get: a file to start with for each exercise, and how to hand in."""

from __future__ import annotations

from glasslm.course.grading.points import possible_points
from glasslm.course.isolation.process_limits import Limits
from glasslm.course.learn.exercises import load_exercise
from glasslm.course.learn.starter import starter_text

INSTRUCTIONS = "README.md"


def handout_files(exercises: tuple[str, ...]) -> dict[str, str]:
    """The texts of the files to hand out by name: one for each exercise, and the instructions."""
    starters = {f"{name}.py": starter_text(load_exercise(name)) for name in exercises}
    return {INSTRUCTIONS: instructions(exercises), **starters}


def instructions(exercises: tuple[str, ...]) -> str:
    """How to write, check and hand in the exercises, in Markdown."""
    limits = Limits()
    memory = f"{limits.memory_bytes >> 30} GiB of memory"
    rows = [_table_row(name) for name in exercises]
    first = exercises[0]
    return f"""# Exercises

| file | exercise | points |
|---|---|---|
{chr(10).join(rows)}

1. Write the function of each file. Its text says what goes in, what comes out, and an example.
   Each file stands alone and cannot import another one.
2. Check it: `glasslm learn check {first}.py` says what is wrong.
3. Hand in the files under their names, in a folder or a zip file that is named by your student id.

What counts: the numbers of the forward pass and of the backward pass on inputs of random sizes;
stability (large values, float32, zeros); and speed, which means no loop of Python over elements.
The clock does not count.

What you may use: Python, NumPy, and your head. Files, the network, other libraries of machine
learning, and code of other students are no part of an exercise, and grading shows them to your
teacher. A file has {limits.cpu_s} seconds of CPU time and {memory}.
"""


def _table_row(name: str) -> str:
    exercise = load_exercise(name)
    parts = possible_points(exercise.has_backward)
    points = ", ".join(f"{part.name} {part.possible:g}" for part in parts)
    return f"| {name}.py | {exercise.title} | {points} |"
