"""Runs side by side: what differs in what they were told, what came of it, and how far that can be compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glasslm.config.conversion import to_dict
from glasslm.errors import InputError
from glasslm.report import figures, page
from glasslm.report.facts import ENDINGS
from glasslm.report.page import Picture, Section
from glasslm.runs.history import best_eval, loss_range
from glasslm.runs.metrics import Line
from glasslm.runs.run_folder import Run
from glasslm.text import duration, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from glasslm.report.figures import Array, Palette

SEED_NOISE = "In small models another seed alone moves the final loss by 0.005 to 0.1 nats"
STYLES = ("-", "--", ":", "-.")
AXES = {"step": "steps", "tokens": "tokens", "elapsed_s": "time"}
RESULTS: dict[str, Callable[[Any], str]] = {  # the name of a result -> how it is written
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
    "time": duration,
    "tokens per second": "{:,.0f}".format,
}


class Side:
    """One of the runs that are compared, under the letter that stands for it in figures."""

    def __init__(self, letter: str, run: Run) -> None:
        self.letter, self.run = letter, run
        self.name = run.path.resolve().name
        self.lines: list[Line] = timed(run.metrics())
        self.steps = [line for line in self.lines if line["kind"] == "step"]
        evals = [
            line
            for line in self.lines
            if line["kind"] == "eval" and line.get("split", "val") == "val"
        ]
        self.evals = sorted(
            {line["step"]: line for line in evals}.values(), key=lambda line: line["step"]
        )

    @cached_property
    def results(self) -> dict[str, Any]:
        """By the names of RESULTS; None where a run does not tell."""
        best = best_eval(self.lines, self.run.history) or {}
        last: Line = self.evals[-1] if self.evals else {}
        step: Line = self.steps[-1] if self.steps else {}
        speeds = [
            speed
            for line in self.steps
            if (speed := (line.get("timing") or {}).get("tokens_per_s"))
        ]
        tokens, flops = step.get("tokens"), self.run.record.get("flops_per_token")
        values = (
            self.run.history.status or "not ended",
            best.get("loss"), best.get("step"), best.get("bpb"), last.get("loss"), last.get("bpb"),
            step.get("loss"), step.get("step"), tokens, step.get("epoch"), tokens * flops if tokens and flops else None,
            self.lines[-1]["elapsed_s"] if self.lines else None,
            statistics.median(speeds) if speeds else None,
        )  # fmt: skip
        return dict(zip(RESULTS, values, strict=True))

    @cached_property
    def settings(self) -> dict[str, str]:
        """Everything that may have made a difference, by name."""
        record = self.run.record
        config = to_dict(self.run.config)
        settings = {
            f"{part}.{key}": _shown(value)
            for part, of in config.items()
            for key, value in of.items()
        }
        data, tokenizer = record.get("data") or {}, record.get("tokenizer") or {}
        texts = [str(file.get("sha256"))[:12] for file in data.get("files", [])]
        settings["text"] = ", ".join(texts[:2]) + (
            f" and {len(texts) - 2} more" if len(texts) > 2 else ""
        )
        settings["training bytes"] = f"{data.get('train_bytes', 0):,}"
        settings["tokenizer"] = (
            f"{tokenizer.get('kind')}, {tokenizer.get('vocab_size')}, {self.tokenizer[:12]}"
        )
        settings |= {
            f"parameters: {name}": f"{count:,}"
            for name, count in (record.get("parameters") or {}).items()
        }
        settings["FLOPs per token"] = _shown(record.get("flops_per_token"))
        return settings | circumstances(record)

    @property
    def tokenizer(self) -> str:
        return str((self.run.record.get("tokenizer") or {}).get("sha256", ""))

    @property
    def validation_text(self) -> tuple[Any, ...]:
        """What says which text was kept for validation: it is cut off before anything is tokenised."""
        data = self.run.config.data
        texts = tuple(
            str(file.get("sha256")) for file in (self.run.record.get("data") or {}).get("files", [])
        )
        return texts, data.val_fraction, data.test_fraction, data.encoding_errors

    def curve(self, lines: Sequence[Line], x: str, in_bits: bool) -> tuple[Array, Array]:
        """The losses of step or eval lines over "step", "tokens" or "elapsed_s"."""
        where = figures.as_array([line["step"] for line in lines])
        if x == "tokens":
            known = [(line["step"], line.get("tokens") or 0) for line in self.steps]
            where = np.interp(
                where, [0, *(step for step, _ in known)], [0, *(tokens for _, tokens in known)]
            )
        elif x == "elapsed_s":
            where = figures.as_array([line["elapsed_s"] for line in lines])
        losses = figures.as_array([line["loss"] for line in lines])
        if in_bits and lines and "bpb" in lines[0]:
            losses = figures.as_array([line["bpb"] for line in lines])
        elif in_bits:  # by the bytes of an average token
            data = self.run.record.get("data") or {}
            losses = (
                losses
                / math.log(2)
                * data.get("train_tokens", math.nan)
                / max(1, data.get("train_bytes", 1))
            )
        return where, losses


def timed(lines: Iterable[Line]) -> list[Line]:
    """The lines, each with the seconds of training so far: the clock of a metrics file begins again with a resume."""
    before = now = 0.0
    clocked = []
    for line in lines:
        if line["kind"] == "resume":
            before = now
        now = max(now, before + ((line.get("timing") or {}).get("elapsed_s") or 0.0))
        clocked.append(line | {"elapsed_s": now})
    return clocked


def sides(runs: Sequence[Run]) -> list[Side]:
    if not 2 <= len(runs) <= 26:
        raise InputError(
            f"{len(runs)} runs were given: expected 2 to 26, as in `glasslm compare RUN RUN`"
        )
    return [Side(chr(ord("A") + index), run) for index, run in enumerate(runs)]


def differences(compared: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, each with its values."""
    names = dict.fromkeys(name for side in compared for name in side.settings)
    rows = [(name, [side.settings.get(name, "-") for side in compared]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def results(compared: Sequence[Side]) -> list[tuple[str, list[str]]]:
    def written(name: str, value: Any) -> str:
        return "-" if value is None else RESULTS[name](value)

    return [(name, [written(name, side.results[name]) for side in compared]) for name in RESULTS]


def in_bits(compared: Sequence[Side]) -> bool:
    """Whether bits per byte are what can be compared: a nat per token means something else with other tokens."""
    return len({side.tokenizer for side in compared}) > 1


def remarks(compared: Sequence[Side]) -> list[str]:
    """What the numbers do not say of themselves, in sentences."""
    said = []
    if in_bits(compared):
        said.append(
            "The tokenizers differ, so losses in nats per token cannot be compared: compare bits per byte, whose bytes "
            "are those of the same text. The training curve is converted by the bytes of an average token."
        )
    if len({side.validation_text for side in compared}) > 1:
        said.append(
            "The validation texts differ: neither loss nor bits per byte says which model is better."
        )
    bests = [best for side in compared if (best := best_eval(side.lines, side.run.history))]
    if any(not best.get("whole") for best in bests):
        said.append("Not every best loss was measured on the whole validation text.")
    for side in compared:
        if side.run.history.status not in ("finished", "stopped"):
            said.append(
                f"{side.letter} has not come to its end. {ENDINGS.get(side.run.history.status, '')}".strip()
            )
    return [*said, _verdict(compared)]


def _verdict(compared: Sequence[Side]) -> str:
    """Which is the lowest and by how much, and that one seed each is no proof."""
    name = "best bits per byte" if in_bits(compared) else "best validation loss"
    known = [(side.results[name], side) for side in compared if side.results[name] is not None]
    if len(known) < 2:
        return "There is nothing to compare: no two of the runs have a finite validation loss."
    ranked = sorted(known, key=lambda pair: pair[0])
    (low, best), (high, second) = ranked[0], ranked[1]
    differing = {
        key
        for key, _ in differences(compared)
        if key.startswith(("model.", "data.", "optimizer.", "train."))
    }
    if low == high:
        return f"{best.letter} and {second.letter} have the same {name}, {low:.4f}."
    what = f"{best.letter} has the lowest {name}, {high - low:.4f} below {second.letter}"
    if differing == {"train.seed"}:
        return f"{what}: only the seed differs, so this is what a seed does."
    return f"{what}; with one run each that is no proof. {SEED_NOISE}: repeat both with other seeds (--seed)."


def draw(compared: Sequence[Side], colours: Palette) -> Figure:
    """Losses over steps, tokens and time: training thin, validation bold; a colour and a dash for each run."""
    from matplotlib.figure import Figure

    bits = in_bits(compared)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(AXES), sharey=True)
    points: list[tuple[float, float]] = []
    cycle = (colours.train, colours.validation, colours.third, colours.ink)
    longest = max((side.lines[-1]["elapsed_s"] for side in compared if side.lines), default=0.0)
    unit, per_s = ("minutes", 1 / 60) if longest > 180 else ("seconds", 1.0)
    for axes, (x, name) in zip(panels, AXES.items()):
        figures.dress(axes, f"Over {name}", "", colours)
        axes.set_xlabel(unit if name == "time" else name, color=colours.ink)
        for index, side in enumerate(compared):
            look: dict[str, Any] = {
                "color": cycle[index % 4],
                "linestyle": STYLES[(index + index // 4) % 4],
            }
            train, validation = (side.curve(lines, x, bits) for lines in (side.steps, side.evals))
            if name == "time":
                train, validation = ((at * per_s, losses) for at, losses in (train, validation))
            axes.plot(*train, **look | {"linestyle": "-"}, linewidth=0.6, alpha=0.45)
            axes.plot(*validation, **look, linewidth=2.4, label=side.letter)
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


def write(compared: Sequence[Side], folder: Path, further: Sequence[Section] = ()) -> Path:
    """comparison.html, comparison.md and figures/*.png; the path of the first. Raises as page.write does.

    `further` sections come before the list of what differs.
    """
    header = ("", *(f"{side.letter}: {side.name}" for side in compared))
    label = "Losses of the runs over steps, tokens and time; thin: training, bold: validation"
    told = differences(compared)
    alike = (
        "Everything that is recorded is the same."
        if not told
        else "Only what is not the same in all of them."
    )
    sections = [
        Section(
            "What came of it",
            remarks(compared),
            header,
            [(name, *values) for name, values in results(compared)],
        ),
        Section(
            "How they learned",
            pictures=[Picture("comparison", label, lambda colours: draw(compared, colours))],
        ),
        *further,
        Section("What differs", [alike], header, [(name, *values) for name, values in told]),
    ]
    title = (
        " and ".join(side.name for side in compared)
        if len(compared) == 2
        else f"{len(compared)} runs"
    )
    lead = "; ".join(f"{side.letter}: {side.run.path}" for side in compared)
    return page.write(folder, "comparison", f"Comparison of {title}", lead, sections)


def circumstances(record: dict[str, Any]) -> dict[str, str]:
    """Where and with what a run was computed, by name."""
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
    found = {name: record[name] for name in names if name in record}
    for part in ("versions", "machine", "git"):
        found |= {f"{part}: {name}": value for name, value in (record.get(part) or {}).items()}
    return {name: _shown(value) for name, value in found.items()}


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_shown, value)) or "-"
    if value is None or isinstance(value, bool):
        return "-" if value is None else "yes" if value else "no"
    return number(value, ".6g") if isinstance(value, float) else str(value)
