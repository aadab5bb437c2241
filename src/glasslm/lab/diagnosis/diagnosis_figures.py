"""The figures of a diagnosis: through depth, attention, updates, and what the trials saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glasslm.config.schema import ModelConfig
from glasslm.lab.diagnosis.signals import Reading, block_gradients
from glasslm.lab.diagnosis.trials import BY_HEART, Coordinates, Range, Ratio
from glasslm.report import figures
from glasslm.report.figures import Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def depth(readings: Sequence[Reading], c: ModelConfig, colours: Palette) -> Figure:
    """By layer, a line for each checkpoint: rms of the stream, and the norm of the gradient of each block's weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    forward, backward = figure.subplots(1, 2)
    figures.dress(forward, "The residual stream", "rms", colours)
    figures.dress(backward, "Gradient of each block's weights", "L2 norm", colours)
    for reading, style in zip(readings, _styles(colours)):
        forward.plot(
            range(c.n_layers + 1),
            _positive(reading.stream),
            label=f"step {reading.step:,}",
            **style,
        )
        backward.plot(
            range(1, c.n_layers + 1),
            _positive(block_gradients(reading, c)),
            label=f"step {reading.step:,}",
            **style,
        )
    for axes in (forward, backward):
        axes.set_yscale("log")
        axes.set_xlabel(
            "after block (0: embedding)" if axes is forward else "block", color=colours.ink
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        figures.finish(axes, colours)
    return figure


def attention(readings: Sequence[Reading], c: ModelConfig, colours: Palette) -> Figure:
    """Every head: the entropy of what it looks at, and its largest logit, by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    entropies, scores = figure.subplots(1, 2)
    figures.dress(
        entropies, "Entropy of attention, each head", "share of the largest possible", colours
    )
    figures.dress(scores, "Largest attention logit, each head", "q . k / sqrt(head size)", colours)
    layers = np.repeat(np.arange(1, c.n_layers + 1), c.n_heads)
    for index, (reading, style) in enumerate(zip(readings, _styles(colours))):
        apart = layers + (index - (len(readings) - 1) / 2) * 0.15
        for axes, values in ((entropies, reading.entropy), (scores, reading.score)):
            axes.plot(
                apart,
                values.ravel(),
                **(style | {"linestyle": "none"}),
                label=f"step {reading.step:,}",
            )
    entropies.set_ylim(-0.03, 1.03)
    for axes in (entropies, scores):
        axes.set_xlabel("block", color=colours.ink)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figures.finish(axes, colours)
    return figure


def updates(found: Sequence[tuple[int, list[Ratio]]], colours: Palette) -> Figure:
    """The update-to-weight ratio of every weight, in the order of the model, for each checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    figures.dress(
        axes, "One update, as a share of each weight", "deviation over deviation", colours
    )
    for (step, ratios), style in zip(found, _styles(colours)):
        axes.plot(_positive(np.array([one.ratio for one in ratios])), **(style | {"linestyle": "none"}),
                  label=f"step {step:,}")  # fmt: skip
    axes.axhline(
        1e-3, color=colours.faint, linestyle="--", linewidth=1, label="1e-3, the rule for Adam"
    )
    axes.set_yscale("log")
    axes.set_xlabel("weights, in the order of the model", color=colours.ink)
    figures.finish(axes, colours)
    return figure


def overfit(losses: Sequence[float], uniform: float, colours: Palette) -> Figure:
    """The loss of one batch, learnt again and again."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    figures.dress(axes, "One batch, learnt by heart", "nats per token", colours)
    axes.plot(
        np.arange(1, len(losses) + 1), losses, color=colours.train, linewidth=1.8, label="loss"
    )
    axes.axhline(
        uniform, color=colours.faint, linestyle=":", linewidth=1.2, label="a uniform guess, ln V"
    )
    axes.axhline(
        BY_HEART * uniform,
        color=colours.third,
        linestyle="--",
        linewidth=1.2,
        label="known by heart",
    )
    axes.set_ylim(0, max(1.2 * uniform, min(np.nanmax([0.0, *losses]), 3 * uniform)))
    axes.set_xlabel("step", color=colours.ink)
    figures.finish(axes, colours)
    return figure


def range_test(found: Range, lr: float, colours: Palette) -> Figure:
    """The loss while the rate grows, with the run's own rate and the suggested one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    figures.dress(axes, "Every rate for a step", "nats per token", colours)
    axes.plot(
        found.rates, found.losses, color=colours.train, alpha=0.35, linewidth=0.8, label="each step"
    )
    axes.plot(found.rates, found.smooth, color=colours.train, linewidth=1.8, label="smoothed")
    axes.axvline(lr, color=colours.validation, linewidth=1.4, label=f"this run's {lr:.2g}")
    axes.axvline(
        found.limit,
        color=colours.faint,
        linestyle=":",
        linewidth=1.4,
        label=f"no better from {found.limit:.1g}",
    )
    axes.axvline(found.suggested, color=colours.third, linestyle="--", linewidth=1.4,
                 label=f"suggested {found.suggested:.1g}")  # fmt: skip
    finite = found.smooth[np.isfinite(found.smooth)]
    axes.set_ylim(0.95 * finite.min(), finite[0] + 0.5 * (finite[0] - finite.min()) + 0.1)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color=colours.ink)
    figures.finish(axes, colours)
    return figure


def widths(found: Coordinates, colours: Palette) -> Figure:
    """How far a few steps move each part of the model, by its width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    figures.dress(axes, "The same rate at several widths", "mean absolute change", colours)
    markers = zip(
        found.places.items(),
        "osD^",
        (colours.train, colours.validation, colours.third, colours.ink),
    )
    for (place, values), marker, colour in markers:
        axes.plot(
            found.widths, _positive(np.array(values)), f"{marker}-", color=colour, label=place
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(found.widths, [str(width) for width in found.widths])
    axes.minorticks_off()
    axes.set_xlabel("d_model", color=colours.ink)
    figures.finish(axes, colours)
    return figure


def _styles(colours: Palette) -> list[dict[str, Any]]:
    """For the checkpoints, the first one faint."""
    order = (colours.faint, colours.third, colours.train, colours.validation)
    return [
        {"color": colour, "marker": marker, "linestyle": "-"}
        for colour, marker in zip(order, "osD^")
    ]


def _positive(values: figures.Array) -> figures.Array:
    """Without what a logarithmic axis cannot show."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
