"""The time of each part of a capstone: the smallest that gives a result, and its share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from glasslm.course.capstone.study_sizes import StudySize
from glasslm.text import format_duration

# In the order of their making. An ablation can shrink most, so it gets what the others leave.
PARTS = {"run": "the model", "scaling": "the scaling study", "ablation": "the ablation"}
SHARES = {"run": 0.32, "scaling": 0.33, "ablation": 0.31}  # the remainder is for the pages


def divide_time(
    left_s: float, sizes: Mapping[str, Sequence[StudySize]]
) -> tuple[dict[str, float], dict[str, StudySize]]:
    """Seconds for each part, and the size that fits them; 0 s where there is no time for a part.

    `sizes` has the sizes of the parts that are to be made, the largest first. Where they do not
    fit, the part that needs most shrinks; where the smallest do not fit either, the study that
    needs most is left out.
    """
    total_s = left_s * sum(SHARES.values())
    left = {part: list(part_sizes) for part, part_sizes in sizes.items()}
    while sum(part_sizes[0].seconds for part_sizes in left.values()) > total_s:
        shrinkable = [part for part, part_sizes in left.items() if len(part_sizes) > 1]
        if candidates := shrinkable or [part for part in left if part != "run"]:
            part = max(candidates, key=lambda part: left[part][0].seconds)
            del left[part][0]
            if not left[part]:
                del left[part]
        else:
            break
    chosen = {part: part_sizes[0] for part, part_sizes in left.items()}
    needed_s = {part: size.seconds for part, size in chosen.items()}
    open_parts, times = set(needed_s), dict.fromkeys(sizes, 0.0)
    while open_parts:
        unshared_s = total_s - sum(times.values())
        total_share = sum(SHARES[part] for part in open_parts)
        shares_s = {part: unshared_s * SHARES[part] / total_share for part in open_parts}
        # A part whose share is too short gets its smallest time; the others share the rest.
        tight_parts = {part for part in open_parts if shares_s[part] < needed_s[part]}
        times |= {part: needed_s[part] for part in tight_parts} or shares_s
        open_parts = open_parts - tight_parts if tight_parts else set()
    return {part: round(seconds, 1) for part, seconds in times.items()}, chosen


def required_budget(smallest: Mapping[str, float], spent_s: float = 0.0) -> float:
    """The smallest budget, in seconds, with which all parts fit after `spent_s` seconds."""
    return spent_s + sum(smallest.values()) / sum(SHARES.values())


def describe_times(times: Mapping[str, float], chosen: Mapping[str, StudySize]) -> str:
    """The parts that fit, with their times and sizes, for the user."""
    fitting = [
        f"{PARTS[part]} {format_duration(times[part])}"
        + (f" ({size.description} or more)" if size.description else "")
        for part, size in chosen.items()
    ]
    return f"the time is divided: {', '.join(fitting)}"


def explain_missing(part: str, budget_s: float, needed_s: float) -> str:
    """Why a part is not made, and the budget with which everything is."""
    cure = (
        f"the same command with --budget {math.ceil(needed_s / 60)}m and --out makes it"
        if math.isfinite(needed_s)
        else "use a smaller recipe"
    )
    return f"a budget of {format_duration(budget_s)} has no time for {PARTS[part]}: {cure}"
