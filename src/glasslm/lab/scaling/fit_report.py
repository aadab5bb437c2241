"""A scaling law fitted to a table of runs, with all that is needed to doubt it: text, figures, fit.json and a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glasslm import files
from glasslm.errors import InputError
from glasslm.lab.scaling import isoflop
from glasslm.lab.scaling.checks import (
    Backtest,
    Bootstrap,
    Forecast,
    Variation,
    backtest,
    bootstrap,
    sensitivity,
)
from glasslm.lab.scaling.isoflop import KAPLAN, Frontier, SizeLaw
from glasslm.lab.scaling.law import Interval, Observation
from glasslm.lab.scaling.plan import Plan
from glasslm.report import figures, page
from glasslm.report.figures import Palette, dress, finish
from glasslm.report.page import Picture, Section
from glasslm.runs.metrics import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Analysis:
    """What a table of runs says. `why` tells for what could not be made the reason."""

    runs: list[Observation]
    boot: Bootstrap
    backtest: Backtest | None
    variations: list[Variation]
    frontiers: list[Frontier]  # approaches 1, 2 and 3, as far as they could be used
    equal: list[Observation]  # sizes at one number of tokens
    size_laws: list[
        SizeLaw
    ]  # through these: a power law alone, and where they are enough one above a floor
    why: list[str]
    beyond: Forecast | None = None  # a larger run, predicted before it was trained


def analyse(runs: Sequence[Observation]) -> Analysis:
    """All of it. Raises InputError where the runs are too few for a law at all."""
    boot = bootstrap(runs)
    why: list[str] = list(boot.fit.warnings)
    frontiers: list[Frontier] = []
    for approach in (_envelope, _isoflop):
        try:
            frontiers.append(approach(runs))
        except InputError as error:
            why.append(str(error))
    tested: Backtest | None = None
    equal = isoflop.at_equal_tokens(runs)
    size_laws: list[SizeLaw] = []
    try:
        tested = backtest(runs)
    except InputError as error:
        why.append(f"No backtest: {error}")
    try:
        size_laws.append(isoflop.size_law(equal))
        if len(equal) >= 5:
            size_laws.append(isoflop.size_law(equal, floor=True))
    except InputError as error:
        why.append(f"No law of size alone: {error}")
    why += [f"{one.approach}: {warning}" for one in frontiers for warning in one.warnings]
    why += [f"size alone: {warning}" for warning in (size_laws[0].warnings if size_laws else ())]
    frontiers.append(isoflop.parametric(boot))
    return Analysis(list(runs), boot, tested, sensitivity(runs), frontiers, equal, size_laws, why)


def _envelope(runs: Sequence[Observation]) -> Frontier:
    return isoflop.envelope(isoflop.curves_of(runs))


def _isoflop(runs: Sequence[Observation]) -> Frontier:
    """Of the runs themselves where they were planned so, else read off the curves of a grid."""
    found = isoflop.parabolas(runs)
    if len(found) >= 3:
        return isoflop.isoflop(found)
    return isoflop.isoflop(isoflop.parabolas(isoflop.slices(isoflop.curves_of(runs))))


def as_json(found: Analysis) -> dict[str, Any]:
    """fit.json."""
    fit = found.boot.fit
    parameters = {name: _interval(value) for name, value in found.boot.parameters().items()}
    tested = found.backtest
    return plain(
        {
            **parameters,
            "objective": fit.objective,
            "delta": fit.delta,
            "n": fit.n,
            "cells": fit.cells,
            "residual_sd": fit.residual_sd,
            "largest_C": fit.largest_C,
            "backtest_error": tested.error if tested else None,
            "backtest_inside": f"{tested.inside} of {len(tested.forecasts)}" if tested else None,
            "beyond": _forecast(found.beyond) if found.beyond else None,
            "size_alone": [
                {"alpha": _interval(law.alpha), "k": law.k, "E": law.E, "r2": law.r2}
                for law in found.size_laws
            ],
            "approaches": {
                one.approach: {"a": _interval(one.a), "k": one.k} for one in found.frontiers
            },
            "notes": found.why,
        }
    )


def _forecast(of: Forecast) -> dict[str, Any]:
    return {
        "N": of.run.N, "D": of.run.D, "C": of.run.C, "predicted": _interval(of.predicted), "loss": of.run.loss,
        "error": of.relative_error, "inside": of.inside,
    }  # fmt: skip


def _interval(value: Interval) -> dict[str, float]:
    return {"value": value.value, "ci_low": value.ci_low, "ci_high": value.ci_high}


def ranged(value: Interval, form: str = ".3g") -> str:
    """A number with its interval."""
    return f"{value.value:{form}} ({value.ci_low:{form}} to {value.ci_high:{form}})"


def sentences(found: Analysis) -> list[str]:
    """What the numbers say, the headline first."""
    said = []
    if one := found.beyond:
        times, off = one.run.C / found.boot.fit.largest_C, one.run.loss / one.predicted.value - 1
        said.append(
            f"Predicted before it was trained, with {times:.3g} times the largest compute of the fit: a loss of "
            f"{ranged(one.predicted, '.4f')} for N = {one.run.N:,.0f} on D = {one.run.D:,.0f} tokens. It ended with "
            f"{one.run.loss:.4f}, {abs(off):.2%} {'below' if off < 0 else 'above'} the prediction and "
            f"{'inside' if one.inside else 'outside'} its 95% interval."
        )
    if tested := found.backtest:
        said.append(
            f"Backtest: from the runs up to {tested.fit.largest_C:.3g} FLOPs, those of {tested.factor:.3g} times as "
            f"many were predicted with a mean error of {tested.error:.2%}; {tested.inside} of {len(tested.forecasts)} "
            "lie inside their 95% interval."
        )
    of = found.boot.parameters()
    said.append(
        f"L(N, D) = {of['E'].value:.4g} + {of['A'].value:.4g} / N^{of['alpha'].value:.3f} + {of['B'].value:.4g} / "
        f"D^{of['beta'].value:.3f}: alpha {ranged(of['alpha'])}, beta {ranged(of['beta'])}, E {ranged(of['E'])} (95%)."
    )
    exponents = ", ".join(f"{one.approach} {ranged(one.a)}" for one in found.frontiers)
    said.append(
        f"The optimal size grows as C^a; a by approach: {exponents}. {isoflop.disagreement(found.frontiers)}"
    )
    if found.size_laws:
        laws = " ".join(_size_law(law) for law in found.size_laws)
        said.append(
            f"Size alone, {len(found.equal)} sizes at {found.equal[0].D:.3g} tokens (read off between a size's "
            f"runs where it has none there): {laws} Kaplan's exponent is "
            f"{KAPLAN} (without embeddings, with more tokens than the models could use, on other text)."
        )
    return said + found.why


def _size_law(law: SizeLaw) -> str:
    floor = f"{law.E:.3f} + " if law.E >= 5e-4 else ""
    return f"L(N) = {floor}{law.k:.3g} / N^alpha with alpha {ranged(law.alpha)}, R^2 {law.r2:.4f}."


def text(found: Analysis) -> str:
    rows = [
        f"  {name:<6} {ranged(value, '.4g')}" for name, value in found.boot.parameters().items()
    ]
    return "\n".join(
        [f"{len(found.runs)} runs, {found.boot.fit.cells} cells", *rows, "", *sentences(found)]
    )


def plan_text(made: Plan) -> str:
    """Which N and D for a compute."""
    lines = [f"for {made.C:.3g} FLOPs:"]
    for name, choice in (("20 tokens a parameter", made.rule), ("by the fit", made.fitted)):
        if choice is not None:
            loss = f", loss {ranged(choice.loss, '.4g')}" if choice.loss else ""
            ratio = choice.tokens_per_parameter
            lines.append(
                f"  {name:<22} N = {choice.N:.3g}, D = {choice.D:.3g} ({ratio:.3g} tokens a parameter){loss}"
            )
    if made.N_opt:
        lines.append(f"  the fit's N with its interval: {ranged(made.N_opt)}")
    return "\n".join([*lines, *([made.banner] if made.banner else [])])


def write(folder: Path, found: Analysis, title: str, further: Sequence[Section] = ()) -> Path:
    """fit.json, scaling_curve.png, isoflop.png and report.html/.md; returns the path of the page.

    `further` sections come after what the numbers say.
    """
    files.make_folder(folder)
    files.write_json(folder / "fit.json", as_json(found))
    for name, draw in (("scaling_curve", curve), ("isoflop", slices), ("size_law", size_curve)):
        files.write_atomic(folder / f"{name}.png", figures.png(draw(found, figures.ON_WHITE)))
    lead = f"{len(found.runs)} runs of {found.boot.fit.cells} cells, up to {found.boot.fit.largest_C:.3g} FLOPs."
    first, *others = sections(found)
    return page.write(folder, "report", title, lead, [first, *further, *others])


def sections(found: Analysis) -> list[Section]:
    of = found.boot.parameters()
    tested = found.backtest
    largest = found.boot.fit.largest_C
    computes = (largest / 10, largest, largest * 4)
    forecasts = [
        (f"{f.run.N:.3g}", f"{f.run.D:.3g}", f"{f.run.loss:.4f}", ranged(f.predicted, ".4f"),
         f"{f.relative_error:+.2%}", "inside" if f.inside else "outside")
        for f in (tested.forecasts if tested else ())
    ]  # fmt: skip
    leaning = [
        (
            one.changed,
            *(
                [f"{x:.3f}" for x in (one.law.alpha, one.law.beta, one.law.a)]
                if one.law
                else [""] * 3
            ),
            one.reason,
        )
        for one in found.variations
    ]
    return [
        Section("What the numbers say", sentences(found)),
        Section("The law", (), ("parameter", "value and 95% interval"), [(n, ranged(v, ".4g")) for n, v in of.items()],
                (Picture("scaling_curve", "Losses against compute, the fitted law for each size and its frontier",
                         lambda colours: curve(found, colours)),)),
        Section("Three approaches", (
            "N_opt = k C^a: by the envelope of the runs (1), by parabolas at equal compute (2), by the fitted law (3). "
            "Where their intervals do not meet, that is a result.",
        ), ("approach", "a and 95% interval", "k", "optima", *(f"N_opt at {C:.2g} FLOPs" for C in computes)),
            [(one.approach, ranged(one.a), f"{one.k:.3g}", f"{len(one.points) or ''}",
              *(f"{one.N_opt(C):,.0f}" for C in computes)) for one in found.frontiers]),
        Section("Size alone", [_size_law(law) for law in found.size_laws], pictures=(
            Picture("size_law", "Loss against size at equal tokens, with a power law alone and one above a floor",
                    lambda colours: size_curve(found, colours)),) if found.size_laws else ()),
        Section("The largest runs, predicted from the others", (),
                ("N", "D", "loss", "predicted", "error", ""), forecasts),
        Section("What the fit leans on", ("The same fit with another delta, or with one size or budget left out.",),
                ("changed", "alpha", "beta", "a", ""), leaning),
        Section("IsoFLOP", pictures=(Picture("isoflop", "Loss against size for each compute",
                                             lambda colours: slices(found, colours)),)),
        Section("All runs", (), ("N", "D", "C", "loss", "by the fit"),
                [(f"{o.N:.4g}", f"{o.D:.4g}", f"{o.C:.3g}", f"{o.loss:.4f}", f"{found.boot.fit.loss(o.N, o.D):.4f}")
                 for o in sorted(found.runs, key=lambda o: o.C)]),
    ]  # fmt: skip


def curve(found: Analysis, colours: Palette) -> Figure:
    """Loss over compute: the runs, the law of each size, and the lowest loss that the law allows."""
    from matplotlib.figure import Figure

    fit, sizes = found.boot.fit, sorted({o.N for o in found.runs})
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, "Loss against compute", "validation loss, nats a token", colours)
    hues = (colours.train, colours.validation, colours.third)
    for i, N in enumerate(sizes):
        runs = sorted((o for o in found.runs if o.N == N), key=lambda o: o.C)
        hue = hues[i % 3]
        axes.plot(
            [o.C for o in runs],
            [o.loss for o in runs],
            "osD^v"[i // 3 % 5],
            color=hue,
            label=f"N = {N:.3g}",
        )
        C = np.geomspace(runs[0].C / 1.5, runs[-1].C * 1.5, 60)
        axes.plot(C, [fit.loss(N, c / (6 * N)) for c in C], color=hue, linewidth=0.8, alpha=0.7)
    every = [o.C for o in found.runs]
    C = np.geomspace(min(every), max(every) * 6, 100)
    axes.plot(
        C,
        [fit.optimal_loss(c) for c in C],
        "--",
        color=colours.ink,
        linewidth=1.6,
        label="frontier of the fit",
    )
    if one := found.beyond:
        reach = [
            [one.predicted.value - one.predicted.ci_low],
            [one.predicted.ci_high - one.predicted.value],
        ]
        axes.errorbar(one.run.C, one.predicted.value, reach, fmt="none", color=colours.ink, capsize=5,
                      label="predicted before training (95%)")  # fmt: skip
        axes.plot(
            [one.run.C],
            [one.run.loss],
            "*",
            color=colours.ink,
            markersize=12,
            label="what it ended with",
        )
    axes.set(xscale="log", yscale="log", xlabel="training compute, FLOPs (6 N D)")
    _plain_losses(axes)
    axes.xaxis.label.set_color(colours.ink)
    finish(axes, colours)
    return figure


def slices(found: Analysis, colours: Palette) -> Figure:
    """Loss over size at equal compute, with the parabolas and their minima."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, "Loss against size at equal compute", "validation loss, nats a token", colours)
    runs: Sequence[Observation] = found.runs
    parabolas = isoflop.parabolas(runs)
    if len(parabolas) < 3:
        try:
            runs = isoflop.slices(isoflop.curves_of(runs))
            parabolas = isoflop.parabolas(runs)
        except InputError:
            runs, parabolas = [], []
    hues = (colours.train, colours.validation, colours.third)
    for i, one in enumerate(parabolas):
        hue, style = hues[i % 3], ("-", "--", ":")[i // 3 % 3]
        shown = [o for o in runs if math.isclose(o.C, one.C, rel_tol=0.1)]
        axes.plot(
            [o.N for o in shown],
            [o.loss for o in shown],
            "osD"[i // 3 % 3],
            color=hue,
            label=f"C = {one.C:.2g}",
        )
        if one.verdict in ("centred", "off-centre"):
            N = np.geomspace(one.sizes[0], one.sizes[-1], 60)
            axes.plot(
                N,
                one.lowest + one.curvature / 2 * np.log(N / one.N_opt) ** 2,
                color=hue,
                linestyle=style,
            )
            axes.plot(
                [one.N_opt],
                [one.lowest],
                "*",
                color=hue,
                markersize=13,
                markeredgecolor=colours.ink,
            )
    axes.set(xscale="log", xlabel="parameters N; a star is the best size")
    _plain_sizes(axes)
    axes.xaxis.label.set_color(colours.ink)
    finish(axes, colours)
    return figure


def size_curve(found: Analysis, colours: Palette) -> Figure:
    """Loss over size at equal tokens, both axes logarithmic, with the laws of size alone and Kaplan's slope."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    sizes, losses = [o.N for o in found.equal], [o.loss for o in found.equal]
    dress(
        axes,
        f"Loss against size at {found.equal[0].D:.3g} tokens",
        "validation loss, nats a token",
        colours,
    )
    axes.plot(sizes, losses, "o", color=colours.train, label="runs, or read off between them")
    N = np.geomspace(min(sizes) / 1.2, max(sizes) * 1.5, 60)
    for law, hue, style in zip(found.size_laws, (colours.validation, colours.third), ("-", "--")):
        floor = f"{law.E:.2f} + " if law.E >= 5e-3 else ""
        label = f"{floor}{law.k:.3g} / N^{law.alpha.value:.3f}, R² {law.r2:.4f}"
        axes.plot(N, [law.loss(n) for n in N], style, color=hue, label=label)
    axes.plot(
        N,
        losses[0] * (N / sizes[0]) ** -KAPLAN,
        ":",
        color=colours.ink,
        label=f"Kaplan's slope, {KAPLAN}",
    )
    axes.set(xscale="log", yscale="log", xlabel="parameters N")
    _plain_sizes(axes)
    _plain_losses(axes)
    axes.xaxis.label.set_color(colours.ink)
    finish(axes, colours)
    return figure


def _plain_losses(axes: Axes) -> None:
    """1.5 on a logarithmic axis, not 1.5 x 10^0."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _plain_sizes(axes: Axes) -> None:
    """20k, 50k, 100k on a logarithmic axis."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
