"""The report of a scaling study: its prediction, its design and its law (fit_report.py)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glasslm import files
from glasslm.lab.scaling import fit_report
from glasslm.lab.scaling.law import Interval, Observation, fit
from glasslm.lab.studies.ladder import RATE_MULTIPLES, Ladder
from glasslm.lab.studies.scaling_study import LadderRun, LearningRateRule, ScalingStudy
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table
from glasslm.report.figures import Palette, add_legend, style_axes
from glasslm.report.page import Picture, Section
from glasslm.runs.record import text_name
from glasslm.text import format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE = "runs.csv"
CONVENTIONS = ("matmul", "total", "non_embedding")  # ways to count N


def write(folder: Path, study: ScalingStudy) -> Path:
    """Write runs.csv, fit.json, the figures and the report; returns the path of report.html."""
    files.write_atomic(folder / TABLE, to_csv(study.runs).encode())
    return fit_report.write(folder, study.analysis, title(study), further_sections(study))


def title(study: ScalingStudy) -> str:
    """The title of the report."""
    return f"Scaling of {text_name(study.ladder.base.data)}"


def further_sections(study: ScalingStudy) -> list[Section]:
    """The sections that the report has besides those of its law."""
    return [
        _prediction_section(study),
        _design_section(study.ladder, study.runs),
        _rates_section(study.rule),
        _conventions_section(study.ladder, study.runs),
    ]


def to_csv(runs: Sequence[LadderRun]) -> str:
    """The content of runs.csv, which `glasslm scale --fit` reads too.

    The loss of a diverged run is empty.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("N", "D", "C", "loss", "seed", "lr", "status", "run"))
    for run in runs:
        result = run.result
        loss = "" if result.final_loss is None else repr(result.final_loss)
        folder = f"runs/{result.run.path.name}"
        C = 6 * run.N * run.D
        writer.writerow(
            (run.N, run.D, C, loss, result.seed, f"{run.rate:.6g}", result.status, folder)
        )
    return out.getvalue()


def _prediction_section(study: ScalingStudy) -> Section:
    prediction, forecast = study.prediction, study.analysis.extrapolation
    observed = "the run diverged or failed: no loss to compare with"
    if forecast:
        where = "inside" if forecast.is_inside else "outside"
        observed = f"{forecast.run.loss:.4f}, {where} the interval"
    times = f"{prediction['times_largest_C']:.3g} times the largest compute of the fit"
    rows = [
        ("written", f"{prediction['written']}, in prediction.json, before the run began"),
        ("model", f"N = {prediction['N']:,}, width {prediction['config']['model']['d_model']}"),
        ("tokens", f"{prediction['D']:,}"),
        ("compute", f"{prediction['C']:.3g} FLOPs, {times}"),
        ("predicted loss", fit_report.format_interval(Interval(**prediction["loss"]), ".4f")),
        ("loss", observed),
    ]
    return Section("A larger run, predicted before it was trained", (), ("", ""), rows)


def _design_section(ladder: Ladder, runs: Sequence[LadderRun]) -> Section:
    train, model = ladder.base.train, ladder.base.model
    V = ladder.vocab_size
    by_size: dict[int, list[LadderRun]] = {}
    for run in runs:
        by_size.setdefault(run.N, []).append(run)
    rows = []
    for N, same_size in sorted(by_size.items()):
        config = same_size[0].result.run.config.model
        counts = parameter_table(config.resolve(), V).counts()
        exact_ratio = flops_per_token(config, V) / (6 * N)
        tokens = " ".join(f"{run.D:.3g}" for run in sorted(same_size, key=lambda run: run.D))
        rows.append(
            (
                f"{config.d_model}",
                f"{N:,}",
                f"{counts['total']:,}",
                f"{counts['non_embedding']:,}",
                f"{exact_ratio:.2f}",
                f"{same_size[0].rate:.3g}",
                tokens,
            )
        )
    text = (
        f"All models have {model.n_layers} layers and {model.n_heads} heads; a step has "
        f"{train.batch_size} x {model.block_size} tokens. The learning rate decays to its end in "
        "every run. N counts the parameters that multiply a token, the head included, and C = 6 "
        "N D. The exact FLOPs, which include attention scores, are larger by the ratio in the "
        f"table. runs.csv lists every run with its folder. Engine: {ladder.compute.engine}, "
        f"{ladder.compute.precision}.",
    )
    header = (
        "width",
        "N",
        "all parameters",
        "without embeddings",
        "exact FLOPs / 6 N D",
        "learning rate",
        "tokens of its runs",
    )
    return Section("The ladder", text, header, rows)


def _rates_section(rule: LearningRateRule) -> Section:
    rows = [
        (
            f"{trials.N:,}",
            *(
                f"{rate:.3g}: {format_number(loss, '.4f') if loss is not None else 'diverged'}"
                for rate, loss in trials.pairs
            ),
            f"{trials.best:.3g}{' (at the edge of those tried)' if trials.at_edge else ''}",
        )
        for trials in rule.trials
    ]
    text = (
        "Three learning rates at three sizes, all on the same number of tokens, with a seed that "
        "the fit does not use. The best rate is the minimum of a parabola in the logarithm of "
        "the rate. Every size takes its rate from the line through the three: a power "
        f"{rule.slope:+.2f} of N.",
    )
    multiples = [f"{multiple:.2g} x the recipe's" for multiple in RATE_MULTIPLES]
    picture = Picture(
        "rates",
        "Loss over the learning rate at three sizes",
        lambda colours: draw_rates(rule, colours),
    )
    return Section("Learning rates", text, ("N", *multiples, "best"), rows, (picture,))


def draw_rates(rule: LearningRateRule, colours: Palette) -> Figure:
    """A figure of the loss over the learning rate, with a line for each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    style_axes(
        axes,
        "Loss over the learning rate, equal tokens",
        "validation loss, nats per token",
        colours,
    )
    for colour, marker, trials in zip(
        (colours.train, colours.validation, colours.third), "osD", rule.trials
    ):
        finite = [(rate, loss) for rate, loss in trials.pairs if loss is not None]
        axes.plot(
            [rate for rate, _ in finite],
            [loss for _, loss in finite],
            f"{marker}-",
            color=colour,
            label=f"N = {trials.N:,}",
        )
        axes.axvline(trials.best, color=colour, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="peak learning rate; dotted: the best")
    rates = sorted({rate for trials in rule.trials for rate, _ in trials.pairs})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.xaxis.label.set_color(colours.ink)
    add_legend(axes, colours)
    return figure


def _conventions_section(ladder: Ladder, runs: Sequence[LadderRun]) -> Section:
    """The fits of the same runs with other ways to count N: exponents depend on it."""
    rows = []
    for convention in CONVENTIONS:
        observations = []
        for run in runs:
            if run.observation:
                model = run.result.run.config.model.resolve()
                N = parameter_table(model, ladder.vocab_size).counts()[convention]
                observations.append(Observation(N, run.D, run.observation.loss))
        law = fit(observations)
        exponents = (f"{value:.3f}" for value in (law.alpha, law.beta, law.a, law.E))
        rows.append((convention.replace("_", " "), *exponents))
    text = (
        "The same runs, fitted with N counted in other ways. Compare exponents only between fits "
        "that count N in the same way (arXiv:2406.19146, arXiv:2406.12907).",
    )
    return Section("What N counts", text, ("N", "alpha", "beta", "a", "E"), rows)
