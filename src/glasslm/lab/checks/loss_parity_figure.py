"""The figure of the loss parity: both engines' losses on one text, and their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from glasslm.lab.checks.loss_parity import StepLosses
from glasslm.lab.checks.parity import ParityPrecision
from glasslm.report.figures import Palette, add_legend, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_loss_parity(
    points: Sequence[StepLosses],
    tolerance: Mapping[ParityPrecision, float],
    text: str,
    colours: Palette,
) -> Figure:
    """Draw the losses of both engines on the text named `text`, and below them their difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    loss_axes, difference_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = [point.step for point in points]
    by_hand, by_autograd = np.array([point.losses["fp32"] for point in points]).T

    style_axes(
        loss_axes,
        f"Both engines learn the text {text}, in float32",
        "loss, nats per token",
        colours,
    )
    loss_axes.plot(
        steps,
        by_hand,
        color=colours.validation,
        alpha=0.5,
        linewidth=5,
        label="NumPy, gradients by hand",
    )
    loss_axes.plot(
        steps, by_autograd, "--", color=colours.train, linewidth=1.5, label="PyTorch, autograd"
    )
    add_legend(loss_axes, colours)

    _draw_differences(difference_axes, points, tolerance, colours)
    figure.legend(
        handles=difference_axes.lines,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        labelcolor=colours.ink,
        fontsize=9,
    )
    return figure


def _draw_differences(
    axes: Axes,
    points: Sequence[StepLosses],
    tolerance: Mapping[ParityPrecision, float],
    colours: Palette,
) -> None:
    style_axes(axes, "Difference of the two losses", "share of the loss", colours)
    styles: tuple[tuple[ParityPrecision, str, str, str], ...] = (
        ("fp32", "float32", "o", colours.third),
        ("fp64", "float64", "s", colours.ink),
    )
    for precision, name, marker, colour in styles:
        difference = np.array([point.relative_difference(precision) for point in points])
        # A logarithmic axis cannot show zeros, so the label counts them.
        if equal := np.count_nonzero(difference == 0):
            name += f" (0 in {equal} of {len(points)} steps)"
        axes.plot(
            [point.step for point in points],
            np.where(difference > 0, difference, np.nan),
            marker,
            color=colour,
            markersize=3,
            label=name,
        )
        axes.axhline(
            tolerance[precision], color=colour, linestyle=":", linewidth=1.2, label="tolerance"
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-17)
    axes.set_xlabel("step", color=colours.ink)
