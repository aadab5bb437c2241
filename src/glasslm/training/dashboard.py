"""The live panel of a run: progress, numbers, both loss curves and the latest sample.

`View` collects metrics lines; `build_panel` draws a view in a given size, with rich.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from glasslm.runs.history import Point, loss_range
from glasslm.runs.metrics import Line, SampleLine, Timing
from glasslm.text import as_float, escape_control_chars, format_duration, format_number, plural

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

# The hues of the report (report/figures.py), legible on dark and on light terminals: training is
# blue and validation orange.
TRAIN, VALIDATION, FAINT = "#2f8fc7", "#d9691e", "bright_black"
MAX_CURVE_POINTS = 1000  # more than a terminal has dots, so that drawing stays cheap in long runs
MIN_SMOOTHING_SHARE = 0.2  # weight of a new loss in the smoothed curve


@dataclass
class View:
    """The data of the panel: the newest values, and the loss curves so far."""

    title: str = ""
    max_steps: int | None = None
    step: int = 0
    train: list[Point] = field(default_factory=list)  # smoothed
    validation: list[Point] = field(default_factory=list)
    best: Point | None = None
    bpb: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    sample: SampleLine | None = None
    ended: str = ""
    # elapsed_s and remaining_s, each with the time (time.monotonic) of its line
    clock: dict[str, Point] = field(default_factory=dict)
    _means: Point | None = None

    def update(self, line: Line) -> None:
        """Take the values of a metrics line."""
        step = line.get("step", 0)
        self.step = max(self.step, step)
        if line["kind"] == "plan":
            self.max_steps = line.get("max_steps")
        elif line["kind"] == "step":
            self._record_timing(line.get("timing", {}))
            self._append_smoothed_loss(step, as_float(line.get("loss")))
            self.lr, self.grad_norm = as_float(line.get("lr")), as_float(line.get("grad_norm"))
        elif line["kind"] == "eval":
            self._record_timing(line.get("timing", {}))
            if line.get("split", "val") == "val":
                self._add_validation((step, as_float(line.get("loss"))))
                self.bpb = as_float(line.get("bpb"))
        elif line["kind"] == "checkpoint":
            self._record_timing(line.get("timing", {}))
        elif line["kind"] == "sample":
            self.sample = line
        elif line["kind"] == "resume":
            self._return_to(step)
        elif line["kind"] == "end":
            self.ended = str(line.get("status", "ended"))
            best_step, best_loss = line.get("best_step"), line.get("best_loss")
            if best_step is not None and best_loss is not None:
                self.best = (best_step, best_loss)

    def _return_to(self, step: int) -> None:
        """Drop the values after `step`, from which a resumed run continues."""
        self.step, self.ended, self.clock, self._means = step, "", {}, None
        self.train = [point for point in self.train if point[0] <= step]
        self.validation = [point for point in self.validation if point[0] <= step]
        self._find_best()

    def _add_validation(self, point: Point) -> None:
        """Add a validation loss; a second one of a step, on the whole split, replaces the first."""
        self.validation = sorted(
            [other for other in self.validation if other[0] != point[0]] + [point]
        )
        self._find_best()

    def _find_best(self) -> None:
        finite = [point for point in self.validation if math.isfinite(point[1])]
        self.best = min(finite, key=itemgetter(1), default=None)

    def _record_timing(self, timing: Timing) -> None:
        rate = timing.get("tokens_per_s")
        self.tokens_per_s = rate if rate is not None else self.tokens_per_s
        now = time.monotonic()
        for key, seconds in (
            ("elapsed_s", timing.get("elapsed_s")),
            ("remaining_s", timing.get("remaining_s")),
        ):
            if seconds is not None:
                self.clock[key] = (float(seconds), now)

    def _append_smoothed_loss(self, step: float, loss: float) -> None:
        """Append the double exponential mean (Mulloy, 1994): it does not lag a steady fall."""
        if not math.isfinite(loss):
            return
        share = max(MIN_SMOOTHING_SHARE, 1 / (len(self.train) + 1))
        once, twice = self._means or (loss, loss)
        once += share * (loss - once)
        twice += share * (once - twice)
        self._means = once, twice
        self.train.append((step, 2 * once - twice))
        if len(self.train) > MAX_CURVE_POINTS:
            self.train = self.train[::2]

    def elapsed_s(self) -> float | None:
        """Seconds since the run started; None before its first timed line."""
        if "elapsed_s" not in self.clock:
            return None
        seconds, logged_at = self.clock["elapsed_s"]
        return seconds if self.ended else seconds + time.monotonic() - logged_at

    def remaining_s(self) -> float | None:
        """Expected seconds to the end; None after it and before the first timed step."""
        if self.ended or "remaining_s" not in self.clock:
            return None
        seconds, logged_at = self.clock["remaining_s"]
        return max(0.0, seconds - (time.monotonic() - logged_at))


def build_panel(view: View, width: int, height: int) -> RenderableType:
    """The panel of a run, `width` columns wide and at most `height` rows tall.

    A small panel has only the upper parts.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    inner = max(10, width - 4)
    room = height - 2
    parts: list[list[Text]] = [[_progress_bar(view, inner)], _number_rows(view, inner)]
    room -= 2 + len(parts[1])
    sample_rows = min(8, max(3, room // 3)) if view.sample else 0
    curve_rows = min(12, room - 2 - (sample_rows + 2 if sample_rows else 0))
    if curve_rows >= 3 and inner >= 30:
        parts.append(_curve_rows(view, inner, curve_rows))
        room -= len(parts[-1]) + 1
    if view.sample and room >= 3:
        parts.append(_sample_rows(view.sample, inner, min(sample_rows, room - 2)))
    rows = [row for part in parts for row in (Text(""), *part)][1:]
    name = Text.assemble(
        ("glasslm", "bold"), f"  {view.title}" if view.title else "", style="default"
    )
    name.truncate(inner - 2, overflow="ellipsis")
    subtitle = [view.ended] if view.ended else []
    if (elapsed := view.elapsed_s()) is not None:
        subtitle.append(format_duration(elapsed))
    return Panel(
        Group(*rows[: height - 2]),
        title=name,
        title_align="left",
        subtitle=Text(" in ".join(subtitle)) if subtitle else None,
        subtitle_align="right",
        border_style=FAINT,
        width=width,
    )


def _progress_bar(view: View, width: int) -> Text:
    from rich.text import Text

    share = min(1.0, view.step / view.max_steps) if view.max_steps else 0.0
    remaining = view.remaining_s()
    words = [
        f"{share:4.0%}",
        f"step {view.step:,} of {view.max_steps:,}" if view.max_steps else f"step {view.step:,}",
    ]
    words += [f"{format_duration(remaining)} left".rjust(12)] if remaining is not None else []
    while len(words) > 1 and width - sum(len(word) + 2 for word in words) < 10:
        words.pop()
    length = max(0, width - sum(len(word) + 2 for word in words))
    done = round(share * length)
    return Text.assemble(
        ("━" * done, TRAIN),
        ("━" * (length - done), FAINT),
        *(f"  {word}" for word in words),
        no_wrap=True,
    )


def _number_rows(view: View, width: int) -> list[Text]:
    """A row of headings and a row of values, without the right columns that do not fit."""
    from rich.text import Text

    best = f"{view.best[1]:.3f} at {view.best[0]:,.0f}" if view.best else "-"
    columns = [  # of fixed width, so that no column moves
        ("train loss", 10, format_number(view.train[-1][1] if view.train else None, ".3f"), TRAIN),
        (
            "val loss",
            8,
            format_number(view.validation[-1][1] if view.validation else None, ".3f"),
            VALIDATION,
        ),
        ("best", 13, best, f"bold {VALIDATION}"),
        ("bits/byte", 9, format_number(view.bpb, ".3f"), "bold"),
        ("lr", 7, format_number(view.lr, ".1e"), ""),
        ("grad norm", 9, format_number(view.grad_norm, ".2f"), ""),
        ("tokens/s", 8, format_number(view.tokens_per_s, ",.0f"), ""),
    ]
    heads, values = Text(no_wrap=True), Text(no_wrap=True)
    for head, size, value, style in columns:
        if heads.cell_len + size > width:
            break
        heads.append(head.ljust(size + 2), style=FAINT)
        values.append(value.ljust(size + 2), style=style)
    for row in (heads, values):
        row.rstrip()
        row.truncate(width)
    return [heads, values]


def _curve_rows(view: View, width: int, height: int) -> list[Text]:
    """Both loss curves in braille dots over all steps of the run: `height` rows and a legend."""
    from rich.text import Text

    last = float(max(view.max_steps or 0, view.step, 1))
    low, high = loss_range(view.train + view.validation)
    train, validation, best = (
        braille_cells(points, width - 7, height, (0.0, last), (low, high))
        for points in (view.train, view.validation, [view.best] if view.best else [])
    )
    rows = []
    for i in range(height):
        has_label = i in (0, height // 2, height - 1)
        label = f"{high - (high - low) * i / (height - 1):5.2f} ┤" if has_label else "      │"
        row = Text(label, style=FAINT, no_wrap=True)
        cells = [_curve_cell(*dots) for dots in zip(train[i], validation[i], best[i])]
        for style, run in groupby(cells, key=itemgetter(1)):
            row.append("".join(sign for sign, _ in run), style=style)
        rows.append(row)
    legend = Text(" " * 7, style=FAINT, no_wrap=True)
    for sign, style, word in (
        ("━", TRAIN, "train, smoothed"),
        ("━", VALIDATION, "validation"),
        ("●", VALIDATION, "best"),
    ):
        legend.append(sign, style=style).append(f" {word}   ")
    legend.append(plural(round(last), "step").rjust(width - legend.cell_len))
    legend.truncate(width)
    return [*rows, legend]


def _curve_cell(train: int, validation: int, best: int) -> tuple[str, str]:
    """The character and style of a cell: the best point over validation over train."""
    dots = train | validation
    # A blank for an empty cell: some fonts draw the empty braille character as rings.
    sign = "●" if best else chr(0x2800 | dots) if dots else " "
    return sign, VALIDATION if best or validation else TRAIN


def braille_cells(
    points: Sequence[Point], columns: int, rows: int, x_range: Point, y_range: Point
) -> list[list[int]]:
    """A line through `points` in rows x columns braille cells.

    A cell has 2 x 4 dots, as the bits of a number to add to U+2800. Dots outside of `y_range` are
    not drawn.
    """
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    cells = [[0] * columns for _ in range(rows)]
    (x0, x1), (y0, y1) = x_range, y_range
    previous: tuple[int, float] | None = None  # column and row of a point, in dots
    for x, y in points:
        if not math.isfinite(y):
            previous = None  # a gap in the line
            continue
        end_column = round((x - x0) / (x1 - x0) * (2 * columns - 1))
        end_row = (y1 - y) / (y1 - y0) * (4 * rows - 1)
        start_column, start_row = previous or (end_column, end_row)
        row = start_row
        for column in range(start_column, end_column + 1):
            width = end_column - start_column
            share = (column - start_column) / width if width > 0 else 1.0
            last, row = row, start_row + share * (end_row - start_row)
            for dot in range(
                max(0, round(min(last, row))), min(4 * rows - 1, round(max(last, row))) + 1
            ):
                cells[dot // 4][column // 2] |= bits[dot % 4][column % 2]
        previous = end_column, end_row
    return cells


def _sample_rows(line: SampleLine, width: int, rows: int) -> list[Text]:
    from rich.console import Console
    from rich.text import Text

    head = Text(f"sample at step {line.get('step', 0):,}", style=FAINT, no_wrap=True)
    text = "".join(escape_control_chars(str(line.get(key, ""))) for key in ("prompt", "text"))
    content = Text(re.sub(r"\n\s*\n+", "\n", text.strip("\n")), overflow="fold")
    wrapped = list(content.wrap(Console(width=width, file=sys.stderr), width))[:rows]
    wrapped += [Text("")] * (rows - len(wrapped))  # so that the panel keeps its height
    head.truncate(width, overflow="ellipsis")
    return [head, *wrapped]
