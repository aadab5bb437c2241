"""The live picture of a run on a terminal: progress, the numbers, both loss curves and the latest sample.

`View` takes in metrics lines; `panel` draws it for a given size, with rich, and knows nothing of time or streams.
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

from glasslm.runs.history import loss_range
from glasslm.runs.metrics import Line, SampleLine, Timing
from glasslm.text import as_float, duration, harmless, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Point = tuple[float, float]  # step, loss

TRAIN, VALIDATION, FAINT = (
    "cyan",
    "magenta",
    "bright_black",
)  # legible on dark and on light terminals


@dataclass
class View:
    """What the panel knows: the newest value of everything, and the curves so far."""

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
    clock: dict[str, Point] = field(
        default_factory=dict
    )  # elapsed_s, remaining_s, each with the moment it was told
    _means: Point | None = None

    def take(self, line: Line) -> None:
        step = line.get("step", 0)
        self.step = max(self.step, step)
        if line["kind"] == "plan":
            self.max_steps = line.get("max_steps")
        elif line["kind"] == "step":
            self._time(line.get("timing", {}))
            self._smooth(step, as_float(line.get("loss")))
            self.lr, self.grad_norm = as_float(line.get("lr")), as_float(line.get("grad_norm"))
        elif line["kind"] == "eval":
            self._time(line.get("timing", {}))
            if line.get("split", "val") == "val":
                self._validated((step, as_float(line.get("loss"))))
                self.bpb = as_float(line.get("bpb"))
        elif line["kind"] == "checkpoint":
            self._time(line.get("timing", {}))
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
        """Forget what an interrupted part of the run did after `step`, from where it goes on."""
        self.step, self.ended, self.clock, self._means = step, "", {}, None
        self.train = [point for point in self.train if point[0] <= step]
        self.validation = [point for point in self.validation if point[0] <= step]
        self._find_best()

    def _validated(self, point: Point) -> None:
        """A loss measured again, on the whole split at the end, takes the place of the first."""
        self.validation = sorted(
            [other for other in self.validation if other[0] != point[0]] + [point]
        )
        self._find_best()

    def _find_best(self) -> None:
        finite = [point for point in self.validation if math.isfinite(point[1])]
        self.best = min(finite, key=itemgetter(1), default=None)

    def _time(self, timing: Timing) -> None:
        rate = timing.get("tokens_per_s")
        self.tokens_per_s = rate if rate is not None else self.tokens_per_s
        now = time.monotonic()
        for key, seconds in (
            ("elapsed_s", timing.get("elapsed_s")),
            ("remaining_s", timing.get("remaining_s")),
        ):
            if seconds is not None:
                self.clock[key] = (float(seconds), now)

    def _smooth(self, step: float, loss: float) -> None:
        """Append the double exponential mean (Mulloy, 1994): it removes noise and does not lag behind a steady fall."""
        if not math.isfinite(loss):
            return
        share = max(0.2, 1 / (len(self.train) + 1))
        once, twice = self._means or (loss, loss)
        once += share * (loss - once)
        twice += share * (once - twice)
        self._means = once, twice
        self.train.append((step, 2 * once - twice))
        if (
            len(self.train) > 1000
        ):  # more than a terminal has dots: drawing stays cheap in long runs
            self.train = self.train[::2]

    def elapsed_s(self) -> float | None:
        if "elapsed_s" not in self.clock:
            return None
        told, at = self.clock["elapsed_s"]
        return told if self.ended else told + time.monotonic() - at

    def remaining_s(self) -> float | None:
        if self.ended or "remaining_s" not in self.clock:
            return None
        told, at = self.clock["remaining_s"]
        return max(0.0, told - (time.monotonic() - at))


def panel(view: View, width: int, height: int) -> RenderableType:
    """The picture of a run, `width` columns wide and at most `height` rows tall; small ones get its upper parts."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    inner = max(10, width - 4)
    room = height - 2
    parts: list[list[Text]] = [[_bar(view, inner)], _numbers(view, inner)]
    room -= 2 + len(parts[1])
    sample_rows = min(8, max(3, room // 3)) if view.sample else 0
    curve_rows = min(12, room - 2 - (sample_rows + 2 if sample_rows else 0))
    if curve_rows >= 3 and inner >= 30:
        parts.append(_curves(view, inner, curve_rows))
        room -= len(parts[-1]) + 1
    if view.sample and room >= 3:
        parts.append(_sample(view.sample, inner, min(sample_rows, room - 2)))
    rows = [row for part in parts for row in (Text(""), *part)][1:]
    name = Text.assemble(
        ("glasslm", "bold"), f"  {view.title}" if view.title else "", style="default"
    )
    name.truncate(inner - 2, overflow="ellipsis")
    below = [view.ended] if view.ended else []
    below += [duration(elapsed)] if (elapsed := view.elapsed_s()) is not None else []
    return Panel(
        Group(*rows[: height - 2]),
        title=name,
        title_align="left",
        subtitle=Text(" in ".join(below)) if below else None,
        subtitle_align="right",
        border_style=FAINT,
        width=width,
    )


def _bar(view: View, width: int) -> Text:
    from rich.text import Text

    share = min(1.0, view.step / view.max_steps) if view.max_steps else 0.0
    remaining = view.remaining_s()
    words = [
        f"{share:4.0%}",
        f"step {view.step:,} of {view.max_steps:,}" if view.max_steps else f"step {view.step:,}",
    ]
    words += [f"{duration(remaining)} left".rjust(12)] if remaining is not None else []
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


def _numbers(view: View, width: int) -> list[Text]:
    """A row of headings and a row of values; what does not fit is left away from the right."""
    from rich.text import Text

    best = f"{view.best[1]:.3f} at {view.best[0]:,.0f}" if view.best else "-"
    columns = [  # of fixed width, so that nothing jumps
        ("train loss", 10, number(view.train[-1][1] if view.train else None, ".3f"), TRAIN),
        (
            "val loss",
            8,
            number(view.validation[-1][1] if view.validation else None, ".3f"),
            VALIDATION,
        ),
        ("best", 13, best, f"bold {VALIDATION}"),
        ("bits/byte", 9, number(view.bpb, ".3f"), "bold"),
        ("lr", 7, number(view.lr, ".1e"), ""),
        ("grad norm", 9, number(view.grad_norm, ".2f"), ""),
        ("tokens/s", 8, number(view.tokens_per_s, ",.0f"), ""),
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


def _curves(view: View, width: int, height: int) -> list[Text]:
    """Both loss curves in braille dots over all steps to come, `height` rows and a line of legend."""
    from rich.text import Text

    last = float(max(view.max_steps or 0, view.step, 1))
    low, high = loss_range(view.train + view.validation)
    train, validation, best = (
        braille(points, width - 7, height, (0.0, last), (low, high))
        for points in (view.train, view.validation, [view.best] if view.best else [])
    )
    rows = []
    for i in range(height):
        marked = i in (0, height // 2, height - 1)
        label = f"{high - (high - low) * i / (height - 1):5.2f} ┤" if marked else "      │"
        row = Text(label, style=FAINT, no_wrap=True)
        cells = [_cell(*dots) for dots in zip(train[i], validation[i], best[i])]
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
    legend.append(f"{last:,.0f} steps".rjust(width - legend.cell_len))
    legend.truncate(width)
    return [*rows, legend]


def _cell(train: int, validation: int, best: int) -> tuple[str, str]:
    """The sign and the style of a cell: the best point over validation over train."""
    dots = train | validation
    sign = (
        "●" if best else chr(0x2800 | dots) if dots else " "
    )  # some fonts draw the empty braille cell as rings
    return sign, VALIDATION if best or validation else TRAIN


def braille(
    points: Sequence[Point], columns: int, rows: int, x_range: Point, y_range: Point
) -> list[list[int]]:
    """A joined line through `points`, as dots (0 to 255, to be or-ed with U+2800) of rows x columns braille cells.

    A cell has 2 x 4 dots. What lies above or below `y_range` is not drawn.
    """
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    cells = [[0] * columns for _ in range(rows)]
    (x0, x1), (y0, y1) = x_range, y_range
    before: tuple[int, float] | None = None
    for x, y in points:
        if not math.isfinite(y):
            before = None  # a gap
            continue
        here = (
            round((x - x0) / (x1 - x0) * (2 * columns - 1)),
            (y1 - y) / (y1 - y0) * (4 * rows - 1),
        )
        left, above = before or here
        row = above
        for column in range(left, here[0] + 1):
            share = (column - left) / (here[0] - left) if here[0] > left else 1.0
            last, row = row, above + share * (here[1] - above)
            for dot in range(
                max(0, round(min(last, row))), min(4 * rows - 1, round(max(last, row))) + 1
            ):
                cells[dot // 4][column // 2] |= bits[dot % 4][column % 2]
        before = here
    return cells


def _sample(line: SampleLine, width: int, rows: int) -> list[Text]:
    from rich.console import Console
    from rich.text import Text

    head = Text(f"what it writes at step {line.get('step', 0):,}", style=FAINT, no_wrap=True)
    prompt, text = harmless(str(line.get("prompt", ""))), harmless(str(line.get("text", "")))
    both = Text(re.sub(r"\n\s*\n+", "\n", (prompt + text).strip("\n")), overflow="fold")
    wrapped = list(both.wrap(Console(width=width, file=sys.stderr), width))[:rows]
    wrapped += [Text("")] * (rows - len(wrapped))  # so that the panel keeps its height
    head.truncate(width, overflow="ellipsis")
    return [head, *wrapped]
