"""What a ladder says: its law (lab/scaling/fitted.py), how it was made, and whether the prediction held."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glasslm import files
from glasslm.lab.scaling import fit_report
from glasslm.lab.scaling.law import Interval, Observation, fit
from glasslm.lab.studies.ladder import MULTIPLES, Ladder
from glasslm.lab.studies.scaling_study import Cell, RateRule, Study
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table
from glasslm.report.figures import Palette, dress, finish
from glasslm.report.page import Picture, Section
from glasslm.runs.record import text_name
from glasslm.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE = "runs.csv"
CONVENTIONS = ("matmul", "total", "non_embedding")


def write(folder: Path, of: Study) -> Path:
    """runs.csv, fit.json, the figures and the report of a study; returns the path of its page."""
    files.write_atomic(folder / TABLE, as_csv(of.cells).encode())
    further = [
        _prediction(of),
        _design(of.ladder, of.cells),
        _rates(of.rule),
        _conventions(of.ladder, of.cells),
    ]
    return fit_report.write(
        folder, of.found, f"Scaling of {text_name(of.ladder.base.data)}", further
    )


def as_csv(cells: Sequence[Cell]) -> str:
    """runs.csv, which `glasslm scale --fit` reads as well; a run that diverged has no loss."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("N", "D", "C", "loss", "seed", "lr", "status", "run"))
    for cell in cells:
        loss = "" if cell.row.final_loss is None else repr(cell.row.final_loss)
        folder = f"runs/{cell.row.run.path.name}"
        writer.writerow((cell.N, cell.D, 6 * cell.N * cell.D, loss, cell.row.seed, f"{cell.rate:.6g}", cell.row.status,
                         folder))  # fmt: skip
    return out.getvalue()


def _prediction(of: Study) -> Section:
    prediction, beyond = of.prediction, of.found.beyond
    said = fit_report.ranged(Interval(**prediction["loss"]), ".4f")
    outcome = "the run diverged or failed: there is nothing to set beside it"
    if beyond:
        outcome = f"{beyond.run.loss:.4f}, {'inside' if beyond.inside else 'outside'} the interval"
    rows = [
        ("written", f"{prediction['written']}, in prediction.json, before the run began"),
        ("model", f"N = {prediction['N']:,}, width {prediction['config']['model']['d_model']}"),
        ("tokens", f"{prediction['D']:,}"),
        (
            "compute",
            f"{prediction['C']:.3g} FLOPs, {prediction['times_largest_C']:.3g} times the largest of the fit",
        ),
        ("predicted loss", said),
        ("loss", outcome),
    ]
    return Section(
        "A larger run, predicted and then trained", (), ("", ""), rows,
    )  # fmt: skip


def _design(made: Ladder, cells: Sequence[Cell]) -> Section:
    train, model = made.base.train, made.base.model
    V = made.vocab_size
    shown: dict[int, list[Cell]] = {}
    for cell in cells:
        shown.setdefault(cell.N, []).append(cell)
    rows = []
    for N, of in sorted(shown.items()):
        config = of[0].row.run.config.model
        counted = parameter_table(config.resolved(), V).counts()
        exact = flops_per_token(config, V) / (6 * N)
        tokens = " ".join(f"{cell.D:.3g}" for cell in sorted(of, key=lambda cell: cell.D))
        rows.append((f"{config.d_model}", f"{N:,}", f"{counted['total']:,}", f"{counted['non_embedding']:,}",
                     f"{exact:.2f}", f"{of[0].rate:.3g}", tokens))  # fmt: skip
    text = (
        f"{model.n_layers} layers and {model.n_heads} heads throughout, {train.batch_size} x {model.block_size} tokens "
        "a step, the learning rate decayed to its end in every run. N counts the parameters that multiply a token, the "
        "head included, and C = 6 N D; the exact count, with attention's scores, is larger by the factor beside it. "
        f"Every run is in runs.csv with its folder. All on {made.compute.engine}, {made.compute.precision}.",
    )  # fmt: skip
    header = (
        "width",
        "N",
        "all parameters",
        "without embeddings",
        "exact FLOPs / 6 N D",
        "rate",
        "tokens of its runs",
    )
    return Section("The ladder", text, header, rows)


def _rates(rule: RateRule) -> Section:
    rows = [
        (
            f"{one.N:,}",
            *(
                f"{rate:.3g}: {number(loss, '.4f') if loss is not None else 'diverged'}"
                for rate, loss in one.pairs
            ),
            f"{one.best:.3g}{' (an edge of what was tried)' if one.at_edge else ''}",
        )
        for one in rule.tried
    ]
    text = (
        "Three rates at three sizes, all on as many tokens, with a seed that the law does not see; the best by a "
        "parabola in the logarithm. Every size takes its rate from the line through them: "
        f"a power {rule.slope:+.2f} of N.",
    )
    multiples = [f"{times:.2g} x the recipe's" for times in MULTIPLES]
    picture = Picture(
        "rates", "Loss over the learning rate at three sizes", lambda colours: rates(rule, colours)
    )
    return Section("Learning rates", text, ("N", *multiples, "best"), rows, (picture,))


def rates(rule: RateRule, colours: Palette) -> Figure:
    """Loss over the learning rate, a line for each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    dress(
        axes, "Loss over the learning rate, equal tokens", "validation loss, nats a token", colours
    )
    for hue, mark, one in zip(
        (colours.train, colours.validation, colours.third), "osD", rule.tried
    ):
        sound = [(rate, loss) for rate, loss in one.pairs if loss is not None]
        axes.plot(
            [rate for rate, _ in sound],
            [loss for _, loss in sound],
            f"{mark}-",
            color=hue,
            label=f"N = {one.N:,}",
        )
        axes.axvline(one.best, color=hue, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="peak learning rate; dotted: the best")
    axes.xaxis.label.set_color(colours.ink)
    finish(axes, colours)
    return figure


def _conventions(made: Ladder, cells: Sequence[Cell]) -> Section:
    """The same runs with N counted otherwise: exponents depend on it."""
    rows = []
    for name in CONVENTIONS:
        runs = []
        for cell in cells:
            if cell.observation:
                N = parameter_table(cell.row.run.config.model.resolved(), made.vocab_size).counts()[name]
                runs.append(Observation(N, cell.D, cell.observation.loss))
        law = fit(runs)
        rows.append(
            (
                name.replace("_", " "),
                f"{law.alpha:.3f}",
                f"{law.beta:.3f}",
                f"{law.a:.3f}",
                f"{law.E:.3f}",
            )
        )
    text = (
        "The same runs, fitted with N counted in other ways. Exponents are comparable only where the counting is "
        "(arXiv:2406.19146, arXiv:2406.12907).",
    )
    return Section("What N counts", text, ("N", "alpha", "beta", "a", "E"), rows)
