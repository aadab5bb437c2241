"""The curves of a run by step: as data, as figures, and as JSON for the script of report.html.

`draw_panels` draws with matplotlib. templates/curves.js draws the same panels in the browser, where
they can be hovered, zoomed and switched off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from glasslm.report.figures import (
    Array,
    Palette,
    add_legend,
    as_array,
    style_axes,
    windowed_mean,
)
from glasslm.runs.history import History, loss_range
from glasslm.runs.metrics import EvalLine, Line, StepLine, eval_lines, step_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = Literal["train", "validation", "third", "faint"]  # fields of figures.Palette
Style = Literal["line", "raw", "points", "dashed", "star"]

MAX_LEGEND_CURVES = 6
MAX_EMBEDDED_POINTS = 2000  # of a curve in report.html, which stays below about 500 kB


@dataclass(frozen=True)
class Curve:
    """Values by step. `steps` (N,) ascend, `values` (N,) have NaN for non-finite numbers."""

    label: str
    steps: Array
    values: Array
    colour: Colour
    style: Style = "line"


@dataclass(frozen=True)
class Panel:
    """Curves with a common axis: a title, the unit of the values, and limits where they matter."""

    title: str
    unit: str
    curves: Sequence[Curve]
    bounds: tuple[float, float] | None = None
    has_zero: bool = False  # the axis begins at 0


def training_panels(
    history: History, grad_clip: float, unit: str = "nats per token"
) -> list[Panel]:
    """Training loss, validation loss, learning rate and gradient norm of a run.

    `unit` is that of the losses.
    """
    steps, losses = as_array(history.steps), as_array(history.train_losses)
    norms = as_array(history.grad_norms)
    window = max([0, *history.steps]) / 50
    smoothed = windowed_mean(steps, losses, before=window, after=window)
    raw = "each logged step"
    norm_curves = [
        Curve(raw, steps, norms, "third", "raw"),
        Curve("mean of the last 100 steps", steps, windowed_mean(steps, norms, 99, 0), "third"),
    ]
    if grad_clip and np.nanmax([0.0, *norms]) > grad_clip / 2:
        level = np.full(len(steps), grad_clip)
        norm_curves.append(Curve("clipping threshold", steps, level, "faint", "dashed"))
    points = [*zip(history.eval_steps, as_array(history.val_losses)), *zip(history.steps, losses)]
    has_loss = bool(np.isfinite([loss for _, loss in points]).any())
    return [
        Panel(
            "Training loss",
            unit,
            [
                Curve(raw, steps, losses, "train", "raw"),
                Curve("smoothed", steps, smoothed, "train"),
            ],
        ),
        Panel(
            "Validation loss",
            unit,
            [
                Curve("training, smoothed", steps, smoothed, "train", "raw"),
                *_validation_curves(history),
            ],
            bounds=loss_range(points) if has_loss else None,
        ),
        Panel(
            "Learning rate",
            "per update",
            [Curve("learning rate", steps, as_array(history.lrs), "third")],
            has_zero=True,
        ),
        Panel("Gradient norm before clipping", "global L2 norm", norm_curves, has_zero=True),
    ]


def _validation_curves(history: History) -> list[Curve]:
    """One point per step: the last evaluation, which is on the whole split if there is one."""
    losses = dict(zip(history.eval_steps, as_array(history.val_losses)))
    steps = sorted(losses)
    values = np.array([losses[step] for step in steps])
    curves = [Curve("validation", np.array(steps, float), values, "validation", "points")]
    if history.best_step is not None and history.best_val_loss is not None:
        label = f"best: {history.best_val_loss:.4f} at step {history.best_step:,}"
        step, loss = np.array([float(history.best_step)]), np.array([history.best_val_loss])
        curves.append(Curve(label, step, loss, "validation", "star"))
    return curves


def forgetting_panels(lines: Sequence[Line]) -> list[Panel]:
    """Bits per byte of the new and the old text, by step; none without evaluations of the old."""
    if not eval_lines(lines, "old"):
        return []
    curves = []
    splits: tuple[tuple[Literal["val", "old"], str, Colour], ...] = (
        ("val", "new text", "validation"),
        ("old", "old text", "train"),
    )
    for split, label, colour in splits:
        evals = eval_lines(lines, split)
        bpb = dict(zip([line["step"] for line in evals], as_array([line["bpb"] for line in evals])))
        steps, values = np.array(list(bpb), float), np.array(list(bpb.values()))
        if not np.isfinite(values).any():  # preference tuning learns no new text
            continue
        curves.append(Curve(label, steps, values, colour, "points"))
    return [Panel("Learning and forgetting", "bits per byte", curves)]


REWARD_PANELS = (  # measure, title, unit; a run has those of its objective
    ("reward", "Reward", "mean of the answers"),
    ("accuracy", "Pairs with the preferred order", "share of the pairs"),
    ("margin", "Margin between the answers of a pair", "nats x beta"),
    ("chosen_nats", "Nats of the chosen answers", "nats per answer"),
    ("kl", "KL from the first weights", "nats per token"),
    ("entropy", "Entropy of the answers", "nats per token"),
    ("distinct", "Different answers", "share"),
)


def preference_panels(lines: Sequence[Line]) -> list[Panel]:
    """The measures of preference tuning, in training and held out; none in other runs."""
    tuned = [line for line in step_lines(lines) if "preference" in line]
    held_out = [line for line in eval_lines(lines) if "preference" in line]
    sources: tuple[tuple[str, Sequence[StepLine | EvalLine], Colour, Style], ...] = (
        ("training", tuned, "train", "line"),
        ("held out", held_out, "validation", "points"),
    )
    panels = []
    for name, title, unit in REWARD_PANELS:
        curves = []
        for label, source, colour, style in sources:
            points = [(line["step"], line["preference"][name]) for line in source
                      if name in line["preference"]]  # fmt: skip
            if points:
                steps, values = (
                    np.array([step for step, _ in points], float),
                    as_array([value for _, value in points]),
                )
                curves.append(Curve(label, steps, values, colour, style))
        if curves:
            panels.append(Panel(title, unit, curves, has_zero=name != "margin"))
    return panels


def expert_panels(lines: Sequence[Line]) -> list[Panel]:
    """The share of the routed tokens of each expert, a panel per layer; none without experts."""
    routed = [line for line in step_lines(lines) if line.get("experts")]
    if not routed:
        return []
    shares = np.array([line["experts"] for line in routed])  # (steps, layers, E)
    steps = np.array([line["step"] for line in routed], float)
    E = shares.shape[2]
    panels = []
    for layer in range(shares.shape[1]):
        experts = [
            Curve(f"expert {expert}", steps, shares[:, layer, expert], "train", "raw")
            for expert in range(E)
        ]
        even = Curve("an even share", steps, np.full(len(steps), 1 / E), "validation", "dashed")
        panels.append(
            Panel(f"Layer {layer}", "share of the tokens", [*experts, even], has_zero=True)
        )
    return panels


def draw_panels(panels: Sequence[Panel], colours: Palette) -> Figure:
    """The panels in two columns: one panel alone is wide, more than four are small."""
    from matplotlib.figure import Figure

    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 4
    rows = -(-len(panels) // columns)
    size = (8.0, 3.6) if columns == 1 else (10.0, (3.1 if columns == 2 else 2.4) * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_axis_off()
            continue
        _draw_panel(axes, panels[index], colours)
        if index + columns >= len(panels):
            axes.set_xlabel("step", color=colours.ink)
            axes.tick_params(labelbottom=True)
    return figure


def _draw_panel(axes: Axes, panel: Panel, colours: Palette) -> None:
    style_axes(axes, panel.title, panel.unit, colours)
    for curve in panel.curves:
        colour = getattr(colours, curve.colour)
        styles: dict[Style, dict[str, Any]] = {
            "line": {"linewidth": 1.8},
            "raw": {"alpha": 0.4, "linewidth": 0.8},
            "points": {"marker": "o", "markersize": 3.5, "linewidth": 1.8},
            "dashed": {"linestyle": "--", "linewidth": 1.2},
            "star": {"marker": "*", "markersize": 15, "linestyle": "", "clip_on": False}
            | {"zorder": 5, "markeredgecolor": colours.ink, "markeredgewidth": 0.6},
        }
        axes.plot(curve.steps, curve.values, color=colour, label=curve.label, **styles[curve.style])
    if panel.bounds:
        axes.set_ylim(*panel.bounds)
    elif panel.has_zero:
        axes.set_ylim(bottom=0)
    if len(panel.curves) <= MAX_LEGEND_CURVES:
        add_legend(axes, colours)


def panels_json(panels: Sequence[Panel]) -> str:
    """The panels for templates/curves.js, as JSON that is safe inside a <script> element."""
    data = [
        {
            "title": panel.title,
            "unit": panel.unit,
            "bounds": panel.bounds,
            "zero": panel.has_zero,
            "curves": [_curve_data(curve) for curve in panel.curves],
        }
        for panel in panels
    ]
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _curve_data(curve: Curve) -> dict[str, Any]:
    indices = thin_indices(curve.values, MAX_EMBEDDED_POINTS)
    return {
        "label": curve.label,
        "colour": curve.colour,
        "style": curve.style,
        "x": [float(f"{step:.9g}") for step in curve.steps[indices]],
        "y": [float(f"{v:.5g}") if math.isfinite(v) else None for v in curve.values[indices]],
    }


def thin_indices(values: Array, limit: int) -> NDArray[np.int64]:
    """Indices of at most `limit` of the values (N,), with the extremes of each stretch."""
    if len(values) <= limit:
        return np.arange(len(values))
    indices = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), limit // 2 - 1):
        finite = stretch[np.isfinite(values[stretch])]
        if len(finite):
            indices |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
    return np.array(sorted(indices))
