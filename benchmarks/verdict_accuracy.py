"""How often the checker of the exercises names a planted fault, and how long a check takes.

    python benchmarks/verdict_accuracy.py [--seeds 5] [--exercises rms_norm attention]

The faults and right solutions are those of tests/course/faults/. A fault is "named" when the
verdict is the one that its author wrote beside it, and "passed" when the verdict is "right".
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "course"))

from planted_faults import list_exercises, read_solutions

from glasslm.course.learn import check_function
from glasslm.course.learn.exercises import load_exercise
from glasslm.text import align_columns

Row = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--exercises", nargs="*", default=list_exercises())
    flags = parser.parse_args()
    rows: list[Row] = [
        ("exercise", "faults", "named", "passed", "right solutions", "alarms", "median ms")
    ]
    total: Counter[str] = Counter()
    all_seconds: list[float] = []
    misses: Counter[str] = Counter()
    for name in flags.exercises:
        counts, seconds = measure(name, flags.seeds, misses)
        rows.append(format_row(name, counts, seconds))
        total += counts
        all_seconds += seconds
    rows.append(format_row("all", total, all_seconds))
    print("\n".join(align_columns(rows)))
    print(f"\nmisses, with the number of seeds of {flags.seeds}:")
    for miss, count in misses.most_common():
        print(f"  {count}  {miss}")


def measure(name: str, seeds: int, misses: Counter[str]) -> tuple[Counter[str], list[float]]:
    """Counts over all seeds of one exercise, and the CPU seconds of each check."""
    counts: Counter[str] = Counter()
    seconds = []
    exercise = load_exercise(name)
    for solution in read_solutions(name):
        for seed in range(seeds):
            function = solution.load()
            begin = time.process_time()
            verdict = check_function(exercise, function, seed).verdict
            seconds.append(time.process_time() - begin)
            kind = "right" if solution.verdict == "right" else "faults"
            counts[kind] += 1
            counts["alarms" if kind == "right" else "missed"] += verdict != solution.verdict
            counts["passed"] += kind == "faults" and verdict == "right"
            if verdict != solution.verdict:
                misses[f"{solution.label}: {solution.verdict}, got {verdict}"] += 1
    return counts, seconds


def format_row(name: str, counts: Counter[str], seconds: list[float]) -> Row:
    named = (counts["faults"] - counts["missed"]) / counts["faults"]
    return (
        name,
        f"{counts['faults']}",
        f"{named:.1%}",
        f"{counts['passed']}",
        f"{counts['right']}",
        f"{counts['alarms']}",
        f"{statistics.median(seconds) * 1e3:.1f}",
    )


if __name__ == "__main__":
    main()
