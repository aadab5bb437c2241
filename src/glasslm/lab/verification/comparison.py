"""A comparison of runs: the settings that differ, the results, and how far they can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasslm.data.lossy_tokenizers import explain_lossy_tokenizer
from glasslm.errors import DamagedError, GlasslmError, InputError
from glasslm.lab.verification.compared_run import RESULTS, ComparedRun
from glasslm.lab.verification.run_groups import (
    RunGroup,
    group_rows,
    group_runs,
    judge_groups,
    verdict_sentences,
)
from glasslm.report import figures, page
from glasslm.report.page import Picture, Section
from glasslm.report.report_tables import ENDINGS
from glasslm.runs.history import best_eval, loss_range, sample_note
from glasslm.runs.metrics import (
    COMPLETED_STATUSES,
)
from glasslm.runs.protection import open_run
from glasslm.runs.run_folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from glasslm.report.figures import Palette

SEED_NOISE = "In small models, the seed alone changes the final loss by 0.005 to 0.1 nats"
LINE_STYLES = ("-", "--", ":", "-.")
X_AXES = {"step": "steps", "tokens": "tokens", "elapsed_s": "time"}


def label_runs(runs: Sequence[Run]) -> list[ComparedRun]:
    """The runs with the labels A to Z, AA, AB, ... Raises InputError unless there are 2 or more."""
    if len(runs) < 2:
        raise InputError(
            f"{len(runs)} runs were given: expected 2 or more, as in `glasslm compare RUN RUN`"
        )
    return [ComparedRun(run_label(index), run) for index, run in enumerate(runs)]


def read_runs(names: Sequence[str]) -> tuple[list[ComparedRun], dict[str, GlasslmError]]:
    """The runs that can be read and were not altered, labelled, and the errors of the others.

    Raises InputError if fewer than two were given, and DamagedError if fewer than two can be read.
    """
    if len(names) < 2:
        raise InputError(
            f"{len(names)} run was given: expected two or more, as in glasslm compare RUN RUN"
        )
    runs: list[Run] = []
    errors: dict[str, GlasslmError] = {}
    for name in names:
        try:
            run = open_run(name, with_log=True)
            trial = ComparedRun("", run)
            _ = trial.settings, trial.results, trial.validation_text
            runs.append(run)
        except (DamagedError, InputError) as error:
            errors[name] = error
    if len(runs) < 2:
        name, first = next(iter(errors.items()))
        kind = InputError if isinstance(first, InputError) else DamagedError
        raise kind(
            f"{len(runs)} of {len(names)} runs can be read, expected two or more ({name}: {first})"
        )
    return label_runs(runs), errors


def run_label(index: int) -> str:
    """The label of a run by its place from 0, as columns of a spreadsheet: A to Z, AA, AB, ..."""
    more, last = divmod(index, 26)
    return (run_label(more - 1) if more else "") + chr(ord("A") + last)


def differences(compared: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """The settings that differ between runs, each with its values."""
    names = dict.fromkeys(name for run in compared for name in run.settings)
    rows = [(name, [run.settings.get(name, "-") for run in compared]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def results(compared: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """The results by name, each with the values of all runs as text."""

    def format_result(name: str, value: Any) -> str:
        return "-" if value is None else RESULTS[name](value)

    return [
        (name, [format_result(name, run.results[name]) for run in compared]) for name in RESULTS
    ]


def needs_bits_per_byte(compared: Sequence[ComparedRun]) -> bool:
    """Whether only bits per byte can be compared, because the tokenizers differ."""
    return len({run.tokenizer_sha256 for run in compared}) > 1


def remarks(compared: Sequence[ComparedRun]) -> list[str]:
    """Sentences on what limits the comparison, and the verdict."""
    sentences = _objective_remarks(compared)
    if needs_bits_per_byte(compared):
        sentences.append(
            "The tokenizers differ, so losses in nats per token cannot be compared: compare bits "
            "per byte. The training curve is converted with the bytes of an average token."
        )
    for run in compared:
        if run.lossy_reason:
            sentences.append(f"{run.letter}: {explain_lossy_tokenizer(run.lossy_reason)}.")
    if len({run.validation_text for run in compared}) > 1:
        sentences.append(
            "The validation texts differ: neither loss nor bits per byte tells which model is "
            "better."
        )
    notes = [
        f"{run.letter} ({note})"
        for run in compared
        if (best := best_eval(run.lines, run.run.history)) and (note := sample_note(best))
    ]
    if notes:
        sentences.append(
            "Some best losses were measured on a sample of the validation text: "
            f"{', '.join(notes)}. `glasslm evaluate RUN --split val` measures all of it."
        )
    for run in compared:
        status = run.run.history.status
        if status == "time":
            sentences.append(f"{run.letter}: {ENDINGS[status]}")
        elif status not in COMPLETED_STATUSES:
            ending = ENDINGS.get(status, "")
            sentences.append(f"{run.letter} is not finished. {ending}".strip())
    return [*sentences, *_name_copies(compared), *_verdicts(compared)]


def _objective_remarks(compared: Sequence[ComparedRun]) -> list[str]:
    """A sentence where the losses of the runs measure different things."""
    if len({run.loss_unit for run in compared}) > 1:
        units = ", ".join(f"{run.letter} in {run.loss_unit}" for run in compared)
        return [f"The losses have different units, so they cannot be compared: {units}."]
    if len({run.objective for run in compared}) > 1:
        return [
            "The runs learn from different pairs or rewards, or with another beta, so their losses "
            "cannot be compared."
        ]
    return []


def group_metric(compared: Sequence[ComparedRun]) -> tuple[str, str]:
    """The result by which the runs are ranked, and its unit."""
    if needs_bits_per_byte(compared):
        return "best bits per byte", "bits per byte"
    is_reward = any(run.run.config.preference.reward for run in compared)
    return "best validation loss", "of the reward" if is_reward else "nats"


def groups_of(compared: Sequence[ComparedRun]) -> list[RunGroup]:
    """The groups of runs that differ in the seed alone; empty if there are no two such runs."""
    groups = group_runs(compared, group_metric(compared)[0])
    return groups if any(len(group.losses) > 1 for group in groups) else []


def _verdicts(compared: Sequence[ComparedRun]) -> list[str]:
    """The best run or group, and how certain that is; runs of different texts are not ranked."""
    if len({run.objective for run in compared}) > 1:
        return ["No winner is named: the losses measure different things."]
    name, unit = group_metric(compared)
    groups = groups_of(compared)
    copies = _find_copies(groups)
    ranked_runs = [run for run in compared if run not in copies]
    finite = [(run.results[name], run) for run in ranked_runs if run.results[name] is not None]
    if len(finite) < 2 and name == "best bits per byte":
        return ["No winner is named: fewer than two runs have bits per byte."]
    if len(finite) < 2:
        return ["There is nothing to compare: fewer than two runs have a finite validation loss."]
    if len({run.validation_text for run in compared}) > 1:
        return ["No run is called better than another one."]
    if len(groups) > 1:
        sentences = verdict_sentences(judge_groups(groups, unit))
        return [f"Groups of runs that differ in the seed alone, by {name}:", *sentences]
    ranked = sorted(finite, key=lambda pair: pair[0])
    (low, best), (high, second) = ranked[0], ranked[1]
    if low == high:
        return [f"{best.letter} and {second.letter} have the same {name}, {low:.4f}."]
    lowest = f"{best.letter} has the lowest {name}, {high - low:.4f} below {second.letter}"
    if groups:
        return [f"{lowest}: only the seed differs, so this is the effect of the seed."]
    return [
        f"{lowest}; with one run each that is no proof. {SEED_NOISE}: repeat both with other seeds "
        "(--seed)."
    ]


def _find_copies(groups: Sequence[RunGroup]) -> list[ComparedRun]:
    return [run for group in groups for run in group.copies]


def _name_copies(compared: Sequence[ComparedRun]) -> list[str]:
    letters = ", ".join(run.letter for run in _find_copies(groups_of(compared)))
    reason = "another run has the same settings and the same seed"
    return [f"Left out of the groups as copies: {letters}; {reason}."] if letters else []


def draw_losses(compared: Sequence[ComparedRun], colours: Palette) -> Figure:
    """A figure of the losses over steps, tokens and time: training thin, validation bold."""
    from matplotlib.figure import Figure

    bits = needs_bits_per_byte(compared)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(X_AXES), sharey=True)
    points: list[tuple[float, float]] = []
    palette = (colours.train, colours.validation, colours.third, colours.ink)
    longest = max((run.elapsed_s for run in compared), default=0.0)
    unit, per_s = ("minutes", 1 / 60) if longest > 180 else ("seconds", 1.0)
    for axes, (x, name) in zip(panels, X_AXES.items()):
        figures.style_axes(axes, f"Over {name}", "", colours)
        axes.set_xlabel(unit if name == "time" else name, color=colours.ink)
        for index, run in enumerate(compared):
            style: dict[str, Any] = {
                "color": palette[index % 4],
                "linestyle": LINE_STYLES[(index + index // 4) % 4],
            }
            train, validation = (run.curve(lines, x, bits) for lines in (run.steps, run.evals))
            if name == "time":
                train, validation = ((time * per_s, losses) for time, losses in (train, validation))
            axes.plot(*train, **style | {"linestyle": "-"}, linewidth=0.6, alpha=0.45)
            axes.plot(*validation, **style, linewidth=2.4, label=run.letter)
            if x == "step":
                points += [
                    *zip(train[0].tolist(), train[1].tolist()),
                    *zip(validation[0].tolist(), validation[1].tolist()),
                ]
    units = ", ".join(dict.fromkeys(run.loss_unit for run in compared))
    panels[0].set_ylabel("bits per byte" if bits else units, color=colours.ink)
    if any(math.isfinite(loss) for _, loss in points):
        panels[0].set_ylim(*loss_range(points))
    legend = panels[0].legend(frameon=False, labelcolor=colours.ink, fontsize=9, title="validation")
    legend.get_title().set_color(colours.ink)
    return figure


def _group_sections(compared: Sequence[ComparedRun]) -> list[Section]:
    groups = groups_of(compared)
    if not groups:
        return []
    name, _ = group_metric(compared)
    header = ("runs", "seeds", f"mean {name}", "95% interval of the mean")
    return [Section("Groups of runs that differ in the seed alone", (), header, group_rows(groups))]


def write(compared: Sequence[ComparedRun], folder: Path, further: Sequence[Section] = ()) -> Path:
    """Write comparison.html, comparison.md and figures/*.png; returns the path of comparison.html.

    `further` sections come before the list of differences. Raises as page.write does.
    """
    header = ("", *(f"{run.letter}: {run.name}" for run in compared))
    label = "Losses of the runs over steps, tokens and time; thin: training, bold: validation"
    differing = differences(compared)
    note = "Only settings that differ." if differing else "All recorded settings are the same."
    sections = [
        Section(
            "Results",
            remarks(compared),
            header,
            [(name, *values) for name, values in results(compared)],
        ),
        *_group_sections(compared),
        Section(
            "Loss curves",
            pictures=[Picture("comparison", label, lambda colours: draw_losses(compared, colours))],
        ),
        *further,
        Section("Differences", [note], header, [(name, *values) for name, values in differing]),
    ]
    title = (
        " and ".join(run.name for run in compared)
        if len(compared) == 2
        else f"{len(compared)} runs"
    )
    lead = "; ".join(f"{run.letter}: {run.run.path}" for run in compared)
    return page.write(folder, "comparison", f"Comparison of {title}", lead, sections)
