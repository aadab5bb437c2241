"""A page of sections, for whatever is not a run's own report: one HTML file without scripts that fetches nothing, the
same as Markdown, and its figures as PNG files.

All text may be foreign (names of runs, of columns, of files): it is made harmless and escaped here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from glasslm import files
from glasslm.errors import GlasslmError, InputError
from glasslm.report import figures
from glasslm.report.figures import Palette
from glasslm.text import harmless

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

MARKS = {
    "ok": "\u2713",
    "watch": "!",
    "bad": "\u2717",
}  # beside the word, for who does not see the colour


@dataclass(frozen=True)
class Picture:
    """A figure, drawn twice: in the page's colours, light or dark, and on white."""

    name: str  # of the file in figures/, without .png
    label: str  # what is to be seen, also for who cannot see it
    draw: Callable[[Palette], Figure]


@dataclass(frozen=True)
class Section:
    """A title, paragraphs, a table, figures and links, in this order; what is empty is left out.

    A row whose first cell is ok, watch or bad is marked so, by a sign and a colour.
    """

    title: str
    text: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = ()
    links: Sequence[tuple[str, str]] = ()  # what it is, and its path from the page's folder


def write(folder: Path, stem: str, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write STEM.html, STEM.md and figures/*.png into a folder, made if need be; returns the path of STEM.html.

    Raises InputError when nothing can be written there and ExhaustedError when the disk is full.
    """
    pictures = [picture for section in sections for picture in section.pictures]
    images = {picture.name: figures.png(picture.draw(figures.ON_WHITE)) for picture in pictures}
    context: dict[str, Any] = {"title": title, "lead": lead, "sections": sections, "marks": MARKS}
    markdown = environment(escape=False).get_template("page.md.j2").render(context)
    html = (
        environment(escape=True)
        .get_template("page.html.j2")
        .render(context, inline_svg=_inline_svg)
    )
    try:
        files.make_folder(folder / "figures" if images else folder)
        for name, image in images.items():
            files.write_atomic(folder / "figures" / f"{name}.png", image)
        files.write_atomic(folder / f"{stem}.md", markdown.encode())
        files.write_atomic(folder / f"{stem}.html", html.encode())
    except GlasslmError:  # a full disk: some of ours are OSErrors as well
        raise
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): choose another place"
        ) from error
    return folder / f"{stem}.html"


def environment(escape: bool) -> Environment:
    """Jinja2 with our templates: strict, and foreign text made harmless wherever it is put in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    made.filters["inline"] = inline_markdown
    made.filters["address"] = quote
    return made


def inline_markdown(text: Any) -> str:
    """Foreign text inside a line of Markdown: one line, and nothing in it is markup."""
    line = " ".join(harmless(str(text)).split())
    return re.sub(r"([\\`*_\[\]<>|&#~$!])", r"\\\1", line)


def _inline_svg(picture: Picture) -> Any:
    from markupsafe import Markup, escape

    return Markup(
        figures.inline_svg(picture.draw(figures.VARIABLES), str(escape(harmless(picture.label))))
    )
