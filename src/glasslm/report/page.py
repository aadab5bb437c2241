"""A page of sections for studies and diagnoses: HTML, Markdown and figures as PNG files.

The HTML is one file without scripts that fetches nothing. All text may be foreign (names of runs,
columns and files): control characters are replaced and markup is escaped here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from glasslm import files
from glasslm.errors import InputError, explain_system_errors
from glasslm.report import figures
from glasslm.report.figures import Palette
from glasslm.text import collapse_whitespace, escape_control_chars

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
MARKS = {
    "ok": "\u2713",
    "watch": "!",
    "bad": "\u2717",
}  # shown with the word: a colour alone is not visible to everyone


# What a sentence quotes in backticks: a command, a flag, or a file. Nothing in it is markup.
COMMAND = re.compile(r"`([\w./=-]+(?: [\w./=-]+)*)`")
MARKUP = re.compile(r"([\\`*_\[\]<>|&#~$!])")  # of Markdown
# A number with its sign, percent sign or unit of one letter, an interval, or the mark for none.
NUMBER = re.compile(
    r"[-+\u2212]?[\d.,]+(?:e[-+]?\d+)?\s?[%a-zA-Z]?"
    r"(?: ?(?:to|\.\.|-|\u2013|/|\u00b1) ?[-+\u2212]?[\d.,]+%?)*|-"
)
MAX_WORD_CHARS = 24  # a longer one is a path, a hash or a list of flags


@dataclass(frozen=True)
class Picture:
    """A figure, drawn once in the page's colours (light or dark) and once on white."""

    name: str  # of the file in figures/, without .png
    label: str  # the caption, and the description for screen readers
    draw: Callable[[Palette], Figure]


@dataclass(frozen=True)
class Section:
    """A title, paragraphs, a table, figures and links, in this order; empty parts are left out.

    A row whose first cell is a verdict (ok, watch or bad) gets a sign and a colour.
    """

    title: str
    text: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = ()
    links: Sequence[tuple[str, str]] = ()  # label, and path relative to the page's folder


def write(folder: Path, stem: str, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write STEM.html, STEM.md and figures/*.png into `folder`; returns the path of STEM.html.

    The folder may be new. Raises InputError when the folder cannot be written and ExhaustedError
    when the disk is full.
    """
    images = {
        f"{picture.name}.png": figures.png(picture.draw(figures.PRINT_PALETTE))
        for section in sections
        for picture in section.pictures
    }
    context: dict[str, Any] = {"title": title, "lead": lead, "sections": sections, "marks": MARKS}
    markdown = environment(escape=False).get_template("page.md.j2").render(context)
    html = (
        environment(escape=True)
        .get_template("page.html.j2")
        .render(context, inline_svg=_inline_svg)
    )
    return write_files(folder, stem, images, markdown, html, "choose another place")


def render_sections(context: dict[str, Any]) -> str:
    """The inside of a page, without its head: title, lead and sections, as HTML."""
    template = environment(escape=True).get_template("sections.html.j2")
    return template.render(context | {"marks": MARKS}, inline_svg=_inline_svg)


def write_files(
    folder: Path, stem: str, images: Mapping[str, bytes], markdown: str, html: str, cure: str
) -> Path:
    """Write STEM.md, STEM.html and the images in figures/; returns the path of STEM.html.

    Raises InputError, with the `cure`, when the folder cannot be written, and ExhaustedError when
    the disk is full.
    """
    with explain_system_errors(
        folder, lambda why: InputError(f"{folder} cannot be written ({why}): {cure}")
    ):
        files.make_folder(folder / "figures" if images else folder)
        for name, image in images.items():
            files.write_atomic(folder / "figures" / name, image)
        files.write_atomic(folder / f"{stem}.md", markdown.encode())
        files.write_atomic(folder / f"{stem}.html", html.encode())
    return folder / f"{stem}.html"


def environment(escape: bool) -> Environment:
    """Jinja2 with the templates of this package.

    Undefined names are errors, and control characters are replaced.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: escape_control_chars(value) if type(value) is str else value,
    )
    jinja.filters |= {
        "inline": inline_markdown,
        "address": quote,
        "prose": mark_commands,
        "cell_class": cell_class,
    }
    return jinja


def mark_commands(text: Any) -> Any:
    """A sentence for HTML: escaped, and a command in backticks becomes a <code> element."""
    from markupsafe import Markup, escape

    escaped = str(escape(escape_control_chars(str(text))))
    return Markup(COMMAND.sub(r"<code>\1</code>", escaped))


def cell_class(text: str) -> str:
    """How a table cell breaks: never inside a number, anywhere inside a path or a hash."""
    if NUMBER.fullmatch(text.strip()):
        return "number"
    longest = max((len(word) for word in text.split()), default=0)
    return "long" if longest > MAX_WORD_CHARS else ""


def inline_markdown(text: Any) -> str:
    """A sentence of glasslm for a line of Markdown, with markup escaped outside of commands.

    A command in backticks stays in backticks.
    """
    line = collapse_whitespace(text)
    parts = COMMAND.split(line)  # text, command, text, command, ..., text
    return "".join(
        f"`{part}`" if index % 2 else MARKUP.sub(r"\\\1", part) for index, part in enumerate(parts)
    )


def escape_markdown(text: Any) -> str:
    """Foreign text for the inside of a line of Markdown: on one line, with all markup escaped."""
    return MARKUP.sub(r"\\\1", collapse_whitespace(text))


def markdown_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ("", "")) -> str:
    """A table in Markdown, whose rows are escaped."""
    lines = [header, ["---"] * len(header), *(map(escape_markdown, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline_svg(picture: Picture) -> Any:
    from markupsafe import Markup, escape

    return Markup(
        figures.inline_svg(
            picture.draw(figures.CSS_PALETTE), str(escape(escape_control_chars(picture.label)))
        )
    )
