"""The figure of both engines' losses, laid over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from glasslm.lab.checks.overlay import Point
from glasslm.lab.checks.parity import Exactness
from glasslm.report.figures import Palette, dress, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overlay(
    points: Sequence[Point], tolerance: Mapping[Exactness, float], text: str, colours: Palette
) -> Figure:
    """The losses of both engines on a named text, laid over each other, and below them how far they are apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    curves, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = [point.step for point in points]
    by_hand, by_autograd = np.array([point.losses["fp32"] for point in points]).T

    dress(
        curves, f"Both engines learn the text {text}, in float32", "loss, nats per token", colours
    )
    curves.plot(
        steps,
        by_hand,
        color=colours.validation,
        alpha=0.5,
        linewidth=5,
        label="NumPy, gradients by hand",
    )
    curves.plot(
        steps, by_autograd, "--", color=colours.train, linewidth=1.5, label="PyTorch, autograd"
    )
    finish(curves, colours)

    dress(gaps, "How far apart they are", "share of the loss", colours)
    styles: tuple[tuple[Exactness, str, str, str], ...] = (
        ("fp32", "float32", "o", colours.third), ("fp64", "float64", "s", colours.ink),
    )  # fmt: skip
    for precision, name, marker, colour in styles:
        apart = np.array([point.apart(precision) for point in points])
        if equal := np.count_nonzero(apart == 0):  # which a logarithmic axis cannot show
            name += f" (nothing in {equal} of {len(points)} steps)"
        gaps.plot(
            steps,
            np.where(apart > 0, apart, np.nan),
            marker,
            color=colour,
            markersize=3,
            label=name,
        )
        gaps.axhline(
            tolerance[precision], color=colour, linestyle=":", linewidth=1.2, label="allowed"
        )
    gaps.set_yscale("log")
    gaps.set_ylim(bottom=1e-17)
    gaps.set_xlabel("step", color=colours.ink)
    figure.legend(
        handles=gaps.lines,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        labelcolor=colours.ink,
        fontsize=9,
    )
    return figure
