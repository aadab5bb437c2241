"""A comparison of runs: the settings that differ, the results, and how far they can be compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from glasslm.config.conversion import to_dict
from glasslm.errors import InputError
from glasslm.report import figures, page
from glasslm.report.page import Picture, Section
from glasslm.report.report_tables import ENDINGS
from glasslm.runs.history import best_eval, loss_range
from glasslm.runs.metrics import (
    COMPLETED_STATUSES,
    EvalLine,
    Line,
    StepLine,
    elapsed_s,
    eval_lines,
    step_lines,
    timing_of,
)
from glasslm.runs.run_folder import Run
from glasslm.text import format_duration, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from glasslm.report.figures import Array, Palette

SEED_NOISE = "In small models, the seed alone changes the final loss by 0.005 to 0.1 nats"
MAX_RUNS = 26  # each has a letter
HASH_LENGTH = 12  # shown characters of a sha256
LINE_STYLES = ("-", "--", ":", "-.")
X_AXES = {"step": "steps", "tokens": "tokens", "elapsed_s": "time"}
RESULTS: dict[str, Callable[[Any], str]] = {  # the name of a result -> its format
    "status": str,
    "best validation loss": "{:.4f}".format,
    "at step": "{:,}".format,
    "best bits per byte": "{:.4f}".format,
    "last validation loss": "{:.4f}".format,
    "last bits per byte": "{:.4f}".format,
    "last training loss": "{:.4f}".format,
    "steps": "{:,}".format,
    "tokens": "{:,}".format,
    "epochs": "{:.3g}".format,
    "FLOPs": "{:.3g}".format,
    "time": format_duration,
    "tokens per second": "{:,.0f}".format,
}


class ComparedRun:
    """A run of a comparison, with the letter that names it in tables and figures."""

    def __init__(self, letter: str, run: Run) -> None:
        self.letter, self.run = letter, run
        self.name = run.path.resolve().name
        lines = list(run.metrics())
        self.elapsed_s = elapsed_s(lines)
        self.lines = with_total_time(lines)
        self.steps = step_lines(self.lines)
        evals = eval_lines(self.lines)
        self.evals = sorted(
            {line["step"]: line for line in evals}.values(), key=lambda line: line["step"]
        )

    @cached_property
    def results(self) -> dict[str, Any]:
        """The results by the names of RESULTS; None for an unknown one."""
        best: Mapping[str, Any] = best_eval(self.lines, self.run.history) or {}
        last: Mapping[str, Any] = self.evals[-1] if self.evals else {}
        step: Mapping[str, Any] = self.steps[-1] if self.steps else {}
        speeds = [
            speed
            for line in self.steps
            if (speed := (line.get("timing") or {}).get("tokens_per_s"))
        ]
        tokens, flops = step.get("tokens"), self.run.record.get("flops_per_token")
        values = (
            self.run.history.status or "not ended",
            best.get("loss"),
            best.get("step"),
            best.get("bpb"),
            last.get("loss"),
            last.get("bpb"),
            step.get("loss"),
            step.get("step"),
            tokens,
            step.get("epoch"),
            tokens * flops if tokens and flops else None,
            self.elapsed_s if self.lines else None,
            statistics.median(speeds) if speeds else None,
        )
        return dict(zip(RESULTS, values, strict=True))

    @cached_property
    def settings(self) -> dict[str, str]:
        """Everything that may affect the results, by name."""
        record = self.run.record
        config = to_dict(self.run.config)
        settings = {
            f"{part}.{key}": _format_setting(value)
            for part, fields in config.items()
            for key, value in fields.items()
        }
        data, tokenizer = record.get("data") or {}, record.get("tokenizer") or {}
        texts = [str(file.get("sha256"))[:HASH_LENGTH] for file in data.get("files", [])]
        settings["text"] = ", ".join(texts[:2]) + (
            f" and {len(texts) - 2} more" if len(texts) > 2 else ""
        )
        settings["training bytes"] = f"{data.get('train_bytes', 0):,}"
        settings["tokenizer"] = (
            f"{tokenizer.get('kind')}, {tokenizer.get('vocab_size')}, "
            f"{self.tokenizer_sha256[:HASH_LENGTH]}"
        )
        settings |= {
            f"parameters: {name}": f"{count:,}"
            for name, count in (record.get("parameters") or {}).items()
        }
        settings["FLOPs per token"] = _format_setting(record.get("flops_per_token"))
        return settings | recorded_environment(record)

    @property
    def tokenizer_sha256(self) -> str:
        return str((self.run.record.get("tokenizer") or {}).get("sha256", ""))

    @property
    def validation_text(self) -> tuple[Any, ...]:
        """What identifies the validation text: it is split off before tokenization."""
        data = self.run.config.data
        texts = tuple(
            str(file.get("sha256")) for file in (self.run.record.get("data") or {}).get("files", [])
        )
        return texts, data.val_fraction, data.test_fraction, data.encoding_errors, data.json_field

    def curve(
        self, lines: Sequence[StepLine] | Sequence[EvalLine], x: str, in_bits_per_byte: bool
    ) -> tuple[Array, Array]:
        """x (n,) and losses (n,) of step or eval lines; `x` is "step", "tokens" or "elapsed_s"."""
        positions = figures.as_array([line["step"] for line in lines])
        if x == "tokens":
            tokens = [(line["step"], line.get("tokens") or 0) for line in self.steps]
            positions = np.interp(
                positions, [0, *(step for step, _ in tokens)], [0, *(count for _, count in tokens)]
            )
        elif x == "elapsed_s":
            positions = figures.as_array([line["timing"]["elapsed_s"] for line in lines])
        losses = figures.as_array([line["loss"] for line in lines])
        if in_bits_per_byte and lines and "bpb" in lines[0]:
            losses = figures.as_array([cast("float | None", line.get("bpb")) for line in lines])
        elif in_bits_per_byte:  # from the bytes of an average token
            data = self.run.record.get("data") or {}
            losses = (
                losses
                / math.log(2)
                * data.get("train_tokens", math.nan)
                / max(1, data.get("train_bytes", 1))
            )
        return positions, losses


def with_total_time(lines: Iterable[Line]) -> list[Line]:
    """The lines, with `elapsed_s` of steps and evaluations counted across all resumes.

    The clock of metrics.jsonl restarts with each resume. Changes the lines.
    """
    earlier_parts = total = 0.0
    timed_lines: list[Line] = []
    for line in lines:
        if line["kind"] == "resume":
            earlier_parts = total
        timing = timing_of(line)
        total = max(total, earlier_parts + (timing.get("elapsed_s") or 0.0))
        if line["kind"] == "step" or line["kind"] == "eval":
            line["timing"] = {**timing, "elapsed_s": total}
        timed_lines.append(line)
    return timed_lines


def label_runs(runs: Sequence[Run]) -> list[ComparedRun]:
    """The runs with the letters A, B, ... Raises InputError unless there are 2 to MAX_RUNS."""
    if not 2 <= len(runs) <= MAX_RUNS:
        raise InputError(
            f"{len(runs)} runs were given: expected 2 to {MAX_RUNS}, as in `glasslm compare RUN "
            "RUN`"
        )
    return [ComparedRun(chr(ord("A") + index), run) for index, run in enumerate(runs)]


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
    sentences = []
    if needs_bits_per_byte(compared):
        sentences.append(
            "The tokenizers differ, so losses in nats per token cannot be compared: compare bits "
            "per byte. The training curve is converted with the bytes of an average token."
        )
    if len({run.validation_text for run in compared}) > 1:
        sentences.append(
            "The validation texts differ: neither loss nor bits per byte tells which model is "
            "better."
        )
    bests = [best for run in compared if (best := best_eval(run.lines, run.run.history))]
    if any(not best.get("whole") for best in bests):
        sentences.append("Some best losses were measured on a sample of the validation text.")
    for run in compared:
        status = run.run.history.status
        if status not in COMPLETED_STATUSES:
            ending = ENDINGS.get(status, "")
            sentences.append(f"{run.letter} is not finished. {ending}".strip())
    return [*sentences, _verdict(compared)]


def _verdict(compared: Sequence[ComparedRun]) -> str:
    """Which run has the lowest loss and by how much, with a warning that one seed is no proof."""
    name = "best bits per byte" if needs_bits_per_byte(compared) else "best validation loss"
    finite = [(run.results[name], run) for run in compared if run.results[name] is not None]
    if len(finite) < 2:
        return "There is nothing to compare: fewer than two runs have a finite validation loss."
    ranked = sorted(finite, key=lambda pair: pair[0])
    (low, best), (high, second) = ranked[0], ranked[1]
    differing = {
        key
        for key, _ in differences(compared)
        if key.startswith(("model.", "data.", "optimizer.", "train."))
    }
    if low == high:
        return f"{best.letter} and {second.letter} have the same {name}, {low:.4f}."
    lowest = f"{best.letter} has the lowest {name}, {high - low:.4f} below {second.letter}"
    if differing == {"train.seed"}:
        return f"{lowest}: only the seed differs, so this is the effect of the seed."
    return (
        f"{lowest}; with one run each that is no proof. {SEED_NOISE}: repeat both with other seeds "
        "(--seed)."
    )


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
    panels[0].set_ylabel("bits per byte" if bits else "nats per token", color=colours.ink)
    if any(math.isfinite(loss) for _, loss in points):
        panels[0].set_ylim(*loss_range(points))
    legend = panels[0].legend(frameon=False, labelcolor=colours.ink, fontsize=9, title="validation")
    legend.get_title().set_color(colours.ink)
    return figure


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


def recorded_environment(record: Mapping[str, Any]) -> dict[str, str]:
    """The engine, device, precision, versions and machine of a run, by name."""
    names = (
        "engine",
        "device",
        "precision",
        "compiled",
        "threads",
        "processes",
        "parallel",
        "deterministic",
    )
    values = {name: record[name] for name in names if name in record}
    for part in ("versions", "machine", "git", "blas"):
        values |= {f"{part}: {name}": value for name, value in (record.get(part) or {}).items()}
    return {name: _format_setting(value) for name, value in values.items()}


def _format_setting(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_format_setting, value)) or "-"
    if value is None or isinstance(value, bool):
        return "-" if value is None else "yes" if value else "no"
    return format_number(value, ".6g") if isinstance(value, float) else str(value)
