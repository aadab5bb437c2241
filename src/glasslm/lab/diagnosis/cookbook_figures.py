"""The figures of the stability cookbook: a panel for each experiment.

A trial that diverged, or ended above the axis, is a cross at its upper edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from glasslm.lab.diagnosis.experiments import (
    ALL_TRICKS,
    DEPTHS,
    INIT_SCHEMES,
    NO_WARMUP,
    RATES,
    TRICKS,
    CookbookResults,
)
from glasslm.lab.diagnosis.gradient_trials import (
    BASE_LR,
    BLOCK,
    EXPONENT_EDGES,
    FP16_MAX,
    FP16_MIN,
    FP16_MIN_NORMAL,
    LARGE_BATCH,
    LOSS_SCALE,
    ROWS,
    Array,
    Recipe,
    Trial,
)
from glasslm.report import figures
from glasslm.report.figures import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DrawPanel = Callable[["Axes", CookbookResults, Palette], None]


def draw_single(draw: DrawPanel, results: CookbookResults, colours: Palette) -> Figure:
    """Draw the panel of one experiment as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    _draw_panel(figure.subplots(), draw, results, colours)
    return figure


def draw_sheet(results: CookbookResults, colours: Palette) -> Figure:
    """Draw the panels of all experiments on one figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10), layout="constrained")
    for axes, (_, draw) in zip(figure.subplots(3, 2).flat, PANELS.values()):
        _draw_panel(axes, draw, results, colours)
    return figure


def _draw_panel(axes: Axes, draw: DrawPanel, results: CookbookResults, colours: Palette) -> None:
    draw(axes, results, colours)
    figures.add_legend(axes, colours)
    if legend := axes.get_legend():
        for entry in legend.get_texts():
            entry.set_fontsize(8)


def draw_tricks(axes: Axes, results: CookbookResults, colours: Palette) -> None:
    """Draw the smoothed training losses, means over seeds; a diverged trial ends in a cross."""
    figures.style_axes(axes, "One trick left out", "training loss, nats per token", colours)
    top, window = _top_of_axis(results), max(1, results.steps // 15)
    styles = (
        (colours.ink, "-"),
        (colours.validation, "-"),
        (colours.validation, ":"),
        (colours.train, "-"),
        (colours.third, "--"),
        (colours.third, "-"),
        (colours.faint, "-"),
    )
    for (name, recipe), (colour, dash) in zip(TRICKS.items(), styles):
        length = min(len(trial.losses) for trial in results.trials[recipe])
        losses = np.mean([trial.losses[:length] for trial in results.trials[recipe]], axis=0)
        steps = np.arange(1, length + 1)
        smooth = figures.windowed_mean(steps.astype(float), losses, before=window, after=0)
        diverged = any(trial.diverged for trial in results.trials[recipe])
        label = f"{name} (diverged)" if diverged else name
        axes.plot(steps, np.minimum(smooth, top), dash, color=colour, linewidth=1.6, label=label)
        if diverged:
            axes.plot(
                length, top, "x", color=colour, markersize=9, markeredgewidth=2, clip_on=False
            )
    axes.set_ylim(_bottom_of_axis(results), top)
    axes.set_xlabel("step", color=colours.ink)


def draw_inits(axes: Axes, results: CookbookResults, colours: Palette) -> None:
    """Draw the loss of every seed of every initialization, with the other tricks and without."""
    figures.style_axes(
        axes, "Deviation of the first weights", "validation loss, nats per token", colours
    )
    kinds = (
        (0, "all other tricks", "o", colours.train, -0.1),
        (1, "no other trick", "s", colours.validation, 0.1),
    )
    for which, label, marker, colour, shift in kinds:
        trials = [results.trials[pair[which]] for pair in INIT_SCHEMES.values()]
        _scatter(axes, results, np.arange(len(INIT_SCHEMES)) + shift, trials, marker, colour, label)
    _set_limits(axes, results, [recipe for pair in INIT_SCHEMES.values() for recipe in pair])
    _draw_unigram_loss(axes, results, colours)
    names = {
        "scaled": "0.02, residual\n0.02 / sqrt(2L)",
        "plain": "0.02",
        "xavier": "Xavier",
        "he": "He",
        "unit": "1",
    }
    axes.set_xticks(range(len(INIT_SCHEMES)), [names[start] for start in INIT_SCHEMES])


def draw_rates(axes: Axes, results: CookbookResults, colours: Palette) -> None:
    """Draw the validation loss by rate: every seed, and a line through the means."""
    figures.style_axes(axes, "Learning rate", "validation loss, nats per token", colours)
    for table, label, style, colour in (
        (RATES, "warmup", "o-", colours.train),
        (NO_WARMUP, "no warmup", "s--", colours.validation),
    ):
        x = np.array(list(table)) * BASE_LR
        trials = [results.trials[recipe] for recipe in table.values()]
        _scatter(axes, results, x, trials, style[0], colour, label)
        means = [np.mean([_clipped_loss(results, trial) for trial in seeds]) for seeds in trials]
        axes.plot(x, means, style[1:], color=colour, linewidth=1.4)
    axes.axvline(BASE_LR, color=colours.faint, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate of AdamW (the line: x1)", color=colours.ink)
    _set_limits(axes, results, [*RATES.values(), *NO_WARMUP.values()])
    _draw_unigram_loss(axes, results, colours)


def draw_depth(axes: Axes, results: CookbookResults, colours: Palette) -> None:
    """Draw the validation loss by number of blocks: every seed, and a line through the means."""
    figures.style_axes(axes, "Norm before or after", "validation loss, nats per token", colours)
    for which, label, style, colour in (
        (0, "pre-norm", "o-", colours.train),
        (1, "post-norm", "s--", colours.validation),
    ):
        trials = [results.trials[pair[which]] for pair in DEPTHS.values()]
        _scatter(axes, results, np.array(list(DEPTHS)), trials, style[0], colour, label)
        means = [np.mean([_clipped_loss(results, trial) for trial in seeds]) for seeds in trials]
        axes.plot(list(DEPTHS), means, style[1:], color=colour, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xticks(list(DEPTHS), [str(number) for number in DEPTHS])
    axes.minorticks_off()
    axes.set_xlabel("blocks", color=colours.ink)
    _set_limits(axes, results, [recipe for pair in DEPTHS.values() for recipe in pair])
    _draw_unigram_loss(axes, results, colours)


def draw_gradients(axes: Axes, results: CookbookResults, colours: Palette) -> None:
    """Draw the gradient norms of the first seed by block, for all tricks and the worst recipe."""
    figures.style_axes(axes, "Gradient of each block's weights", "L2 norm", colours)
    name, worst = results.worst_recipe
    for label, recipe, marker, colour in (
        ("all tricks", ALL_TRICKS, "o-", colours.train),
        (name, worst, "s--", colours.validation),
    ):
        snapshots = results.trials[recipe][0].snapshots
        for index, snapshot in enumerate(snapshots):
            shade = 0.3 + 0.7 * index / max(1, len(snapshots) - 1)
            norms = np.where(
                np.isfinite(snapshot.norms) & (snapshot.norms > 0), snapshot.norms, np.nan
            )
            axes.plot(
                range(1, len(norms) + 1),
                norms,
                marker,
                color=colour,
                alpha=shade,
                linewidth=1.4,
                markersize=4,
                label=f"{label}, step {snapshot.step}",
            )
    axes.set_yscale("log")
    axes.set_xlabel("block", color=colours.ink)
    axes.set_xticks(range(1, ALL_TRICKS.n_layers + 1))
    axes.set_xlim(0.8, ALL_TRICKS.n_layers + 2.8)  # room for the legend


def draw_float16(axes: Axes, results: CookbookResults, colours: Palette) -> None:
    """Draw the magnitudes of the stream's gradients over the range of float16.

    The magnitudes are drawn unscaled and scaled.
    """
    figures.style_axes(axes, "The stream's gradients in float16", "share of the elements", colours)
    counts = results.trials[ALL_TRICKS][0].snapshots[-1].magnitudes
    shares, edges = counts / max(1, counts.sum()), 2.0**EXPONENT_EDGES
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
    axes.axvspan(FP16_MIN_NORMAL, FP16_MAX, color=colours.third, alpha=0.15, linewidth=0)
    for x, text in (
        (FP16_MIN / 2, "below: 0"),
        (FP16_MIN_NORMAL, "below: fewer digits"),
        (FP16_MAX, "above: infinite"),
    ):
        axes.axvline(x, color=colours.third, linewidth=1)
        axes.annotate(
            text,
            (x, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="right",
            fontsize=8,
            color=colours.ink,
        )
    axes.set_xscale("log")
    axes.set_xlim(2.0**-62, 2.0**20)  # room for the legend
    axes.set_ylim(0, 1.5 * max(0.1, float(shares.max())))  # room for the annotations
    axes.set_xlabel("magnitude (shaded: float16 at its full precision)", color=colours.ink)


def _scatter(
    axes: Axes,
    results: CookbookResults,
    x: Array,
    trials: Sequence[Sequence[Trial]],
    marker: str,
    colour: str,
    label: str,
) -> None:
    """Draw a point for each seed; those above the axis are crosses at its edge."""
    top = _top_of_axis(results)
    points = [(a, _clipped_loss(results, trial)) for a, seeds in zip(x, trials) for trial in seeds]
    inside = [(a, b) for a, b in points if b < top] or [(np.nan, np.nan)]
    axes.plot(*zip(*inside), marker, color=colour, markersize=5, alpha=0.7, label=label)
    if above := [(a, b) for a, b in points if not b < top]:
        axes.plot(
            *zip(*above),
            "x",
            color=colour,
            markersize=8,
            markeredgewidth=2,
            clip_on=False,
            label=f"{label}: higher, or diverged",
        )


def _set_limits(axes: Axes, results: CookbookResults, shown: Sequence[Recipe]) -> None:
    """Set the limits of the y axis to the losses of the recipes, at most to `_top_of_axis`."""
    highest = max(
        _clipped_loss(results, trial) for recipe in shown for trial in results.trials[recipe]
    )
    axes.set_ylim(
        _bottom_of_axis(results), min(_top_of_axis(results), max(highest, results.unigram) + 0.15)
    )


def _draw_unigram_loss(axes: Axes, results: CookbookResults, colours: Palette) -> None:
    """Draw a line at the loss of token frequencies without context."""
    axes.axhline(
        results.unigram,
        color=colours.faint,
        linestyle=":",
        linewidth=1.2,
        label="token frequencies",
    )


def _clipped_loss(results: CookbookResults, trial: Trial) -> float:
    """The validation loss, at most the top of the axis."""
    return min(trial.val_loss, _top_of_axis(results))


def _top_of_axis(results: CookbookResults) -> float:
    """Half a nat above a uniform guess: larger losses are all equally useless."""
    return math.log(results.vocab_size) + 0.5


def _bottom_of_axis(results: CookbookResults) -> float:
    """0.1 nats below the best trial."""
    losses = (_clipped_loss(results, trial) for seeds in results.trials.values() for trial in seeds)
    return min(losses) - 0.1


# By the name of the figure's file: a label and the function that draws the panel
PANELS: dict[str, tuple[str, DrawPanel]] = {
    "tricks": ("Training loss with each trick left out, mean over seeds", draw_tricks),
    "starts": ("Loss by initialization, with and without the other tricks", draw_inits),
    "rates": ("Loss by learning rate, with and without warmup", draw_rates),
    "depth": ("Loss by depth, pre-norm and post-norm", draw_depth),
    "gradients": (
        "Gradient norm of each block, with all tricks and with the worst recipe",
        draw_gradients,
    ),
    "float16": ("Magnitudes of gradients, and the range of float16", draw_float16),
}
