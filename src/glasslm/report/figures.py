"""The figures of a report and of `glasslm check`, drawn with matplotlib's objects: as PNG files, and as SVG in the
colours of a report's page.

Only fixed words are drawn; text of a run's own (names, prompts) could lack a glyph.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.runs.history import History, loss_range
from glasslm.runs.metrics import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Array = NDArray[np.float64]


class Palette(NamedTuple):
    ink: str
    faint: str
    train: str
    validation: str
    third: str


# Okabe and Ito's colours, told apart by colour-blind readers; the SVG's are stand-ins that become CSS variables
ON_WHITE = Palette(
    ink="#222222", faint="#9a9a9a", train="#0072b2", validation="#d55e00", third="#009e73"
)
VARIABLES = Palette(
    ink="#010101", faint="#020202", train="#030303", validation="#040404", third="#050505"
)


def training(history: History, grad_clip: float, colours: Palette) -> Figure:
    """Two by two: training loss raw and smoothed, validation loss with its best, learning rate, gradient norm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), layout="constrained")
    (train, validation), (rate, norm) = figure.subplots(2, 2, sharex=True)
    steps, losses = as_array(history.steps), as_array(history.train_losses)
    lrs, norms = as_array(history.lrs), as_array(history.grad_norms)
    window = max([0, *history.steps]) / 50
    smoothed = mean_around(steps, losses, before=window, after=window)
    raw: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.8, "label": "each logged step"}

    dress(train, "Training loss", "nats per token", colours)
    train.plot(steps, losses, color=colours.train, **raw)
    train.plot(steps, smoothed, color=colours.train, linewidth=1.8, label="smoothed")

    dress(validation, "Validation loss", "nats per token", colours)
    validation.plot(
        steps, smoothed, color=colours.train, alpha=0.6, linewidth=1, label="training, smoothed"
    )
    _validation(validation, history, colours)
    points = [*zip(history.eval_steps, as_array(history.val_losses)), *zip(history.steps, losses)]
    if np.isfinite([loss for _, loss in points]).any():
        validation.set_ylim(*loss_range(points))

    dress(rate, "Learning rate", "per update", colours)
    rate.plot(steps, lrs, color=colours.third, linewidth=1.8)

    dress(norm, "Gradient norm before clipping", "global L2 norm", colours)
    norm.plot(steps, norms, color=colours.third, **raw)
    mean = mean_around(steps, norms, before=99, after=0)
    norm.plot(steps, mean, color=colours.third, linewidth=1.8, label="mean of the last 100 steps")
    if grad_clip and np.nanmax([0.0, *norms]) > grad_clip / 2:
        norm.axhline(
            grad_clip, color=colours.faint, linestyle="--", linewidth=1, label="clipped above"
        )

    for axes in (rate, norm):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=colours.ink)
    for axes in (train, validation, rate, norm):
        finish(axes, colours)
    return figure


def _validation(axes: Axes, history: History, colours: Palette) -> None:
    """One point a step: the last measurement there, on the whole split where there is one."""
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
        history.best_step, history.best_val_loss, "*", color=colours.validation, markersize=15, zorder=5, clip_on=False,
        markeredgecolor=colours.ink, markeredgewidth=0.6,
        label=f"best: {history.best_val_loss:.4f} at step {history.best_step:,}",
    )  # fmt: skip


def forgetting(lines: Sequence[Line], colours: Palette) -> Figure | None:
    """Bits per byte of the new text and of the old one, by step; None where no old text was measured."""
    from matplotlib.figure import Figure

    evals = {split: [line for line in lines if line["kind"] == "eval" and line.get("split", "val") == split]
             for split in ("val", "old")}  # fmt: skip
    if not evals["old"]:
        return None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    dress(axes, "What was learnt, and what was forgotten", "bits per byte", colours)
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
    finish(axes, colours)
    return figure


def experts(lines: Sequence[Line], colours: Palette) -> Figure | None:
    """The share of the tokens' choices that each expert of each layer got, by step; None without experts."""
    from matplotlib.figure import Figure

    steps = [line for line in lines if line["kind"] == "step" and line.get("experts")]
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
        dress(axes, f"Layer {layer}", "share of the choices" if layer % 4 == 0 else "", colours)
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


def dress(axes: Axes, title: str, unit: str, colours: Palette) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=colours.ink)
    axes.set_ylabel(unit, color=colours.ink)
    axes.patch.set_alpha(0)
    axes.grid(color=colours.faint, alpha=0.3, linewidth=0.6)
    axes.tick_params(colors=colours.ink, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours.faint)


def finish(axes: Axes, colours: Palette) -> None:
    """A legend where several things are drawn; a word where there is nothing to draw."""
    if not any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axes.lines):
        axes.set(xticks=[], yticks=[])
        axes.text(
            0.5, 0.5, "nothing to draw", color=colours.faint, ha="center", transform=axes.transAxes
        )
    elif len(axes.lines) > 1:
        axes.legend(frameon=False, labelcolor=colours.ink, fontsize=9, loc="best")


def mean_around(steps: Array, values: Array, before: float, after: float) -> Array:
    """For each step s the mean of the finite values in [s - before, s + after]; NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.searchsorted(steps, steps - before, side="left")
    end = np.searchsorted(steps, steps + after, side="right")
    found = counts[end] - counts[first]
    return np.where(found > 0, (sums[end] - sums[first]) / np.maximum(found, 1), np.nan)


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def inline_svg(figure: Figure, label: str) -> str:
    """A figure drawn in VARIABLES as an <svg> element for a page that defines --ink, --faint, --train and so on."""
    file = io.StringIO()
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg.split(">", 1)[0])
        + ">"
        + svg.split(">", 1)[1]
    )
    for name, colour in VARIABLES._asdict().items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def as_array(values: Sequence[float | None]) -> Array:
    """Numbers of metrics lines; null, which stands for a non-finite one, becomes NaN."""
    return np.array([np.nan if value is None else value for value in values], np.float64)
