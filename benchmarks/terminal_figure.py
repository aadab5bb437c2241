"""The picture of docs/quickstart.md: what a terminal shows during training, from the log of a run.

    python benchmarks/terminal_figure.py [--log docs/baseline/metrics.jsonl --until-step 870]
        [--title shakespeare-baseline --figure docs/training.png]

The panel is that of `glasslm train`, drawn with matplotlib's monospaced font.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.terminal_theme import SVG_EXPORT_THEME

from glasslm.runs.metrics import read_lines
from glasslm.training.dashboard import View, build_panel

COLUMNS, ROWS = 92, 28
CHARACTER = 0.086, 0.175  # width and height of a character in inches
MARGIN, DOT = 0.2, 0.02  # inches
FONT_SIZE = 10.3  # points: a character of DejaVu Sans Mono is 0.602 of it wide
DPI = 125
BRAILLE = 0x2800  # the first of the characters of dots, which the font lacks
DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))  # (column, row) of each bit


class Cell(NamedTuple):
    """A character of the terminal and its colour."""

    row: int
    column: int
    character: str
    colour: str
    is_bold: bool


def read_view(log: Path, until_step: int, title: str) -> View:
    """The panel's data after a step of a run that is logged in `log`."""
    view = View(title=title)
    for line in read_lines(log):
        if line["step"] > until_step:
            break
        view.update(line)
    return view


def list_cells(panel: RenderableType) -> Iterator[Cell]:
    """The characters of the panel, as a terminal shows them."""
    console = Console(width=COLUMNS, color_system="truecolor", force_terminal=True)
    lines = console.render_lines(panel, console.options.update(width=COLUMNS))
    for row, segments in enumerate(lines):
        column = 0
        for text, style, _ in Segment.filter_control(segments):
            colour, is_bold = SVG_EXPORT_THEME.foreground_color.hex, bool(style and style.bold)
            if style and style.color:
                colour = style.color.get_truecolor(SVG_EXPORT_THEME).hex
            for character in text:
                yield Cell(row, column, character, colour, is_bold)
                column += 1


def draw(cells: list[Cell]) -> Figure:
    """The cells on a dark ground."""
    n_rows = 1 + max(cell.row for cell in cells)
    width, height = COLUMNS * CHARACTER[0] + 2 * MARGIN, n_rows * CHARACTER[1] + 2 * MARGIN
    ground = SVG_EXPORT_THEME.background_color.hex
    figure = Figure(figsize=(width, height), facecolor=ground)
    for cell in cells:
        dots = ord(cell.character) - BRAILLE
        if 0 <= dots < 256:
            for column, row in (place for bit, place in enumerate(DOTS) if dots >> bit & 1):
                x = MARGIN + (cell.column + 0.25 + 0.5 * column) * CHARACTER[0]
                y = MARGIN + (cell.row + 0.14 + 0.24 * row) * CHARACTER[1]
                corner, size = (x / width, 1 - y / height), (DOT / width, DOT / height)
                figure.add_artist(Rectangle(corner, *size, color=cell.colour, linewidth=0))
        elif cell.character != " ":
            figure.text(
                (MARGIN + (cell.column + 0.5) * CHARACTER[0]) / width,
                1 - (MARGIN + (cell.row + 0.75) * CHARACTER[1]) / height,
                cell.character,
                color=cell.colour,
                fontfamily="DejaVu Sans Mono",
                fontsize=FONT_SIZE,
                fontweight="bold" if cell.is_bold else "normal",
                ha="center",
                va="baseline",
                parse_math=False,
            )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, default=Path("docs/baseline/metrics.jsonl"))
    parser.add_argument("--until-step", type=int, default=870)
    parser.add_argument("--title", default="shakespeare-baseline")
    parser.add_argument("--figure", type=Path, default=Path("docs/training.png"))
    args = parser.parse_args()
    view = read_view(args.log, args.until_step, args.title)
    figure = draw(list(list_cells(build_panel(view, COLUMNS, ROWS))))
    figure.savefig(args.figure, dpi=DPI, facecolor=figure.get_facecolor())


if __name__ == "__main__":
    main()
