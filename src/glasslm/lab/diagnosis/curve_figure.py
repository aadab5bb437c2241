"""The figure of a loss curve: spikes, non-finite values and the best validation loss are marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from glasslm.lab.diagnosis.curve_files import Curve
from glasslm.lab.diagnosis.smoothed_curve import find_norm_spikes, find_spikes
from glasslm.report import figures
from glasslm.report.figures import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curve(curve: Curve, colours: Palette) -> Figure:
    """Draw the losses of a curve, and below them its gradient norms if it has any."""
    from matplotlib.figure import Figure

    has_norms = len(curve.grad_norm.finite) > 0
    figure = Figure(figsize=(9, 5.6 if has_norms else 4), layout="constrained")
    ratios = (3, 1) if has_norms else (1,)
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    _draw_losses(panels[0], curve, colours)
    if has_norms:
        _draw_norms(panels[1], curve, colours)
    panels[-1].set_xlabel(curve.step_unit, color=colours.ink)
    for axes in panels:
        if axes.get_legend_handles_labels()[0]:
            figures.add_legend(axes, colours)
    return figure


def _draw_losses(axes: Axes, curve: Curve, colours: Palette) -> None:
    figures.style_axes(axes, "Loss", "", colours)
    train, validation = curve.train.finite, curve.validation.finite
    nonfinite = ~np.isfinite(curve.train.values)
    label = "validation" if curve.train_is_validation else "training"
    axes.plot(train.steps, train.values, color=colours.train, linewidth=0.9, alpha=0.8, label=label)
    if len(validation):
        best = int(validation.values.argmin())
        axes.plot(
            validation.steps,
            validation.values,
            "o-",
            color=colours.validation,
            markersize=3.5,
            linewidth=1.8,
            label="validation",
        )
        axes.plot(
            validation.steps[best],
            validation.values[best],
            "*",
            color=colours.validation,
            markersize=14,
            markeredgecolor=colours.ink,
            markeredgewidth=0.6,
            label="best validation loss",
        )
    if spikes := find_spikes(train):
        axes.plot(
            train.steps[spikes],
            train.values[spikes],
            "v",
            color=colours.third,
            markersize=8,
            label="spike",
        )
    if nonfinite.any():
        axes.plot(
            curve.train.steps[nonfinite],
            np.full(nonfinite.sum(), 0.02),
            "x",
            color=colours.validation,
            markersize=5,
            transform=axes.get_xaxis_transform(),
            label="not finite",
        )


def _draw_norms(axes: Axes, curve: Curve, colours: Palette) -> None:
    norms = curve.grad_norm.finite
    figures.style_axes(axes, "Gradient norm", "", colours)
    axes.plot(norms.steps, norms.values, color=colours.third, linewidth=0.9)
    if spikes := find_norm_spikes(norms):
        axes.plot(
            norms.steps[spikes],
            norms.values[spikes],
            "v",
            color=colours.validation,
            markersize=7,
            label="spike",
        )
    if (norms.values > 0).all():
        axes.set_yscale("log")
        within_a_decade = np.ptp(np.log10(norms.values)) < 1
        axes.tick_params(which="minor", labelleft=within_a_decade, colors=colours.ink, labelsize=8)
