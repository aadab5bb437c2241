"""Tasks that look up an earlier place of the question: associative recall and induction."""

from __future__ import annotations

import string
from random import Random

from glasslm.data.tasks.task import LETTERS, Example, Task, draw_below, draw_text


def draw_associative_recall(random: Random, size: int) -> Example:
    """`size` pairs of a letter and a digit, then one of the letters; the answer is its digit."""
    keys = random.sample(string.ascii_lowercase, size)
    values = draw_text(random, string.digits, size)
    asked = draw_below(random, size)
    pairs = "".join(key + value for key, value in zip(keys, values))
    return Example(f"{pairs}?{keys[asked]}", values[asked])


def draw_induction(random: Random, size: int) -> Example:
    """`size` letters, whose last one occurred once before; the answer is what followed it there."""
    asked = LETTERS[draw_below(random, len(LETTERS))]
    others = LETTERS.replace(asked, "")
    place = draw_below(random, size - 2)  # at least one letter stands between
    before, after = draw_text(random, others, place), draw_text(random, others, size - 2 - place)
    return Example(f"{before}{asked}{after}{asked}", after[0])


ASSOCIATIVE_RECALL = Task(
    draw_associative_recall,
    size=6,
    max_size=26,
    size_unit="pairs",
    longest=lambda size: 2 * size + 5,
    rule="the digit that stands behind the asked letter",
    phenomenon="Attention looks pairs up; n-grams and models with a fixed state cannot "
    "(arXiv:2312.04927).",
)
INDUCTION = Task(
    draw_induction,
    size=12,
    max_size=100,
    size_unit="letters",
    longest=lambda size: size + 3,
    rule="the letter that followed the last letter before",
    phenomenon="Induction heads form suddenly, and need two layers (arXiv:2209.11895).",
    min_size=3,
)
