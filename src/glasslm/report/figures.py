"""What all figures share: colours, axes, legends, and their rendering as PNG and as inline SVG.

Figures contain fixed words only: a font may lack the characters of names and prompts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Array = NDArray[np.float64]


class Palette(NamedTuple):
    """The colours of a figure, as #rrggbb."""

    ink: str
    faint: str
    train: str
    validation: str
    third: str


# The colours of Okabe and Ito, which colour-blind readers can distinguish. `inline_svg` replaces
# those of CSS_PALETTE by CSS variables.
PRINT_PALETTE = Palette(
    ink="#222222", faint="#9a9a9a", train="#0072b2", validation="#d55e00", third="#009e73"
)
CSS_PALETTE = Palette(
    ink="#010101", faint="#020202", train="#030303", validation="#040404", third="#050505"
)


def style_axes(axes: Axes, title: str, unit: str, colours: Palette) -> None:
    """Set title, y label and the style of grid, ticks and spines."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=colours.ink)
    axes.set_ylabel(unit, color=colours.ink)
    axes.patch.set_alpha(0)
    axes.grid(color=colours.faint, alpha=0.3, linewidth=0.6)
    axes.tick_params(colors=colours.ink, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours.faint)


def add_legend(axes: Axes, colours: Palette) -> None:
    """Add a legend to axes with several lines; write "no data" on axes without finite values."""
    if not any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axes.lines):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", color=colours.faint, ha="center", transform=axes.transAxes)
    elif len(axes.lines) > 1:
        axes.legend(frameon=False, labelcolor=colours.ink, fontsize=9, loc="best")


def windowed_mean(steps: Array, values: Array, before: float, after: float) -> Array:
    """For each step s the mean of the finite values in [s - before, s + after]; NaN for none.

    `steps` (N,) are in ascending order, `values` (N,) and the result (N,) belong to them.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.searchsorted(steps, steps - before, side="left")
    end = np.searchsorted(steps, steps + after, side="right")
    finite_counts = counts[end] - counts[first]
    return np.where(
        finite_counts > 0, (sums[end] - sums[first]) / np.maximum(finite_counts, 1), np.nan
    )


def png(figure: Figure) -> bytes:
    """A figure as a PNG file on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def inline_svg(figure: Figure, label: str) -> str:
    """A figure in CSS_PALETTE as an <svg> element for a page that defines --ink, --train ..."""
    file = io.StringIO()
    no_metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg.split(">", 1)[0])
        + ">"
        + svg.split(">", 1)[1]
    )
    for name, colour in CSS_PALETTE._asdict().items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def as_array(values: Sequence[float | None]) -> Array:
    """(N,) numbers of metrics lines; null, which stands for a non-finite number, becomes NaN."""
    return np.array([np.nan if value is None else value for value in values], np.float64)
