"""The figures of a fitted scaling law: loss over compute, IsoFLOP parabolas, loss over size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from glasslm.errors import InputError
from glasslm.lab.scaling import isoflop
from glasslm.lab.scaling.analysis import Analysis
from glasslm.lab.scaling.isoflop import KAPLAN_EXPONENT
from glasslm.lab.scaling.law import Observation
from glasslm.lab.scaling.parabolas import fit_parabolas
from glasslm.lab.scaling.uncertainty import Forecast
from glasslm.report.figures import Palette, add_legend, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_DRAWN_LAWS = 60  # lines of the fitted law, one for a size
MAX_LEGEND_SIZES = 8  # with more, a colour bar tells the sizes apart


def draw_scaling_curve(analysis: Analysis, colours: Palette) -> Figure:
    """A figure of loss over compute: the runs, the law of each size, and its frontier."""
    from matplotlib.figure import Figure

    fit, sizes = analysis.bootstrap.fit, sorted({o.N for o in analysis.runs})
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, "Loss against compute", analysis.measured, colours)
    palette = (colours.train, colours.validation, colours.third)
    scale = None
    if len(sizes) > MAX_LEGEND_SIZES:
        scale = _add_colour_bar(figure, axes, sizes, "parameters N", colours)
    by_size: dict[float, list[Observation]] = {}
    for o in sorted(analysis.runs, key=lambda o: o.C):
        by_size.setdefault(o.N, []).append(o)
    drawn_laws = set(sizes[:: -(-len(sizes) // MAX_DRAWN_LAWS)])
    for i, N in enumerate(sizes):
        runs = by_size[N]
        colour = scale(N) if scale else palette[i % 3]
        axes.plot(
            [o.C for o in runs],
            [o.loss for o in runs],
            "o" if scale else "osD^v"[i // 3 % 5],
            color=colour,
            label=None if scale else f"N = {_abbreviate(N)}",
        )
        if N not in drawn_laws:
            continue
        C = np.geomspace(runs[0].C / 1.5, runs[-1].C * 1.5, 60)
        losses = [fit.loss(N, c / (6 * N)) for c in C]
        axes.plot(C, losses, color=colour, linewidth=0.8, alpha=0.7)
    computes = [o.C for o in analysis.runs]
    C = np.geomspace(min(computes), max(computes) * 6, 100)
    axes.plot(
        C,
        [fit.optimal_loss(c) for c in C],
        "--",
        color=colours.ink,
        linewidth=1.6,
        label="frontier of the fit",
    )
    if analysis.extrapolation:
        _add_extrapolation(axes, analysis.extrapolation, colours)
    axes.set(xscale="log", yscale="log", xlabel="training compute, FLOPs (6 N D)")
    _format_losses(axes)
    axes.xaxis.label.set_color(colours.ink)
    add_legend(axes, colours)
    return figure


def _add_extrapolation(axes: Axes, forecast: Forecast, colours: Palette) -> None:
    """Draw the loss that was predicted for a larger run, and its loss after training."""
    predicted = forecast.predicted
    errors = [[predicted.value - predicted.ci_low], [predicted.ci_high - predicted.value]]
    axes.errorbar(
        forecast.run.C,
        predicted.value,
        errors,
        fmt="none",
        color=colours.ink,
        capsize=5,
        label="predicted before training (95%)",
    )
    axes.plot(
        [forecast.run.C],
        [forecast.run.loss],
        "*",
        color=colours.ink,
        markersize=12,
        label="its loss after training",
    )


def _add_colour_bar(
    figure: Figure, axes: Axes, values: Sequence[float], label: str, colours: Palette
) -> Callable[[float], str]:
    """Add a colour bar of ascending values, in place of a legend; returns the colour of a value."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_hex

    norm, colormap = LogNorm(values[0], values[-1]), colormaps["viridis"].reversed()
    mappable = ScalarMappable(norm, colormap)
    bar = figure.colorbar(mappable, ax=axes, pad=0.02)
    bar.set_label(label, color=colours.ink)
    ticks = np.geomspace(values[0], values[-1], 5).tolist()
    bar.set_ticks(ticks, labels=[_abbreviate(tick) for tick in ticks])
    bar.minorticks_off()
    assert bar.solids is not None
    bar.solids.set_rasterized(False)  # vectors in the page, not an image inside the SVG
    bar.solids.set_edgecolor("face")
    bar.ax.tick_params(colors=colours.ink, labelsize=9)
    return lambda N: to_hex(colormap(float(norm(N))))


def draw_isoflop(analysis: Analysis, colours: Palette) -> Figure:
    """A figure of loss over size at equal compute, with the parabolas and their minima."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, "Loss against size at equal compute", analysis.measured, colours)
    runs: Sequence[Observation] = analysis.runs
    parabolas = fit_parabolas(runs)
    if len(parabolas) < 3:
        try:
            runs = isoflop.slices(isoflop.training_curves(runs))
            parabolas = fit_parabolas(runs)
        except InputError:
            runs, parabolas = [], []
    palette = (colours.train, colours.validation, colours.third)
    scale = None
    if len(parabolas) > MAX_LEGEND_SIZES:
        computes = [parabola.C for parabola in parabolas]
        scale = _add_colour_bar(figure, axes, computes, "training compute, FLOPs", colours)
    for i, parabola in enumerate(parabolas):
        colour = scale(parabola.C) if scale else palette[i % 3]
        style = "-" if scale else ("-", "--", ":")[i // 3 % 3]
        same_compute = [o for o in runs if math.isclose(o.C, parabola.C, rel_tol=0.1)]
        axes.plot(
            [o.N for o in same_compute],
            [o.loss for o in same_compute],
            "o" if scale else "osD"[i // 3 % 3],
            color=colour,
            label=None if scale else f"C = {parabola.C:.2g} FLOPs",
        )
        if parabola.is_inside:
            N = np.geomspace(parabola.sizes[0], parabola.sizes[-1], 60)
            axes.plot(N, [parabola.loss(n) for n in N], color=colour, linestyle=style)
            axes.plot(
                [parabola.N_opt],
                [parabola.lowest],
                "*",
                color=colour,
                markersize=13,
                markeredgecolor=colours.ink,
            )
    axes.set(xscale="log", xlabel="parameters N; a star is the best size")
    _format_sizes(axes)
    axes.xaxis.label.set_color(colours.ink)
    if parabolas and not scale:
        add_legend(axes, colours)
    return figure


def draw_residuals(analysis: Analysis, colours: Palette) -> Figure:
    """A figure of each run's loss relative to the law, over compute."""
    from matplotlib.figure import Figure

    fit, sizes = analysis.bootstrap.fit, sorted({o.N for o in analysis.runs})
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, "Residuals", "loss above the law, %", colours)
    scale = _add_colour_bar(figure, axes, sizes, "parameters N", colours)
    residuals = [100 * (run.loss / fit.loss(run.N, run.D) - 1) for run in analysis.runs]
    axes.scatter(
        [run.C for run in analysis.runs], residuals, 25, [scale(run.N) for run in analysis.runs]
    )
    for outlier in analysis.quality.outliers:
        axes.plot(
            [outlier.run.C],
            [100 * outlier.residual],
            "o",
            markerfacecolor="none",
            markeredgecolor=colours.ink,
            markersize=10,
        )
    axes.axhline(0, color=colours.ink, linewidth=0.8)
    axes.set(xscale="log", xlabel="training compute, FLOPs; a ring is a run far from the law")
    axes.xaxis.label.set_color(colours.ink)
    return figure


def draw_size_law(analysis: Analysis, colours: Palette) -> Figure:
    """A figure of loss over size at equal tokens, with fitted laws and Kaplan's slope."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    runs = analysis.equal_tokens
    sizes, losses = [o.N for o in runs], [o.loss for o in runs]
    style_axes(
        axes,
        f"Loss against size at {runs[0].D:.3g} tokens",
        analysis.measured,
        colours,
    )
    axes.plot(sizes, losses, "o", color=colours.train, label="runs, or interpolated between runs")
    N = np.geomspace(min(sizes) / 1.2, max(sizes) * 1.5, 60)
    line_colours = (colours.validation, colours.third)
    for law, colour, style in zip(analysis.size_laws, line_colours, ("-", "--")):
        floor = f"{law.E:.2f} + " if law.E >= 5e-3 else ""
        label = f"{floor}{law.k:.3g} / N^{law.alpha.value:.3f}, R² {law.r2:.4f}"
        axes.plot(N, [law.loss(n) for n in N], style, color=colour, label=label)
    axes.plot(
        N,
        losses[0] * (N / sizes[0]) ** -KAPLAN_EXPONENT,
        ":",
        color=colours.ink,
        label=f"Kaplan's slope, {KAPLAN_EXPONENT}",
    )
    axes.set(xscale="log", yscale="log", xlabel="parameters N")
    _format_sizes(axes)
    _format_losses(axes)
    axes.xaxis.label.set_color(colours.ink)
    add_legend(axes, colours)
    return figure


def _format_losses(axes: Axes) -> None:
    """Label a logarithmic y axis with 1.5, not with 1.5 x 10^0."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _abbreviate(parameters: float) -> str:
    """A number of parameters or FLOPs in a legend: 20k, 1.5M, 1e+18."""
    if parameters >= 1e12:
        return f"{parameters:.0e}"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return f"{parameters:.3g}"


def _format_sizes(axes: Axes) -> None:
    """Label a logarithmic x axis with 20k, 50k, 100k."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
