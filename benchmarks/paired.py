"""What benchmarks share: ways of doing one thing take turns, and the turns of a round are compared with each other.

Absolute figures drift from minute to minute; the ratio of two turns that stand side by side drifts much less. So every
ratio printed is the median of the ratios within rounds.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Mapping

from glasslm.runs import provenance

Times = dict[str, list[float]]  # seconds of each round, by the name of the way


def clocked(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def take_turns(
    ways: Mapping[str, Callable[[], object]], seconds: float, turn: float = 0.0, rounds: int = 3
) -> Times:
    """Run all ways, which have been warmed up, for about `seconds`, `rounds` at least; gives the seconds of one call.

    Short calls are repeated until a turn takes about `turn` seconds, and one more that is not timed goes before them:
    caches, and threads that still spin after their last work, are then no longer another's.
    """
    calls = {name: max(1, round(turn / clocked(way))) if turn else 1 for name, way in ways.items()}
    times: Times = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(ways))]) < rounds:
        for name, way in ways.items():
            if calls[name] > 1:
                way()
            began = time.perf_counter()
            for _ in range(calls[name]):
                way()
            times[name].append((time.perf_counter() - began) / calls[name])
    return times


def ratio(times: Times, of: str, to: str) -> float:
    """How many times as fast as `to` is `of`."""
    return statistics.median(theirs / ours for ours, theirs in zip(times[of], times[to]))


def print_speeds(times: Times, amount: int, peers: tuple[str, ...], unit: str = "tokens/s") -> None:
    """A row for each way that does `amount` of the unit in one call, with its ratio to each of the peers."""
    width = max(map(len, times))
    columns = [f"x {peer}" for peer in peers]
    print(f"{'':{width}}  {unit:>12}", *(f"  {column}" for column in columns))
    for name, seconds in times.items():
        ratios = (
            f"  {ratio(times, name, peer):>{len(column)}.2f}"
            for peer, column in zip(peers, columns)
        )
        print(f"{name:{width}}  {amount / statistics.median(seconds):12,.0f}", *ratios)
    print(
        f"(medians of {len(seconds)} rounds; ratios: medians of those within a round)", flush=True
    )


def heading(*libraries: str, threads: int) -> str:
    """The date, the machine and the versions that a figure belongs to."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    machine = provenance.machine()
    return f"{datetime.date.today()}  {machine['cpu']}, {machine['cores']} cores, {threads} threads; {versions}"
