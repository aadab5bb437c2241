"""Tasks on a word of letters: copy, reverse and sort it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from glasslm.data.tasks.task import LETTERS, Draw, Example, Task, draw_text


def _rewrite(rewrite: Callable[[str], str]) -> Draw:
    """A Draw whose answer is a function of a random word."""

    def draw(random: Random, size: int) -> Example:
        word = draw_text(random, LETTERS, size)
        return Example(word, rewrite(word))

    return draw


COPY = Task(
    _rewrite(lambda word: word),
    size=10,
    max_size=100,
    size_unit="letters",
    longest=lambda size: 2 * size + 2,
    rule="the word again",
    phenomenon="Positions decide whether longer words are copied, too (arXiv:2305.19466).",
)
REVERSE = Task(
    _rewrite(lambda word: word[::-1]),
    size=10,
    max_size=100,
    size_unit="letters",
    longest=lambda size: 2 * size + 2,
    rule="the word backwards",
    phenomenon="Attention by content finds no mirrored position: longer words fail first "
    "(arXiv:2310.16028).",
)
SORT = Task(
    _rewrite(lambda word: "".join(sorted(word))),
    size=10,
    max_size=100,
    size_unit="letters",
    longest=lambda size: 2 * size + 2,
    rule="the letters in the order of the alphabet",
    phenomenon="Sorting needs counts, not positions, so it carries over to longer words "
    "(arXiv:2310.16028).",
)
