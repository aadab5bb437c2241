"""Tasks of numbers: addition in two orders of digits, and addition modulo a prime."""

from __future__ import annotations

import string
from random import Random

from glasslm.data.tasks.task import Example, Task, draw_below

RESIDUES = string.digits + string.ascii_uppercase + string.ascii_lowercase  # one symbol each


def draw_addition(random: Random, size: int) -> Example:
    """A sum of two numbers of `size` digits, which may begin with zeros."""
    a, b = (draw_below(random, 10**size) for _ in range(2))
    return Example(f"{a:0{size}}+{b:0{size}}", f"{a + b:0{size + 1}}")


def draw_reversed_addition(random: Random, size: int) -> Example:
    """The same sum with the digits of the answer from the lowest to the highest."""
    question, answer = draw_addition(random, size)
    return Example(question, answer[::-1])


def draw_modular_addition(random: Random, size: int) -> Example:
    """A sum modulo `size`; each residue is one symbol of RESIDUES."""
    a, b = (draw_below(random, size) for _ in range(2))
    return Example(f"{RESIDUES[a]}+{RESIDUES[b]}", RESIDUES[(a + b) % size])


def count_carries(question: str) -> int:
    """The number of carries of a question of addition.

    >>> count_carries("199+001")
    2
    """
    carries = carry = 0
    for a, b in zip(*map(reversed, question.split("+")), strict=True):
        carry = int(int(a) + int(b) + carry > 9)
        carries += carry
    return carries


ADDITION = Task(
    draw_addition,
    size=3,
    max_size=20,
    size_unit="digits",
    longest=lambda size: 3 * size + 4,
    rule="the sum, highest digit first",
    phenomenon="The highest digit comes first and depends on all carries, so sums with long "
    "carries fail (arXiv:2307.03381).",
    one_size=True,
)
ADDITION_REVERSED = Task(
    draw_reversed_addition,
    size=3,
    max_size=20,
    size_unit="digits",
    longest=lambda size: 3 * size + 4,
    rule="the sum, lowest digit first",
    phenomenon="With the lowest digit first each step needs one carry, and the same model learns "
    "to add (arXiv:2307.03381).",
    one_size=True,
)
MODULAR_ADDITION = Task(
    draw_modular_addition,
    size=59,
    max_size=len(RESIDUES),
    size_unit="residues (the modulus)",
    longest=lambda size: 6,
    rule="the sum modulo the size; the residues are 0-9, A-Z, a-z",
    phenomenon="Grokking: the held-out pairs are learned long after the training pairs "
    "(arXiv:2201.02177).",
    min_size=2,
    one_size=True,
)
