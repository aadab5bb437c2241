"""Paired timing: variants of the same work take turns, and the turns of a round are compared.

Absolute times drift from minute to minute. The ratio of two neighbouring turns drifts much less, so
every printed ratio is the median of the ratios within rounds.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Mapping

from glasslm.runs import provenance
from glasslm.runs.blas import format_blas, loaded_blas

Times = dict[str, list[float]]  # seconds of each round, by the name of the variant


def time_call(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(
    variants: Mapping[str, Callable[[], object]], seconds: float, turn: float = 0.0, rounds: int = 3
) -> Times:
    """Time all variants in turns for about `seconds`; returns the seconds of one call, by round.

    The variants must be warmed up. There are at least `rounds` rounds. Short calls are repeated
    until a turn takes about `turn` seconds, after one call that is not timed: it evicts the caches
    of the variant before, and gives that one's threads time to stop spinning.
    """
    calls = {
        name: max(1, round(turn / time_call(variant))) if turn else 1
        for name, variant in variants.items()
    }
    times: Times = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(variants))]) < rounds:
        for name, variant in variants.items():
            if calls[name] > 1:
                variant()
            start = time.perf_counter()
            for _ in range(calls[name]):
                variant()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def ratio(times: Times, name: str, baseline: str) -> float:
    """The speed of `name` divided by the speed of `baseline`."""
    pairs = zip(times[name], times[baseline])
    return statistics.median(theirs / ours for ours, theirs in pairs)


def print_speeds(times: Times, amount: int, peers: tuple[str, ...], unit: str = "tokens/s") -> None:
    """Print the speed of each variant and its ratio to each peer; one call does `amount` units."""
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
        f"(medians of {len(seconds)} rounds; ratios: medians of the ratios within a round)",
        flush=True,
    )


def heading(*libraries: str, threads: int) -> str:
    """One line with the date, the processor, the threads and the versions of the libraries."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    machine = provenance.machine()
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {threads} threads"
    blas = format_blas(loaded_blas())
    return f"{datetime.date.today()}  {hardware}; {versions}; {blas}"
