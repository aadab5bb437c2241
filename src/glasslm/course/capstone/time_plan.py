"""The time of each part of a capstone: the smallest that gives a result, and its share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from glasslm.text import format_duration

PARTS = {"run": "the model", "ablation": "the ablation", "scaling": "the scaling study"}
SHARES = {"run": 0.32, "ablation": 0.31, "scaling": 0.33}  # the remainder is for the pages


def divide_time(left_s: float, smallest: Mapping[str, float]) -> dict[str, float]:
    """Seconds for each part, at least its smallest time; 0 where there is no time for a part.

    Where not all parts fit, the study that needs most is left out first. `smallest` has the seconds
    of the parts that are to be made, infinite for one that cannot be made.
    """
    total_s = left_s * sum(SHARES.values())
    needed_s = {part: seconds for part, seconds in smallest.items() if math.isfinite(seconds)}
    while sum(needed_s.values()) > total_s and (studies := needed_s.keys() - {"run"}):
        del needed_s[max(studies, key=needed_s.__getitem__)]
    open_parts, times = set(needed_s), dict.fromkeys(smallest, 0.0)
    while open_parts:
        unshared_s = total_s - sum(times.values())
        total_share = sum(SHARES[part] for part in open_parts)
        shares_s = {part: unshared_s * SHARES[part] / total_share for part in open_parts}
        # A part whose share is too short gets its smallest time; the others share the rest.
        tight_parts = {part for part in open_parts if shares_s[part] < needed_s[part]}
        times |= {part: needed_s[part] for part in tight_parts} or shares_s
        open_parts = open_parts - tight_parts if tight_parts else set()
    return {part: round(seconds, 1) for part, seconds in times.items()}


def required_budget(smallest: Mapping[str, float], spent_s: float = 0.0) -> float:
    """The smallest budget, in seconds, with which all parts fit after `spent_s` seconds."""
    return spent_s + sum(smallest.values()) / sum(SHARES.values())


def describe_times(times: Mapping[str, float]) -> str:
    """The parts that fit and their times, for the user."""
    fitting = [f"{PARTS[part]} {format_duration(s)}" for part, s in times.items() if s]
    return f"the time is divided: {', '.join(fitting)}"


def explain_missing(part: str, budget_s: float, needed_s: float) -> str:
    """Why a part is not made, and the budget with which everything is."""
    cure = (
        f"the same command with --budget {math.ceil(needed_s / 60)}m and --out makes it"
        if math.isfinite(needed_s)
        else "use a smaller recipe"
    )
    return f"a budget of {format_duration(budget_s)} has no time for {PARTS[part]}: {cure}"
