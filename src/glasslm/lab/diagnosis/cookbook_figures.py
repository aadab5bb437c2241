"""The figures of the stability cookbook: a panel for each experiment, drawn alone or all six on one sheet.

What diverged, or ended above the axis, is a cross at its upper edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from glasslm.lab.diagnosis.experiments import ALL, COLD, DEPTHS, RATES, STARTS, TRICKS, Cooked
from glasslm.lab.diagnosis.gradient_trials import (
    BLOCK,
    EXPONENTS,
    LARGE_BATCH,
    LARGEST,
    LOSS_SCALE,
    NORMAL,
    RATE,
    ROWS,
    SMALLEST,
    Array,
    Recipe,
    Trial,
)
from glasslm.report import figures
from glasslm.report.figures import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes", Cooked, Palette], None]


def alone(draw: Draw, cooked: Cooked, colours: Palette) -> Figure:
    """One experiment."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    _panel(figure.subplots(), draw, cooked, colours)
    return figure


def sheet(cooked: Cooked, colours: Palette) -> Figure:
    """All of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10), layout="constrained")
    for axes, draw in zip(
        figure.subplots(3, 2).flat, (tricks, starts, rates, depth, gradients, float16)
    ):
        _panel(axes, draw, cooked, colours)
    return figure


def _panel(axes: Axes, draw: Draw, cooked: Cooked, colours: Palette) -> None:
    draw(axes, cooked, colours)
    figures.finish(axes, colours)
    if legend := axes.get_legend():
        for entry in legend.get_texts():
            entry.set_fontsize(8)


def tricks(axes: Axes, cooked: Cooked, colours: Palette) -> None:
    """Training losses, each the mean over seeds, smoothed; a run that diverges ends in a cross."""
    figures.dress(axes, "One trick left out", "training loss, nats per token", colours)
    top, window = _top(cooked), max(1, cooked.steps // 15)
    styles = ((colours.ink, "-"), (colours.validation, "-"), (colours.validation, ":"), (colours.train, "-"),
              (colours.third, "--"), (colours.third, "-"), (colours.faint, "-"))  # fmt: skip
    for (name, recipe), (colour, dash) in zip(TRICKS.items(), styles):
        length = min(len(trial.losses) for trial in cooked.trials[recipe])
        losses = np.mean([trial.losses[:length] for trial in cooked.trials[recipe]], axis=0)
        steps = np.arange(1, length + 1)
        smooth = figures.mean_around(steps.astype(float), losses, before=window, after=0)
        gone = any(trial.diverged for trial in cooked.trials[recipe])
        label = f"{name} (diverged)" if gone else name
        axes.plot(steps, np.minimum(smooth, top), dash, color=colour, linewidth=1.6, label=label)
        if gone:
            axes.plot(
                length, top, "x", color=colour, markersize=9, markeredgewidth=2, clip_on=False
            )
    axes.set_ylim(_bottom(cooked), top)
    axes.set_xlabel("step", color=colours.ink)


def starts(axes: Axes, cooked: Cooked, colours: Palette) -> None:
    """Every seed of every start, with the other tricks and with none."""
    figures.dress(
        axes, "Deviation of the first weights", "validation loss, nats per token", colours
    )
    kinds = (
        (0, "all other tricks", "o", colours.train, -0.1),
        (1, "no other trick", "s", colours.validation, 0.1),
    )
    for which, label, marker, colour, shift in kinds:
        trials = [cooked.trials[pair[which]] for pair in STARTS.values()]
        _scatter(axes, cooked, np.arange(len(STARTS)) + shift, trials, marker, colour, label)
    _limits(axes, cooked, [recipe for pair in STARTS.values() for recipe in pair])
    _guess(axes, cooked, colours)
    names = {
        "scaled": "0.02, residual\n0.02 / sqrt(2L)",
        "plain": "0.02",
        "xavier": "Xavier",
        "he": "He",
        "unit": "1",
    }
    axes.set_xticks(range(len(STARTS)), [names[start] for start in STARTS])


def rates(axes: Axes, cooked: Cooked, colours: Palette) -> None:
    """Validation loss over the rate: every seed, and a line through the means."""
    figures.dress(axes, "Learning rate", "validation loss, nats per token", colours)
    for table, label, style, colour in (
        (RATES, "warmup", "o-", colours.train), (COLD, "no warmup", "s--", colours.validation),
    ):  # fmt: skip
        x = np.array(list(table)) * RATE
        trials = [cooked.trials[recipe] for recipe in table.values()]
        _scatter(axes, cooked, x, trials, style[0], colour, label)
        means = [np.mean([_height(cooked, trial) for trial in found]) for found in trials]
        axes.plot(x, means, style[1:], color=colour, linewidth=1.4)
    axes.axvline(RATE, color=colours.faint, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate of AdamW (the line: x1)", color=colours.ink)
    _limits(axes, cooked, [*RATES.values(), *COLD.values()])
    _guess(axes, cooked, colours)


def depth(axes: Axes, cooked: Cooked, colours: Palette) -> None:
    """Validation loss over the number of blocks: every seed, and a line through the means."""
    figures.dress(axes, "Norm before or after", "validation loss, nats per token", colours)
    for which, label, style, colour in (
        (0, "pre-norm", "o-", colours.train),
        (1, "post-norm", "s--", colours.validation),
    ):
        trials = [cooked.trials[pair[which]] for pair in DEPTHS.values()]
        _scatter(axes, cooked, np.array(list(DEPTHS)), trials, style[0], colour, label)
        means = [np.mean([_height(cooked, trial) for trial in found]) for found in trials]
        axes.plot(list(DEPTHS), means, style[1:], color=colour, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xticks(list(DEPTHS), [str(number) for number in DEPTHS])
    axes.minorticks_off()
    axes.set_xlabel("blocks", color=colours.ink)
    _limits(axes, cooked, [recipe for pair in DEPTHS.values() for recipe in pair])
    _guess(axes, cooked, colours)


def gradients(axes: Axes, cooked: Cooked, colours: Palette) -> None:
    """Norm of each block's gradient along the run of the first seed, healthy and sick."""
    figures.dress(axes, "Gradient of each block's weights", "L2 norm", colours)
    name, sick = cooked.sick
    for label, recipe, marker, colour in (
        ("all tricks", ALL, "o-", colours.train), (name, sick, "s--", colours.validation),
    ):  # fmt: skip
        looks = cooked.trials[recipe][0].looks
        for index, seen in enumerate(looks):
            shade = 0.3 + 0.7 * index / max(1, len(looks) - 1)
            norms = np.where(np.isfinite(seen.norms) & (seen.norms > 0), seen.norms, np.nan)
            axes.plot(range(1, len(norms) + 1), norms, marker, color=colour, alpha=shade, linewidth=1.4, markersize=4,
                      label=f"{label}, step {seen.step}")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("block", color=colours.ink)
    axes.set_xticks(range(1, ALL.n_layers + 1))
    axes.set_xlim(0.8, ALL.n_layers + 2.8)  # room for the legend


def float16(axes: Axes, cooked: Cooked, colours: Palette) -> None:
    """Magnitudes of the stream's gradients, as they are and scaled, over the range of float16."""
    figures.dress(axes, "The stream's gradients in float16", "share of the elements", colours)
    counts = cooked.trials[ALL][0].looks[-1].magnitudes
    shares, edges = counts / max(1, counts.sum()), 2.0**EXPONENTS
    for times, label, colour, dash in (
        (1.0, "unscaled", colours.validation, "-"),
        (
            ROWS * BLOCK / LARGE_BATCH,
            f"in a batch of {int(LARGE_BATCH):,} tokens",
            colours.ink,
            ":",
        ),
        (LOSS_SCALE, "loss times 65,536", colours.train, "--"),
    ):
        axes.plot(
            edges[:-1] * times * math.sqrt(2),
            shares,
            dash,
            color=colour,
            linewidth=1.6,
            label=label,
        )
    axes.axvspan(NORMAL, LARGEST, color=colours.third, alpha=0.15, linewidth=0)
    for where, what in (
        (SMALLEST / 2, "below: 0"),
        (NORMAL, "below: fewer digits"),
        (LARGEST, "above: infinite"),
    ):
        axes.axvline(where, color=colours.third, linewidth=1)
        axes.annotate(what, (where, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right",
                      fontsize=8, color=colours.ink)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(2.0**-62, 2.0**20)  # room for the legend
    axes.set_ylim(0, 1.5 * max(0.1, float(shares.max())))  # room for words
    axes.set_xlabel("magnitude (shaded: float16 at its full precision)", color=colours.ink)


def _scatter(
    axes: Axes,
    cooked: Cooked,
    x: Array,
    trials: Sequence[Sequence[Trial]],
    marker: str,
    colour: str,
    label: str,
) -> None:
    """A point for each seed; those above the axis are crosses at its edge."""
    top = _top(cooked)
    points = [(where, _height(cooked, trial)) for where, found in zip(x, trials) for trial in found]
    inside = [(a, b) for a, b in points if b < top] or [(np.nan, np.nan)]
    axes.plot(*zip(*inside), marker, color=colour, markersize=5, alpha=0.7, label=label)
    if above := [(a, b) for a, b in points if not b < top]:
        axes.plot(*zip(*above), "x", color=colour, markersize=8, markeredgewidth=2, clip_on=False,
                  label=f"{label}: higher, or diverged")  # fmt: skip


def _limits(axes: Axes, cooked: Cooked, shown: Sequence[Recipe]) -> None:
    """As high as what is shown, or as `_top` where something lies above that."""
    highest = max(_height(cooked, trial) for recipe in shown for trial in cooked.trials[recipe])
    axes.set_ylim(_bottom(cooked), min(_top(cooked), max(highest, cooked.unigram) + 0.15))


def _guess(axes: Axes, cooked: Cooked, colours: Palette) -> None:
    axes.axhline(
        cooked.unigram,
        color=colours.faint,
        linestyle=":",
        linewidth=1.2,
        label="guess by frequencies",
    )


def _height(cooked: Cooked, trial: Trial) -> float:
    return min(trial.val_loss, _top(cooked))


def _top(cooked: Cooked) -> float:
    """Half a nat above guessing at random: nobody need see how much worse a run became."""
    return math.log(cooked.vocab_size) + 0.5


def _bottom(cooked: Cooked) -> float:
    """A little below the best run."""
    return min(_height(cooked, trial) for found in cooked.trials.values() for trial in found) - 0.1
