"""Points of one exercise: forward, backward, stability, speed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from glasslm.course.learn.verdict import Mark

PartName = Literal["forward", "backward", "stability", "speed"]
PARTS: tuple[PartName, ...] = ("forward", "backward", "stability", "speed")
OPERATION_POINTS = {"forward": 4.0, "backward": 4.0, "stability": 1.0, "speed": 1.0}
FUNCTION_POINTS = {"forward": 9.0, "stability": 1.0}

# Growth of the number of Python instructions with the number of elements: an exponent.
MAX_EXPONENT_OF_FULL_SPEED = 0.1
MAX_EXPONENT_OF_HALF_SPEED = 0.75


@dataclass(frozen=True)
class Growth:
    """Instructions of Python that a function runs, and elements of its inputs, in two sizes."""

    small_elements: int
    small_instructions: int
    large_elements: int
    large_instructions: int

    @property
    def exponent(self) -> float:
        """a in "instructions grow like elements to the power a": 0 without a loop over elements.

        >>> Growth(10, 100, 160, 1600).exponent
        1.0
        """
        elements = math.log(self.large_elements / self.small_elements)
        instructions = max(1, self.large_instructions) / max(1, self.small_instructions)
        return math.log(instructions) / elements

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Part:
    """Points for one part of an exercise, of a number that is possible."""

    name: PartName
    points: float
    possible: float

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)


def give_points(
    *,
    has_backward: bool,
    forward: Mark,
    backward: Mark,
    is_stable: bool,
    growth: Growth | None,
) -> list[Part]:
    """The parts of an exercise with their points, 10 possible in all.

    An operation has 4 for forward, 4 for backward, 1 for stability and 1 for speed; a function
    without backward has 9 and 1. Stability and speed count only where all numbers are right.

    Args:
        has_backward: Whether the exercise has a backward pass.
        forward: Mark of the forward pass on ordinary inputs.
        backward: Mark of the backward pass on ordinary inputs.
        is_stable: Whether large values, types and zeros are right, too.
        growth: Of an operation whose numbers are right, else None.
    """
    possible = OPERATION_POINTS if has_backward else FUNCTION_POINTS
    all_right = forward == "right" and (backward == "right" or not has_backward)
    shares: dict[PartName, float] = {
        "forward": float(forward == "right"),
        "backward": float(backward == "right"),
        "stability": float(all_right and is_stable),
        "speed": speed_share(growth) if all_right and growth else 0.0,
    }
    return [
        Part(name, shares[name] * possible[name], possible[name])
        for name in PARTS
        if name in possible
    ]


def possible_points(has_backward: bool) -> list[Part]:
    """The parts of an exercise without points: nothing could be graded."""
    possible = OPERATION_POINTS if has_backward else FUNCTION_POINTS
    return [Part(name, 0.0, possible[name]) for name in PARTS if name in possible]


def speed_share(growth: Growth) -> float:
    """1 without Python loops over elements, 0.5 with loops over some axes, else 0."""
    if growth.exponent <= MAX_EXPONENT_OF_FULL_SPEED:
        return 1.0
    return 0.5 if growth.exponent <= MAX_EXPONENT_OF_HALF_SPEED else 0.0
