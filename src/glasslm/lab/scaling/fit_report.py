"""The report of a fitted scaling law: sentences, tables and figures, with what limits each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glasslm import files
from glasslm.lab.scaling import isoflop
from glasslm.lab.scaling.analysis import Analysis, to_json
from glasslm.lab.scaling.fit_figures import (
    draw_isoflop,
    draw_residuals,
    draw_scaling_curve,
    draw_size_law,
)
from glasslm.lab.scaling.isoflop import KAPLAN_EXPONENT, SizeLaw
from glasslm.lab.scaling.law import Interval
from glasslm.lab.scaling.plan import ComputePlan
from glasslm.report import figures, page
from glasslm.report.page import Picture, Section

FIGURES = {
    "scaling_curve": draw_scaling_curve,
    "isoflop": draw_isoflop,
    "size_law": draw_size_law,
    "residuals": draw_residuals,
}


def write(folder: Path, analysis: Analysis, title: str, further: Sequence[Section] = ()) -> Path:
    """Write fit.json, the figures and report.html/.md; returns the path of report.html.

    `further` sections come after the first section.
    """
    files.make_folder(folder)
    files.write_json(folder / "fit.json", to_json(analysis))
    for name, draw in FIGURES.items():
        figure = draw(analysis, figures.PRINT_PALETTE)
        files.write_atomic(folder / f"{name}.png", figures.png(figure))
    fit = analysis.bootstrap.fit
    lead = f"{len(analysis.runs)} runs of {fit.cells} cells, up to {fit.largest_C:.3g} FLOPs."
    first, *others = sections(analysis)
    return page.write(folder, "report", title, lead, [first, *further, *others])


def format_interval(interval: Interval, form: str = ".3g") -> str:
    """A number with its interval as text."""
    return f"{interval.value:{form}} ({interval.ci_low:{form}} to {interval.ci_high:{form}})"


def sentences(analysis: Analysis) -> list[str]:
    """The results in sentences, the most important first, and the notes."""
    fit = analysis.bootstrap.fit
    result = [analysis.quality.sentence]
    if forecast := analysis.extrapolation:
        run, predicted = forecast.run, forecast.predicted
        deviation = run.loss / predicted.value - 1
        result.append(
            f"Predicted before training, with {run.C / fit.largest_C:.3g} times the largest "
            f"compute of the fit: a loss of {format_interval(predicted, '.4f')} for N = "
            f"{run.N:,.0f} on D = {run.D:,.0f} tokens. The loss after training is {run.loss:.4f}, "
            f"{abs(deviation):.2%} {'below' if deviation < 0 else 'above'} the prediction and "
            f"{'inside' if forecast.is_inside else 'outside'} its 95% interval."
        )
    if tested := analysis.backtest:
        result.append(
            f"Backtest: from the runs up to {tested.fit.largest_C:.3g} FLOPs, the runs with "
            f"{tested.factor:.3g} times this compute are predicted with a mean error of "
            f"{tested.error:.2%}; {tested.inside_count} of {len(tested.forecasts)} are inside "
            f"their 95% interval.{_shorter_backtests(analysis)}"
        )
    p = analysis.bootstrap.parameters()
    result.append(
        f"L(N, D) = {p['E'].value:.4g} + {p['A'].value:.4g} / N^{p['alpha'].value:.3f} + "
        f"{p['B'].value:.4g} / D^{p['beta'].value:.3f}: alpha {format_interval(p['alpha'])}, "
        f"beta {format_interval(p['beta'])}, E {format_interval(p['E'])} (95%). Fitted by "
        f"{fit.method}."
    )
    if fit.equal_exponents:
        result.append(_over_training_form(analysis))
    ratio = analysis.bootstrap.interval(
        lambda law: law.tokens_per_parameter(fit.largest_C), log=True
    )
    result.append(
        f"At {fit.largest_C:.3g} FLOPs, the largest compute, {format_interval(ratio)} tokens per "
        "parameter are optimal."
    )
    exponents = ", ".join(
        f"{frontier.approach} {format_interval(frontier.a)}" for frontier in analysis.frontiers
    )
    result.append(
        f"The optimal size grows as C^a; a by approach: {exponents}. "
        f"{isoflop.disagreement(analysis.frontiers)}"
    )
    if analysis.size_laws:
        runs = analysis.equal_tokens
        laws = " ".join(_format_size_law(law) for law in analysis.size_laws)
        result.append(
            f"Size alone, {len(runs)} sizes at {runs[0].D:.3g} tokens (interpolated between the "
            f"runs of a size that has none there): {laws} Kaplan's exponent is {KAPLAN_EXPONENT} "
            "(without embeddings, with more tokens than the models could use, on other text)."
        )
    return result + analysis.notes


def _over_training_form(analysis: Analysis) -> str:
    """The law with equal exponents in compute and tokens per parameter, as a sentence."""
    fit = analysis.bootstrap.fit
    eta = analysis.bootstrap.interval(lambda law: law.alpha / 2, log=True)
    a, b = (term * 6**fit.eta for term in (fit.A, fit.B))
    return (
        f"In C and M = D / N: L = {fit.E:.4g} + ({a:.4g} M^eta + {b:.4g} M^-eta) C^-eta with eta = "
        f"alpha / 2 = {format_interval(eta)} (Gadre et al. 2024, arXiv:2403.08540)."
    )


def _shorter_backtests(analysis: Analysis) -> str:
    """The errors at shorter horizons as a sentence, or ""."""
    shorter = [f"{test.error:.2%} at {test.factor:.3g} times" for test in analysis.backtests[:-1]]
    return f" Shorter horizons: {', '.join(shorter)}." if shorter else ""


def _format_size_law(law: SizeLaw) -> str:
    floor = f"{law.E:.3f} + " if law.E >= 5e-4 else ""
    exponent = format_interval(law.alpha)
    return f"L(N) = {floor}{law.k:.3g} / N^alpha with alpha {exponent}, R^2 {law.r2:.4f}."


def summary(analysis: Analysis) -> str:
    """The results as text for the terminal."""
    parameters = [
        f"  {name:<6} {format_interval(interval, '.4g')}"
        for name, interval in analysis.bootstrap.parameters().items()
    ]
    verdict, *others = sentences(analysis)
    count = f"{len(analysis.runs)} runs, {analysis.bootstrap.fit.cells} cells"
    return "\n".join([verdict, "", count, *parameters, "", *others])


def format_plan(plan: ComputePlan) -> str:
    """N and D for a compute as text for the terminal."""
    lines = [f"for {plan.C:.3g} FLOPs:"]
    for name, allocation in (("20 tokens per parameter", plan.rule), ("by the fit", plan.fitted)):
        if allocation is not None:
            loss = f", loss {format_interval(allocation.loss, '.4g')}" if allocation.loss else ""
            ratio = allocation.tokens_per_parameter
            lines.append(
                f"  {name:<22} N = {allocation.N:.3g}, D = {allocation.D:.3g} "
                f"({ratio:.3g} tokens per parameter){loss}"
            )
    if plan.N_opt:
        lines.append(f"  N by the fit, with its interval: {format_interval(plan.N_opt)}")
    return "\n".join([*lines, *([plan.warning] if plan.warning else [])])


def sections(analysis: Analysis) -> list[Section]:
    """The sections of the report."""
    parameters = [
        (name, format_interval(interval, ".4g"))
        for name, interval in analysis.bootstrap.parameters().items()
    ]
    size_law_pictures = [
        Picture(
            "size_law",
            "Loss against size at equal tokens, with a power law alone and one with a floor",
            lambda colours: draw_size_law(analysis, colours),
        )
    ]
    return [
        Section("Results", sentences(analysis)),
        Section(
            "The law",
            (),
            ("parameter", "value and 95% interval"),
            parameters,
            (
                Picture(
                    "scaling_curve",
                    "Losses against compute, the fitted law for each size and its frontier",
                    lambda colours: draw_scaling_curve(analysis, colours),
                ),
            ),
        ),
        _approaches_section(analysis),
        Section(
            "Size alone",
            [_format_size_law(law) for law in analysis.size_laws],
            pictures=size_law_pictures if analysis.size_laws else (),
        ),
        _backtest_section(analysis),
        _residuals_section(analysis),
        _sensitivity_section(analysis),
        Section(
            "IsoFLOP",
            pictures=(
                Picture(
                    "isoflop",
                    "Loss against size for each compute",
                    lambda colours: draw_isoflop(analysis, colours),
                ),
            ),
        ),
        _runs_section(analysis),
    ]


def _runs_section(analysis: Analysis) -> Section:
    fit = analysis.bootstrap.fit
    rows = [
        (
            f"{o.N:.4g}",
            f"{o.D:.4g}",
            f"{o.C:.3g}",
            f"{o.loss:.4f}",
            f"{fit.loss(o.N, o.D):.4f}",
        )
        for o in sorted(analysis.runs, key=lambda o: o.C)
    ]
    return Section("All runs", (), ("N", "D", "C", "loss", "by the fit"), rows)


def _approaches_section(analysis: Analysis) -> Section:
    largest = analysis.bootstrap.fit.largest_C
    computes = (largest / 10, largest, largest * 4)
    rows = [
        (
            frontier.approach,
            format_interval(frontier.a),
            f"{frontier.k:.3g}",
            f"{len(frontier.points) or ''}",
            *(f"{frontier.N_opt(C):,.0f}" for C in computes),
        )
        for frontier in analysis.frontiers
    ]
    text = (
        "N_opt = k C^a: by the envelope of the runs (1), by parabolas at equal compute (2), by the "
        "fitted law (3). Intervals that do not meet are a result.",
    )
    columns = (f"N_opt at {C:.2g} FLOPs" for C in computes)
    header = ("approach", "a and 95% interval", "k", "optima", *columns)
    return Section("Three approaches", text, header, rows)


def _backtest_section(analysis: Analysis) -> Section:
    rows = [
        (
            f"{forecast.run.N:.3g}",
            f"{forecast.run.D:.3g}",
            f"{forecast.run.loss:.4f}",
            format_interval(forecast.predicted, ".4f"),
            f"{forecast.relative_error:+.2%}",
            "inside" if forecast.is_inside else "outside",
        )
        for forecast in (analysis.backtest.forecasts if analysis.backtest else ())
    ]
    header = ("N", "D", "loss", "predicted", "error", "")
    text = [
        f"{len(test.forecasts)} runs with up to {test.factor:.3g} times the compute of the fit: a "
        f"mean error of {test.error:.2%}, {test.inside_count} inside."
        for test in analysis.backtests
    ]
    return Section("The largest runs, predicted from the others", text, header, rows)


def _residuals_section(analysis: Analysis) -> Section:
    quality = analysis.quality
    rows = [
        (f"{o.run.N:.4g}", f"{o.run.D:.4g}", f"{o.run.loss:.4f}", f"{o.residual:+.2%}")
        for o in quality.outliers
    ]
    text = [f"Their standard deviation is {quality.residual_percent:.2g}% of the loss."]
    if quality.lack_of_fit_p is not None:
        text.append(
            "Lack of fit, against the scatter of runs with equal N and D: p = "
            f"{quality.lack_of_fit_p:.3g}."
        )
    text.append("Runs far from the law are listed." if rows else "No run is far from the law.")
    picture = Picture(
        "residuals",
        "Each run's loss relative to the law, over compute",
        lambda colours: draw_residuals(analysis, colours),
    )
    header = ("N", "D", "loss", "from the law") if rows else ()
    return Section("Residuals", text, header, rows, (picture,))


def _sensitivity_section(analysis: Analysis) -> Section:
    rows = []
    for variation in analysis.variations:
        law = variation.law
        exponents = [f"{x:.3f}" for x in (law.alpha, law.beta, law.a)] if law else [""] * 3
        rows.append((variation.change, *exponents, variation.reason))
    text = ("The same fit with another delta, or without one size or budget.",)
    return Section("Sensitivity of the fit", text, ("changed", "alpha", "beta", "a", ""), rows)
