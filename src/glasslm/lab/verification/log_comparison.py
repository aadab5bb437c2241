"""A comparison of logs of any program, among which may be runs: their losses by step.

A log of another program tells neither its settings nor its text and tokenizer. What is compared is
said, and what cannot be compared is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasslm.errors import DamagedError, GlasslmError, InputError
from glasslm.lab.diagnosis.curve_comparison import END_SHARE, common_end
from glasslm.lab.diagnosis.curve_files import Curve, read_curve
from glasslm.lab.verification.comparison import LINE_STYLES, SEED_NOISE, run_label
from glasslm.report import figures, page
from glasslm.report.page import Picture, Section
from glasslm.runs.history import loss_range
from glasslm.runs.protection import open_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glasslm.report.figures import Palette

RESULTS: dict[str, Callable[[Any], str]] = {  # the name of a result -> its format
    "best validation loss": "{:.4f}".format,
    "at": str,
    "last validation loss": "{:.4f}".format,
    "last training loss": "{:.4f}".format,
    "last": str,
    "unit": str,
    "gradient norms": "{:,}".format,
}


@dataclass(frozen=True)
class ComparedLog:
    """A run or a log of another program, with the letter that names it."""

    letter: str
    path: Path
    curve: Curve
    is_run: bool

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def results(self) -> dict[str, Any]:
        """The results by the names of RESULTS; None for what the log does not tell."""
        validation = self.curve.validation_losses.finite
        train = self.curve.training_losses.finite
        has_validation = len(validation) > 0
        best = int(validation.values.argmin()) if has_validation else 0
        return {
            "best validation loss": float(validation.values[best]) if has_validation else None,
            "at": validation.at(best) if has_validation else None,
            "last validation loss": float(validation.values[-1]) if has_validation else None,
            "last training loss": float(train.values[-1]) if len(train) else None,
            "last": train.at(-1) if len(train) else None,
            "unit": self.curve.validation_unit if has_validation else self.curve.train_unit,
            "gradient norms": len(self.curve.grad_norm) or None,
        }


def read_logs(
    names: Sequence[str], mapping: Sequence[str] = ()
) -> tuple[list[ComparedLog], dict[str, GlasslmError]]:
    """The runs and logs that can be read, labelled, and the errors of the others.

    A name is a file, a run folder, or the name of a run. `mapping` names the columns of files.
    Raises InputError if fewer than two can be read.
    """
    logs: list[ComparedLog] = []
    errors: dict[str, GlasslmError] = {}
    for name in names:
        try:
            is_run = not Path(name).is_file()
            path = open_run(name).path if is_run else Path(name)
            curve = read_curve(path, () if is_run else mapping)
            logs.append(ComparedLog(run_label(len(logs)), path, curve, is_run))
        except (DamagedError, InputError) as error:
            errors[name] = error
    if len(logs) < 2:
        reason = "".join(f" ({name}: {error})" for name, error in list(errors.items())[:1])
        raise InputError(f"{len(logs)} of {len(names)} logs can be read, expected two{reason}")
    return logs, errors


def results(logs: Sequence[ComparedLog]) -> list[tuple[str, list[str]]]:
    """The results by name, each with the values of all logs as text."""
    values = [log.results for log in logs]
    return [
        (name, ["-" if one[name] is None else form(one[name]) for one in values])
        for name, form in RESULTS.items()
        if any(one[name] is not None for one in values)
    ]


def remarks(logs: Sequence[ComparedLog]) -> list[str]:
    """Sentences on what is compared, what cannot be, and which loss is lower."""
    foreign = ", ".join(log.letter for log in logs if not log.is_run)
    sentences = [
        f"{foreign}: a log does not tell settings, text, tokenizer, time and FLOPs, so these are "
        "not compared. Losses can be compared only if text and tokenizer are the same."
    ]
    without = [log.letter for log in logs if not len(log.curve.validation_losses.finite)]
    if without:
        sentences.append(f"No validation loss: {', '.join(without)}.")
    try:
        end = common_end([log.curve for log in logs])
    except InputError as error:
        return [*sentences, f"No loss is compared at equal steps: {error}."]
    listed = ", ".join(f"{log.letter} {loss:.4f}" for log, loss in zip(logs, end.losses))
    sentences.append(
        f"{end.column.capitalize()} up to {end.step_unit} {end.step:,g}, the last that all have, "
        f"as the mean at equal steps of the last {END_SHARE:.0%}: {listed}."
    )
    ranked = sorted(zip(end.losses, (log.letter for log in logs)))
    (low, best), (high, second) = ranked[:2]
    if low == high:
        return [*sentences, f"{best} and {second} have the same loss."]
    return [
        *sentences,
        f"{best} has the lowest, {high - low:.4f} below {second}; with one run each that is no "
        f"proof. {SEED_NOISE}. Several seeds of each: glasslm diagnose --curve A1 A2 --against "
        "B1 B2.",
    ]


def draw_logs(logs: Sequence[ComparedLog], colours: Palette) -> Figure:
    """A figure of the losses by step: training thin, validation bold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.add_subplot()
    units = list(dict.fromkeys(log.results["unit"] for log in logs))
    figures.style_axes(axes, "Loss", " or ".join(units), colours)
    palette = (colours.train, colours.validation, colours.third, colours.ink)
    points: list[tuple[float, float]] = []
    for index, log in enumerate(logs):
        colour, style = palette[index % 4], LINE_STYLES[(index + index // 4) % 4]
        train = log.curve.training_losses.finite
        validation = log.curve.validation_losses.finite
        label = f"{log.letter}: {log.name}"
        bold = validation if len(validation) else train
        axes.plot(train.steps, train.values, color=colour, linewidth=0.6, alpha=0.45)
        axes.plot(bold.steps, bold.values, style, color=colour, linewidth=2, label=label)
        points += [*zip(train.steps.tolist(), train.values.tolist())]
        points += [*zip(bold.steps.tolist(), bold.values.tolist())]
    axes.set_ylim(*loss_range(points))
    axes.set_xlabel(" or ".join(dict.fromkeys(log.curve.step_unit for log in logs)))
    axes.xaxis.label.set_color(colours.ink)
    figures.add_legend(axes, colours)
    return figure


def write(logs: Sequence[ComparedLog], folder: Path) -> Path:
    """Write comparison.html, comparison.md and the figure; returns the path of the page."""
    header = ("", *(f"{log.letter}: {log.name}" for log in logs))
    rows = [(name, *values) for name, values in results(logs)]
    label = "Losses by step; thin: training, bold: validation, or training where there is none"
    read = [f"{log.letter}: {message}." for log in logs for message in log.curve.messages]
    sections = [
        Section("Results", remarks(logs), header, rows),
        Section(
            "Loss curves",
            pictures=[Picture("comparison", label, lambda colours: draw_logs(logs, colours))],
        ),
        Section("What was read", read),
    ]
    lead = "; ".join(f"{log.letter}: {log.path}" for log in logs)
    return page.write(folder, "comparison", f"Comparison of {len(logs)} logs", lead, sections)
