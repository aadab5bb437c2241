"""The figures of an ablation: differences from the baseline, and training curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glasslm.lab.studies.ablation import BASELINE, Plan, VariantResult
from glasslm.lab.studies.ablation_axes import MATCH_LABELS
from glasslm.lab.studies.measures import MEASURES
from glasslm.report.figures import Palette, add_legend, style_axes
from glasslm.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = {
    "better": "o",
    "worse": "s",
    "same": "D",
    "not distinguishable": "D",
    "diverged": "X",
    "not tested": "D",
}
LINE_STYLES = ("-", "--", ":", "-.")


def draw_bars(plan: Plan, results: Sequence[VariantResult], colours: Palette) -> Figure:
    """A figure of the differences from the baseline, with 95% intervals.

    A filled marker is distinguishable from the baseline.
    """
    from matplotlib.figure import Figure

    variant_results = list(reversed(results[1:]))
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(variant_results)), layout="constrained")
    axes = figure.add_subplot()
    label = f"{MATCH_LABELS[plan.spec.match]}, {plural(plan.spec.seeds, 'seed')}"
    measure = MEASURES[plan.spec.measure]
    style_axes(axes, f"{measure.title} against the baseline's, {label}", "", colours)
    axes.axvline(0, color=colours.ink, linewidth=1)
    axis_colours = {axis: _line_style(i, colours)[0] for i, axis in enumerate(plan.axes)}
    for y, result in enumerate(variant_results):
        comparison, colour = result.comparison, axis_colours[result.axis]
        if comparison is None or comparison.delta is None:
            reason = "diverged" if comparison and comparison.diverged else "no difference to show"
            axes.text(0, y, f"  {reason}", color=colour, va="center")
            continue
        if comparison.ci_low is not None and comparison.ci_high is not None:
            axes.plot([comparison.ci_low, comparison.ci_high], [y, y], color=colour, linewidth=2)
        kind = result.verdict.kind if result.verdict else "not tested"
        fill = colour if kind in ("better", "worse") else "none"
        axes.plot(
            [comparison.delta], [y], MARKERS[kind], color=colour, markerfacecolor=fill, markersize=7
        )
    axes.set_yticks(range(len(variant_results)), [result.name for result in variant_results])
    axes.set_xlabel(f"{measure.axis}, below zero is better (95% intervals)", color=colours.ink)
    axes.set_ylim(-0.7, len(variant_results) - 0.3)
    return figure


def draw_curves(plan: Plan, results: Sequence[VariantResult], colours: Palette) -> Figure:
    """A figure of the validation loss over training tokens, with a panel for each axis."""
    from matplotlib.figure import Figure

    columns = min(3, len(plan.axes))
    rows = -(-len(plan.axes) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    for position, axis in enumerate(plan.axes, 1):
        axes = figure.add_subplot(rows, columns, position)
        is_leftmost = position % columns == 1 or columns == 1
        style_axes(axes, axis.capitalize(), "nats per token" if is_leftmost else "", colours)
        panel_results = [results[0], *(result for result in results if result.axis == axis)]
        for i, result in enumerate(panel_results):
            is_baseline = result.axis == BASELINE
            colour, style = (colours.ink, "-") if is_baseline else _line_style(i - 1, colours)
            label = "baseline" if is_baseline else result.value
            x, y = _mean_curve(result)
            axes.plot(x, y, color=colour, linestyle=style, linewidth=1.6, label=label)
        axes.set_xlabel(
            f"million training tokens, {MATCH_LABELS[plan.spec.match]}", color=colours.ink
        )
        add_legend(axes, colours)
    return figure


def _line_style(i: int, colours: Palette) -> tuple[str, str]:
    """Colour and dashes of the i-th line: three colours, each with up to four dashes."""
    palette = (colours.train, colours.validation, colours.third)
    return palette[i % 3], LINE_STYLES[i // 3 % 4]


def _mean_curve(result: VariantResult) -> tuple[list[float], list[float]]:
    """Millions of tokens and mean validation losses, at the steps where all seeds have a loss.

    The untrained model is left out: its loss would flatten all curves. The last loss is measured on
    the whole validation text, the others on a sample of it.
    """
    step_tokens = result.config.tokens_per_step
    curves = []
    for trial in result.trials:
        history = trial.run.history
        points = zip(history.eval_steps, history.val_losses)
        curves.append(
            {step * step_tokens / 1e6: loss for step, loss in points if step and loss is not None}
        )
    x = sorted(set.intersection(*(set(curve) for curve in curves)))
    return x, [statistics.mean(curve[tokens] for curve in curves) for tokens in x]
