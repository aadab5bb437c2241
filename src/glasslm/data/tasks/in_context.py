"""In-context regression of bits: infer a function from the pairs in the question."""

from __future__ import annotations

from random import Random

from glasslm.data.tasks.task import Example, Task, draw_below

N_BITS = 3
INPUTS = range(2**N_BITS)
# A function takes one of the bits, or its opposite: (the bit, what is added to it).
FUNCTIONS = [(bit, flip) for bit in range(N_BITS) for flip in (0, 1)]


def apply_function(function: tuple[int, int], x: int) -> int:
    """The value, 0 or 1, of a function at an input."""
    bit, flip = function
    return (x >> bit & 1) ^ flip


def draw_regression(random: Random, size: int) -> Example:
    """`size` inputs with their values, then an input; the pairs leave one value for it."""
    while True:
        function = FUNCTIONS[draw_below(random, len(FUNCTIONS))]
        inputs = [draw_below(random, len(INPUTS)) for _ in range(size)]
        pairs = [(x, apply_function(function, x)) for x in inputs]
        possible = [f for f in FUNCTIONS if all(apply_function(f, x) == y for x, y in pairs)]
        asked = draw_below(random, len(INPUTS))
        values = {apply_function(f, asked) for f in possible}
        if len(values) == 1:
            shown = " ".join(f"{x:0{N_BITS}b}>{y}" for x, y in pairs)
            return Example(f"{shown} {asked:0{N_BITS}b}", str(values.pop()))


REGRESSION = Task(
    draw_regression,
    size=8,
    max_size=16,
    size_unit="pairs",
    longest=lambda size: size * (N_BITS + 3) + N_BITS + 3,
    rule="the value of the last input under the only function that fits the pairs",
    phenomenon="A function is learned inside the context, without a change of weights "
    "(arXiv:2208.01066).",
    one_size=True,
)
