"""The page of a ledger: all tries with their intervals, and the path of the accepted ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from glasslm.lab.tries.ledger import Ledger
from glasslm.report import figures, page
from glasslm.report.figures import Palette
from glasslm.report.page import Picture, Section
from glasslm.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = ("end", "failed", "interrupted")  # of a try
HEADER = ("try", "change", "verdict", "difference, nats", "interval", "pairs", "needed", "time, s")


def write(folder: Path, ledger: Ledger) -> Path:
    """Write tries.html and tries.md into `folder`; returns the path of the page."""
    results = ledger.results
    accepted = sum(event["verdict"] == "better" for event in results)
    unfinished = ledger.tries - len(results)
    lead = (
        f"{plural(ledger.tries, 'try').replace('trys', 'tries')}, {accepted} accepted"
        + (f", {unfinished} that did not end" if unfinished else "")
        + ". Each try has a smaller share of the probability of a false accept than the one before."
    )
    finals = [event for event in ledger.events if event["kind"] == "final"]
    sections = [
        Section(
            "All tries",
            (),
            HEADER,
            [_format_row(event) for event in ledger.events if event["kind"] in ENDINGS],
            (
                Picture(
                    "tries",
                    "The difference of each try with its interval",
                    lambda colours: draw_tries(results, colours),
                ),
            )
            if any(math.isfinite(_number(event["delta"])) for event in results)
            else (),
        ),
        Section(
            "On the hidden text",
            [f"Try {event['number']}, {event['change']}: {event['words']}." for event in finals]
            or ["Not measured yet: `glasslm try --final` does it for the last accepted try, once."],
        ),
    ]
    return page.write(folder, "tries", "Tries", lead, sections)


def _format_row(event: Mapping[str, Any]) -> tuple[str, ...]:
    if event["kind"] != "end":
        reason = event.get("reason")
        verdict = event["kind"] if reason is None else f"{event['kind']}: {reason}"
        return (str(event["number"]), event["change"], verdict, *[""] * (len(HEADER) - 3))
    low, high = _number(event["ci_low"]), _number(event["ci_high"])
    interval = f"{low:+.4f} to {high:+.4f}" if math.isfinite(low) else "none yet"
    needed = event["seeds_needed"]
    return (
        str(event["number"]),
        event["change"],
        event["verdict"].replace("_", " "),
        "" if event["delta"] is None else f"{event['delta']:+.4f}",
        interval,
        str(event["seeds"]),
        "" if needed is None else str(needed),
        f"{event['seconds']:.0f}",
    )


def draw_tries(results: Sequence[Mapping[str, Any]], colours: Palette) -> Figure:
    """A figure of the differences with their intervals, and the path of the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    figures.style_axes(axes, "Change minus base", "nats; below 0 is better", colours)
    for event in results:
        x, delta = event["number"], _number(event["delta"])
        low, high = _number(event["ci_low"]), _number(event["ci_high"])
        accepted = event["verdict"] == "better"
        if math.isfinite(low):
            axes.plot([x, x], [low, high], color=colours.ink, linewidth=1)
        if math.isfinite(delta):
            colour = colours.train if accepted else colours.third
            axes.plot([x], [delta], "o" if accepted else "x", color=colour)
    path = best_path(results)
    axes.step(
        [x for x, _ in path],
        [y for _, y in path],
        where="post",
        color=colours.train,
        linestyle="--",
        linewidth=1,
        label="lowest accepted loss, minus the first base",
    )
    axes.axhline(0, color=colours.ink, linewidth=0.6)
    axes.set_xlabel("try; a circle was accepted", color=colours.ink)
    figures.add_legend(axes, colours)
    return figure


def best_path(results: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The lowest mean loss of an accepted change after each try, minus the first base.

    Losses of other texts or other numbers of steps are not comparable, so only the tries with
    those of the last one are on the path. Differences are not added: changes that were tried
    against the same base may overlap.
    """
    comparable = [event for event in results if _task(event) == _task(results[-1])]
    path: list[tuple[float, float]] = []
    for event in comparable:
        base, change = (
            [loss for loss in event.get(side, ()) if loss is not None]
            for side in ("base_losses", "change_losses")
        )
        if not base:
            continue
        if not path:
            first = best = fmean(base)
            path.append((event["number"] - 1, 0.0))
        if event["verdict"] == "better":
            best = min(best, fmean(change))
        path.append((event["number"], best - first))
    return path


def _task(event: Mapping[str, Any]) -> tuple[Any, Any]:
    return event.get("steps"), event.get("config", {}).get("data")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
