"""The figures of a diagnosis: signals through depth, attention, updates, and the trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glasslm.config.schema import ModelConfig
from glasslm.lab.diagnosis.coordinate_check import CoordinateCheck
from glasslm.lab.diagnosis.measurements import Measurement, block_gradient_norms
from glasslm.lab.diagnosis.trials import OVERFIT_SHARE, RangeTest, UpdateRatio
from glasslm.report import figures
from glasslm.report.figures import Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_depth(measurements: Sequence[Measurement], c: ModelConfig, colours: Palette) -> Figure:
    """Draw the rms of the stream and the gradient norm by layer, a line per checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    forward, backward = figure.subplots(1, 2)
    figures.style_axes(forward, "The residual stream", "rms", colours)
    figures.style_axes(backward, "Gradient of each block's weights", "L2 norm", colours)
    for measurement, style in zip(measurements, _styles(colours)):
        forward.plot(
            range(c.n_layers + 1),
            _positive(measurement.stream_rms),
            label=f"step {measurement.step:,}",
            **style,
        )
        backward.plot(
            range(1, c.n_layers + 1),
            _positive(block_gradient_norms(measurement, c)),
            label=f"step {measurement.step:,}",
            **style,
        )
    for axes in (forward, backward):
        axes.set_yscale("log")
        axes.set_xlabel(
            "after block (0: embedding)" if axes is forward else "block", color=colours.ink
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        figures.add_legend(axes, colours)
    return figure


def draw_attention(measurements: Sequence[Measurement], c: ModelConfig, colours: Palette) -> Figure:
    """Draw the entropy and the largest logit of every attention head, by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    entropies, scores = figure.subplots(1, 2)
    figures.style_axes(
        entropies, "Entropy of attention, each head", "share of the largest possible", colours
    )
    figures.style_axes(
        scores, "Largest attention logit, each head", "q . k / sqrt(head size)", colours
    )
    layers = np.repeat(np.arange(1, c.n_layers + 1), c.n_heads)
    for index, (measurement, style) in enumerate(zip(measurements, _styles(colours))):
        x = layers + (index - (len(measurements) - 1) / 2) * 0.15
        panels = ((entropies, measurement.entropy), (scores, measurement.max_score))
        for axes, values in panels:
            axes.plot(
                x,
                values.ravel(),
                **(style | {"linestyle": "none"}),
                label=f"step {measurement.step:,}",
            )
    entropies.set_ylim(-0.03, 1.03)
    for axes in (entropies, scores):
        axes.set_xlabel("block", color=colours.ink)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figures.add_legend(axes, colours)
    return figure


def draw_updates(
    ratios_by_step: Sequence[tuple[int, list[UpdateRatio]]], colours: Palette
) -> Figure:
    """Draw the update-to-weight ratio of every weight, for each checkpoint.

    The weights are in the order of the model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    figures.style_axes(
        axes, "One update, as a share of each weight", "deviation over deviation", colours
    )
    for (step, ratios), style in zip(ratios_by_step, _styles(colours)):
        axes.plot(
            _positive(np.array([item.ratio for item in ratios])),
            **(style | {"linestyle": "none"}),
            label=f"step {step:,}",
        )
    axes.axhline(
        1e-3, color=colours.faint, linestyle="--", linewidth=1, label="1e-3, the rule for Adam"
    )
    axes.set_yscale("log")
    axes.set_xlabel("weights, in the order of the model", color=colours.ink)
    figures.add_legend(axes, colours)
    return figure


def draw_overfit(losses: Sequence[float], uniform: float, colours: Palette) -> Figure:
    """Draw the losses of one batch that is trained again and again."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    figures.style_axes(axes, "Overfitting one batch", "nats per token", colours)
    axes.plot(
        np.arange(1, len(losses) + 1), losses, color=colours.train, linewidth=1.8, label="loss"
    )
    axes.axhline(
        uniform, color=colours.faint, linestyle=":", linewidth=1.2, label="a uniform guess, ln V"
    )
    axes.axhline(
        OVERFIT_SHARE * uniform,
        color=colours.third,
        linestyle="--",
        linewidth=1.2,
        label="overfitted",
    )
    axes.set_ylim(0, max(1.2 * uniform, min(np.nanmax([0.0, *losses]), 3 * uniform)))
    axes.set_xlabel("step", color=colours.ink)
    figures.add_legend(axes, colours)
    return figure


def draw_range_test(test: RangeTest, lr: float, colours: Palette) -> Figure:
    """Draw the loss while the rate grows, with the rate of the run and the suggested one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    figures.style_axes(axes, "Learning-rate range test", "nats per token", colours)
    axes.plot(
        test.rates, test.losses, color=colours.train, alpha=0.35, linewidth=0.8, label="each step"
    )
    axes.plot(test.rates, test.smooth, color=colours.train, linewidth=1.8, label="smoothed")
    axes.axvline(lr, color=colours.validation, linewidth=1.4, label=f"this run's {lr:.2g}")
    axes.axvline(
        test.limit,
        color=colours.faint,
        linestyle=":",
        linewidth=1.4,
        label=f"limit {test.limit:.1g}",
    )
    axes.axvline(
        test.suggested_rate,
        color=colours.third,
        linestyle="--",
        linewidth=1.4,
        label=f"suggested {test.suggested_rate:.1g}",
    )
    finite = test.smooth[np.isfinite(test.smooth)]
    axes.set_ylim(0.95 * finite.min(), finite[0] + 0.5 * (finite[0] - finite.min()) + 0.1)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color=colours.ink)
    figures.add_legend(axes, colours)
    return figure


def draw_widths(check: CoordinateCheck, colours: Palette) -> Figure:
    """Draw the change of each part of the model after a few steps, by width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    figures.style_axes(axes, "The same rate at several widths", "mean absolute change", colours)
    markers = zip(
        check.places.items(),
        "osD^",
        (colours.train, colours.validation, colours.third, colours.ink),
    )
    for (place, values), marker, colour in markers:
        axes.plot(
            check.widths, _positive(np.array(values)), f"{marker}-", color=colour, label=place
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(check.widths, [str(width) for width in check.widths])
    axes.minorticks_off()
    axes.set_xlabel("d_model", color=colours.ink)
    figures.add_legend(axes, colours)
    return figure


def _styles(colours: Palette) -> list[dict[str, Any]]:
    """The line styles of the checkpoints; the first one is faint."""
    order = (colours.faint, colours.third, colours.train, colours.validation)
    return [
        {"color": colour, "marker": marker, "linestyle": "-"}
        for colour, marker in zip(order, "osD^")
    ]


def _positive(values: figures.Array) -> figures.Array:
    """values (N,) with NaN for those that a logarithmic axis cannot show."""
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
