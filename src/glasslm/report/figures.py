"""The figures of a report, rendered as PNG files and as SVG in the colours of its page.

Figures contain fixed words only: a font may lack the characters of names and prompts.
`run_report.write` chooses which figures a report has.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.runs.history import History, loss_range
from glasslm.runs.metrics import Line, eval_lines, step_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Array = NDArray[np.float64]


class Palette(NamedTuple):
    """The colours of a figure, as #rrggbb."""

    ink: str
    faint: str
    train: str
    validation: str
    third: str


# The colours of Okabe and Ito, which colour-blind readers can distinguish. `inline_svg` replaces
# those of CSS_PALETTE by CSS variables.
PRINT_PALETTE = Palette(
    ink="#222222", faint="#9a9a9a", train="#0072b2", validation="#d55e00", third="#009e73"
)
CSS_PALETTE = Palette(
    ink="#010101", faint="#020202", train="#030303", validation="#040404", third="#050505"
)


def draw_training(history: History, grad_clip: float, colours: Palette) -> Figure:
    """Four plots: training loss, validation loss, learning rate, gradient norm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), layout="constrained")
    (train, validation), (rate, norm) = figure.subplots(2, 2, sharex=True)
    steps, losses = as_array(history.steps), as_array(history.train_losses)
    lrs, norms = as_array(history.lrs), as_array(history.grad_norms)
    window = max([0, *history.steps]) / 50
    smoothed = windowed_mean(steps, losses, before=window, after=window)
    raw: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.8, "label": "each logged step"}

    style_axes(train, "Training loss", "nats per token", colours)
    train.plot(steps, losses, color=colours.train, **raw)
    train.plot(steps, smoothed, color=colours.train, linewidth=1.8, label="smoothed")

    style_axes(validation, "Validation loss", "nats per token", colours)
    validation.plot(
        steps, smoothed, color=colours.train, alpha=0.6, linewidth=1, label="training, smoothed"
    )
    _validation(validation, history, colours)
    points = [*zip(history.eval_steps, as_array(history.val_losses)), *zip(history.steps, losses)]
    if np.isfinite([loss for _, loss in points]).any():
        validation.set_ylim(*loss_range(points))

    style_axes(rate, "Learning rate", "per update", colours)
    rate.plot(steps, lrs, color=colours.third, linewidth=1.8)

    style_axes(norm, "Gradient norm before clipping", "global L2 norm", colours)
    norm.plot(steps, norms, color=colours.third, **raw)
    mean = windowed_mean(steps, norms, before=99, after=0)
    norm.plot(steps, mean, color=colours.third, linewidth=1.8, label="mean of the last 100 steps")
    if grad_clip and np.nanmax([0.0, *norms]) > grad_clip / 2:
        norm.axhline(
            grad_clip, color=colours.faint, linestyle="--", linewidth=1, label="clipping threshold"
        )

    for axes in (rate, norm):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=colours.ink)
    for axes in (train, validation, rate, norm):
        add_legend(axes, colours)
    return figure


def _validation(axes: Axes, history: History, colours: Palette) -> None:
    """Plot one point per step: the last evaluation, which is on the whole split if there is one."""
    points = sorted(dict(zip(history.eval_steps, as_array(history.val_losses))).items())
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    axes.plot(
        steps,
        losses,
        "o-",
        color=colours.validation,
        markersize=3.5,
        linewidth=1.8,
        label="validation",
    )
    if history.best_step is None or history.best_val_loss is None:
        return
    axes.plot(
        history.best_step,
        history.best_val_loss,
        "*",
        color=colours.validation,
        markersize=15,
        zorder=5,
        clip_on=False,
        markeredgecolor=colours.ink,
        markeredgewidth=0.6,
        label=f"best: {history.best_val_loss:.4f} at step {history.best_step:,}",
    )


def draw_forgetting(lines: Sequence[Line], colours: Palette) -> Figure | None:
    """Bits per byte of the new and the old text, by step; None without evaluations of the old."""
    from matplotlib.figure import Figure

    evals = {split: eval_lines(lines, split)
             for split in ("val", "old")}  # fmt: skip
    if not evals["old"]:
        return None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "Learning and forgetting", "bits per byte", colours)
    styles = (
        ("val", "new text", "o-", colours.validation),
        ("old", "old text", "s--", colours.train),
    )
    for split, label, style, colour in styles:
        bpb = dict(
            zip(
                [line["step"] for line in evals[split]],
                as_array([line["bpb"] for line in evals[split]]),
            )
        )
        axes.plot(
            list(bpb),
            list(bpb.values()),
            style,
            color=colour,
            markersize=3.5,
            linewidth=1.8,
            label=label,
        )
    axes.set_xlabel("step", color=colours.ink)
    add_legend(axes, colours)
    return figure


def draw_expert_shares(lines: Sequence[Line], colours: Palette) -> Figure | None:
    """The share of the routed tokens of each expert in each layer; None without experts."""
    from matplotlib.figure import Figure

    steps = [line for line in step_lines(lines) if line.get("experts")]
    if not steps:
        return None
    shares = np.array([line["experts"] for line in steps])  # (steps, layers, E)
    layers, E = shares.shape[1:]
    figure = Figure(figsize=(10, 2.4 * -(-layers // 4)), layout="constrained")
    grid = figure.subplots(-(-layers // 4), min(layers, 4), sharex=True, sharey=True, squeeze=False)
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_axis_off()
            continue
        style_axes(axes, f"Layer {layer}", "share of the tokens" if layer % 4 == 0 else "", colours)
        axes.plot(
            [line["step"] for line in steps],
            shares[:, layer],
            color=colours.train,
            alpha=0.6,
            linewidth=1,
        )
        axes.axhline(1 / E, color=colours.validation, linestyle="--", linewidth=1.2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=colours.ink)
    return figure


def style_axes(axes: Axes, title: str, unit: str, colours: Palette) -> None:
    """Set title, y label and the style of grid, ticks and spines."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=colours.ink)
    axes.set_ylabel(unit, color=colours.ink)
    axes.patch.set_alpha(0)
    axes.grid(color=colours.faint, alpha=0.3, linewidth=0.6)
    axes.tick_params(colors=colours.ink, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours.faint)


def add_legend(axes: Axes, colours: Palette) -> None:
    """Add a legend to axes with several lines; write "no data" on axes without finite values."""
    if not any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axes.lines):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", color=colours.faint, ha="center", transform=axes.transAxes)
    elif len(axes.lines) > 1:
        axes.legend(frameon=False, labelcolor=colours.ink, fontsize=9, loc="best")


def windowed_mean(steps: Array, values: Array, before: float, after: float) -> Array:
    """For each step s the mean of the finite values in [s - before, s + after]; NaN for none.

    `steps` (N,) are in ascending order, `values` (N,) and the result (N,) belong to them.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.searchsorted(steps, steps - before, side="left")
    end = np.searchsorted(steps, steps + after, side="right")
    finite_counts = counts[end] - counts[first]
    return np.where(
        finite_counts > 0, (sums[end] - sums[first]) / np.maximum(finite_counts, 1), np.nan
    )


def png(figure: Figure) -> bytes:
    """A figure as a PNG file on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def inline_svg(figure: Figure, label: str) -> str:
    """A figure in CSS_PALETTE as an <svg> element for a page that defines --ink, --train ..."""
    file = io.StringIO()
    no_metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg.split(">", 1)[0])
        + ">"
        + svg.split(">", 1)[1]
    )
    for name, colour in CSS_PALETTE._asdict().items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def as_array(values: Sequence[float | None]) -> Array:
    """(N,) numbers of metrics lines; null, which stands for a non-finite number, becomes NaN."""
    return np.array([np.nan if value is None else value for value in values], np.float64)
