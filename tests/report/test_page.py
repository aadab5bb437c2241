"""A page of sections: no given text becomes markup, and each figure is there twice."""

import errno
import io
import re
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from glasslm import files
from glasslm.errors import ExhaustedError, InputError
from glasslm.report import page
from glasslm.report.figures import Palette
from glasslm.report.page import Picture, Section
from html_pages import Page

HOSTILE = (
    "</td><script>alert(1)</script><img src=http://evil.example/x onerror=x> "
    '\x1b[31m\x00 | `a` *b* \u202e & "q"'
)


def line(colours: Palette) -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2], [3, 4], color=colours.train)
    return figure


def test_foreign_text_stays_text_everywhere(tmp_path: Path) -> None:
    section = Section(
        HOSTILE, [HOSTILE], [HOSTILE, "b"], [["ok", HOSTILE]], [Picture("one", HOSTILE, line)]
    )
    html = page.write(tmp_path / "new", "x", HOSTILE, HOSTILE, [section]).read_text(
        encoding="utf-8"
    )
    parsed = Page(html)
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert (
        parsed.text.count("<script>alert(1)</script>") == 8
    )  # in the page's title, too, and below the figure
    assert not re.search(r"url\((?!#)|@import", html)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    markdown = (tmp_path / "new" / "x.md").read_text(encoding="utf-8")
    assert "<script" not in markdown.replace("\\<", "")
    rows = [row for row in markdown.splitlines() if row.startswith("| ")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [
        3,
        3,
    ]  # the bars in the cells are escaped


def test_a_verdict_is_marked_by_a_sign_and_a_class_and_only_in_the_first_cell(
    tmp_path: Path,
) -> None:
    rows = [["ok", "bad"], ["watch", "x"], ["bad", "y"], ["okay", "z"]]
    path = page.write(tmp_path, "x", "t", "l", [Section("s", rows=rows)])
    parsed = Page(path.read_text(encoding="utf-8"))
    marked = [
        attributes["class"]
        for tag, attributes in parsed.tags
        if tag == "td" and "class" in attributes
    ]
    assert marked == ["verdict ok", "verdict watch", "verdict bad"]
    assert len(set(page.MARKS.values())) == 3
    assert all(f"{mark} {verdict}" in parsed.text for verdict, mark in page.MARKS.items())
    css = path.read_text(encoding="utf-8")
    assert all(f".{verdict} {{ --mark:" in css for verdict in page.MARKS)
    markdown = (tmp_path / "x.md").read_text(encoding="utf-8")
    assert "| ✓ ok | bad |" in markdown
    assert "| okay | z |" in markdown


def test_a_figure_is_drawn_for_the_page_and_on_white(tmp_path: Path) -> None:
    pictures = [Picture("one", "First", line), Picture("two", "Second", line)]
    path = page.write(tmp_path, "x", "t", "l", [Section("s", pictures=pictures)])
    html = path.read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    assert "var(--train)" in html
    for name in ("one", "two"):
        assert (
            image.imread(io.BytesIO((tmp_path / "figures" / f"{name}.png").read_bytes())).ndim == 3
        )
        assert f"](figures/{name}.png)" in (tmp_path / "x.md").read_text(encoding="utf-8")


def test_what_is_empty_is_left_out(tmp_path: Path) -> None:
    path = page.write(tmp_path, "x", "t", "l", [Section("only a title")])
    tags = {tag for tag, _ in Page(path.read_text(encoding="utf-8")).tags}
    assert not tags & {"table", "figure", "svg"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.html", "x.md"}


def test_it_says_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="choose another place"):
        page.write(tmp_path / "file", "x", "t", "l", [])

    def full(path: Path, data: bytes) -> None:
        raise ExhaustedError("the disk is full")

    def forbidden(path: Path, data: bytes) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "write_atomic", full)
    with pytest.raises(ExhaustedError):
        page.write(tmp_path, "x", "t", "l", [])
    monkeypatch.setattr(files, "write_atomic", forbidden)
    with pytest.raises(InputError, match="Permission denied"):
        page.write(tmp_path, "x", "t", "l", [])
