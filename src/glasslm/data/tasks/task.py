"""Task: how the examples of a synthetic task are drawn, and what it is known for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

LETTERS = "abcdefghijklmnop"


class Example(NamedTuple):
    """A question and its only right answer. Neither contains "=" or a line end."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        """The line in the text, with its end."""
        return f"{self.question}={self.answer}\n"


Draw = Callable[[Random, int], Example]


@dataclass(frozen=True)
class Task:
    """A synthetic task.

    `draw(random, size)` draws an example of exactly this size. A text has the sizes from `min_size`
    to its largest one, equally often, unless `one_size`.
    """

    draw: Draw
    size: int  # the largest size of the training text by default
    max_size: int
    size_unit: str  # what a size counts
    longest: Callable[[int], int]  # characters of the longest example of a size, with its line end
    rule: str  # what the answer is, in a sentence
    phenomenon: str  # a published result that the task shows, with its source
    min_size: int = 1
    one_size: bool = False  # all examples have the largest size

    def sizes(self, largest: int) -> range:
        """The sizes of the examples of a text."""
        return range(largest if self.one_size else self.min_size, largest + 1)


def draw_text(random: Random, alphabet: str, length: int) -> str:
    """`length` symbols, drawn one by one."""
    return "".join(random.choices(alphabet, k=length))


def draw_below(random: Random, n: int) -> int:
    """A whole number from 0 to n - 1."""
    # Python promises that `random()` draws the same numbers in all versions.
    return int(random.random() * n)
