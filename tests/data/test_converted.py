"""Parquet files and MediaWiki dumps given by --text-file: converted once, known by their content, hostile or not."""

from __future__ import annotations

import bz2
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from glasslm.config.schema import DataConfig
from glasslm.data.sources import corpora, files, mediawiki
from glasslm.errors import DamagedError, InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))


def find(*paths: Path, said: list[str] | None = None) -> files.Source:
    say = (lambda message: None) if said is None else said.append
    return corpora.find(DataConfig(text_file=tuple(map(str, paths))), say)


def text_of(*paths: Path) -> str:
    return "".join(find(*paths).text())


# --- Parquet ----------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, Any], rows: int = 1000) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def test_the_texts_of_a_parquet_file_are_joined_by_blank_lines(tmp_path: Path) -> None:
    texts = [None if i % 7 == 3 else f"\u00fcber {i}" for i in range(2000)]
    columns = {"id": list(range(2000)), "other": ["no"] * 2000, "text": texts}
    path = write_parquet(tmp_path / "a.bin", columns, rows=300)
    said: list[str] = []
    assert "".join(find(path, said=said).text()) == "\n\n".join(text for text in texts if text)
    assert [line.split(":")[0] for line in said] == ["a.bin", "note"]
    assert "converting" in said[0]
    assert f"{sum(text is None for text in texts)} of the 2,000 texts" in said[1]


def test_the_only_column_with_text_is_taken_and_of_several_none(tmp_path: Path) -> None:
    assert text_of(write_parquet(tmp_path / "one.parquet", {"n": [1], "story": ["Once"]})) == "Once"
    with pytest.raises(
        InputError, match=r"two\.parquet has no column 'text', but several that hold text: q, a$"
    ):
        find(write_parquet(tmp_path / "two.parquet", {"q": ["?"], "n": [1], "a": ["!"]}))
    with pytest.raises(
        InputError, match=r"no column of .*none\.parquet holds text: there are n, m$"
    ):
        find(write_parquet(tmp_path / "none.parquet", {"n": [1], "m": [2.0]}))


def test_dictionaries_of_strings_are_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    assert text_of(write_parquet(tmp_path / "a.parquet", {"text": column})) == "a\n\nb\n\na"


def test_converted_text_stands_where_its_file_does_and_not_when_a_folder_names_it(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("first")
    (folder / "c.txt").write_text("third")
    write_parquet(folder / "b.parquet", {"text": ["second"]})
    assert (
        text_of(folder / "c.txt", folder / "b.parquet", folder / "a.txt")
        == "first\n\nsecond\n\nthird"
    )
    assert text_of(folder / "*") == "first\n\nsecond\n\nthird"
    assert text_of(folder) == "first\n\nthird"


def test_a_second_run_does_not_convert_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    again = tmp_path / "b.parquet"
    again.write_bytes(first.read_bytes())
    said: list[str] = []
    source = find(first, said=said)
    assert len(said) == 1
    assert find(first, said=said).files == find(again, said=said).files == source.files
    assert len(said) == 1
    Path(source.files[0].path).write_text("one\n\ntwO")  # damaged in the cache
    assert find(first, said=said).files == source.files
    assert len(said) == 2
    assert text_of(first) == "one\n\ntwo"


def test_a_run_goes_on_with_the_converted_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    data = DataConfig(text_file=(str(path),))
    facts = {"files": [asdict(file) for file in find(path).files]}
    path.unlink()
    assert "".join(corpora.of_run(data, facts, lambda message: None).text()) == "one\n\ntwo"
    Path(facts["files"][0]["path"]).unlink()
    with pytest.raises(DamagedError, match="or was converted"):
        corpora.of_run(data, facts, lambda message: None)


@pytest.mark.parametrize("harm", ["cut", "middle", "footer", "magic", "lies"])
def test_a_parquet_file_that_is_none_is_named(harm: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(500)]})
    body = path.read_bytes()
    path.write_bytes(
        {
            "cut": body[:-100],
            "middle": body[:40] + b"\xff" * (len(body) // 2) + body[40 + len(body) // 2 :],
            "footer": body[:-8] + b"\xff\xff\xff\x7fPAR1",
            "magic": b"PAR1" + b"\0" * 5000 + b"PAR1",
            "lies": b"<html>Welcome to this hotel</html>",
        }[harm]
    )
    with pytest.raises(
        InputError, match=r"a\.parquet is (a damaged parquet file|called a parquet file)"
    ) as caught:
        find(path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.txt"))


def test_text_that_begins_like_a_parquet_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "golf.txt").write_text("PAR1 is an easy hole.")
    assert text_of(tmp_path / "golf.txt") == "PAR1 is an easy hole."


@pytest.mark.parametrize(
    ("library", "name"), [("pyarrow", "a.parquet"), ("mwparserfromhell", "a.xml")]
)
def test_a_missing_library_is_one_line_with_the_cure(
    library: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    body = b"PAR1\0\0\0PAR1" if name.endswith("parquet") else dump(page("A", "text")).encode()
    (tmp_path / name).write_bytes(body)
    with pytest.raises(
        InputError, match=rf"needs the library {library}: pip install 'glasslm\[hub\]'"
    ):
        find(tmp_path / name)


# --- MediaWiki --------------------------------------------------------------------------------------------------------

SITE = """<siteinfo><sitename>Wikipedia</sitename><namespaces><namespace key="0" case="first-letter" />
<namespace key="6" case="first-letter">Datei</namespace><namespace key="14">Kategorie</namespace></namespaces>
</siteinfo>"""


def page(
    title: str, text: str, namespace: int = 0, inside: str = "", model: str = "wikitext"
) -> str:
    return (
        f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>1</id>{inside}<revision><id>2</id><contributor>"
        f"<username>Somebody</username><id>3</id></contributor><comment>text</comment><model>{model}</model>"
        f'<format>text/x-wiki</format><text bytes="9" xml:space="preserve">{escape(text)}</text></revision></page>'
    )


def dump(*pages: str, site: str = SITE) -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" '
        f'version="0.11" xml:lang="de">{site}{"".join(pages)}</mediawiki>\n'
    )


def needs_parser() -> None:
    pytest.importorskip("mwparserfromhell")


MARKUP = """{{Infobox person|name=Ada}}
'''Ada Lovelace''' was an [[England|English]] ''mathematician''.<ref>{{cite|x}} A note.</ref> She &amp;
[[Babbage]] &ndash; [[Datei:Ada.jpg|thumb|A [[picture]]]] met.
{| class="wikitable"
| a table
|}
== Life ==
* born <math>1815</math>
* [https://example.org a link] [[:Kategorie:Frau|of women]]<br />end
__NOTOC__
[[Kategorie:Frau]][[Category:Mathematicians]]
<!-- hidden -->"""
PLAIN = """Ada Lovelace was an English mathematician. She &
Babbage \u2013  met.
Life
born
a link of women
end"""


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("packed", [False, True])
def test_articles_come_as_plain_text_title_first(packed: bool, tmp_path: Path) -> None:
    needs_parser()
    body = dump(
        page("Ada Lovelace", MARKUP),
        page("Ada", "#REDIRECT [[Ada Lovelace]]", inside='<redirect title="Ada Lovelace" />'),
        page("Talk:Ada", "chatter", namespace=1),
        page("Data", "{}", model="json"),
        page("A & B", "Both."),
    ).encode()
    path = tmp_path / "dump.data"  # by content, not by name
    path.write_bytes(
        bz2.compress(body[:700]) + bz2.compress(body[700:]) if packed else b"\xef\xbb\xbf" + body
    )
    first, _, second = text_of(path).partition("\n\nA & B\n\n")
    assert first.startswith("Ada Lovelace\n\n")
    assert lines(first)[1:] == lines(PLAIN)
    assert second == "Both."


def test_a_folder_takes_a_dump_for_the_text_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.xml").write_text(dump(page("A", "B")), encoding="utf-8")
    assert text_of(folder).startswith("<?xml")


def bomb() -> str:
    """A billion laughs (CVE-2003-1564), in a dump."""
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    body = dump(page("A", "LAUGH")).replace("LAUGH", "&l9;")
    return body.replace(
        "<mediawiki", f'<!DOCTYPE mediawiki [<!ENTITY l0 "ha">{entities}]><mediawiki', 1
    )


def test_a_billion_laughs_stay_unlaughed(tmp_path: Path) -> None:
    """A document type comes before the root, so such a file is not even taken for a dump; nor would it be read."""
    needs_parser()
    path = tmp_path / "bomb.xml"
    path.write_text(bomb(), encoding="utf-8")
    assert text_of(path) == bomb()
    with pytest.raises(InputError, match="declares a document type"):
        list(mediawiki.articles(path))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("cut", "no element found|unclosed"),
        ("packed and cut", "ended before"),
        ("packed and altered", "nvalid data"),
        ("long page", "more than 4,000,000 characters"),
        ("deep", "nested 9 deep"),
        ("long comment", "goes on for more than 1,000,000 bytes"),
        ("long tag", "goes on for more than 1,000,000 bytes"),
        ("no xml", "not well-formed|mismatched"),
        ("entity", "undefined entity"),
    ],
)
def test_a_dump_that_is_damaged_or_hostile_is_named(harm: str, says: str, tmp_path: Path) -> None:
    needs_parser()
    body = dump(
        *(page(f"Title {i}", f"Text {i * 7919} of this page.", 1) for i in range(3000))
    ).encode()
    start = body[: body.index(b"<page>")]
    if harm.startswith("packed"):
        packed = bz2.compress(body)
        half = len(packed) // 2
        body = (
            packed[:half]
            if harm == "packed and cut"
            else packed[:half] + b"?" * 99 + packed[half + 99 :]
        )
    (tmp_path / "a.xml").write_bytes(
        {
            "cut": body[:50_000],
            "long page": start + b"<page><text>" + b"x " * 3_000_000,
            "deep": start + b"<a>" * 1000,
            "long comment": start + b"<!-- " + b"x " * 3_000_000,
            "long tag": start + b'<page a="' + b"x " * 3_000_000,
            "no xml": body[:50_000] + b"</oops>" + body[50_000:],
            "entity": start + b"<page><text>&lol;</text></page></mediawiki>",
        }.get(harm, body)
    )
    with pytest.raises(
        InputError, match=rf"a\.xml cannot be read as a MediaWiki dump \(.*({says})"
    ):
        find(tmp_path / "a.xml")
    assert not list((tmp_path / "cache").rglob("*.txt"))


def test_a_large_dump_takes_little_memory(tmp_path: Path) -> None:
    """14 MB of pages that are no articles, in a file of a few kB."""
    needs_parser()
    begin, end = dump(page("A", "The only article.")).split("<page>")
    other = page("Talk:A", "chatter " * 12_000, namespace=1)
    streams = (begin, *[other] * 150, "<page>" + end)
    packed = {text: bz2.compress(text.encode(), 1) for text in set(streams)}
    path = tmp_path / "large.xml.bz2"
    path.write_bytes(b"".join(packed[text] for text in streams))
    size = sum(map(len, streams))
    tracemalloc.start()
    try:
        assert text_of(path) == "A\n\nThe only article."
        assert tracemalloc.get_traced_memory()[1] < size / 3
    finally:
        tracemalloc.stop()


def test_pages_that_the_parser_hangs_or_dies_of_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 kB of `<li><!--` keep mwparserfromhell 0.7.2 busy for minutes."""
    needs_parser()
    monkeypatch.setattr(mediawiki, "PATIENCE_S", 1.5)
    bad = page("Bad", "<li><!--" * 1000 + ";</ref>")
    path = tmp_path / "a.xml"
    path.write_text(
        dump(page("A", "one"), bad, page("B", "two"), page("Empty", "{{only|a|template}}")),
        encoding="utf-8",
    )
    said: list[str] = []
    assert "".join(find(path, said=said).text()) == "A\n\none\n\nB\n\ntwo"
    assert said[-1] == "note: 2 of the 4 texts in a.xml are empty or cannot be read, and left out"


def test_a_parser_that_does_not_start_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_parser()
    monkeypatch.setattr(mediawiki, "PARSER", "no_such_parser")
    (tmp_path / "a.xml").write_text(dump(page("A", "one"), page("B", "two")), encoding="utf-8")
    with pytest.raises(InputError, match=r"does not start .*no_such_parser"):
        find(tmp_path / "a.xml")


def test_a_parser_that_dies_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_parser()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(mediawiki, "PARSER", "dying_parser")
    (tmp_path / "dying_parser.py").write_text(
        "import json, os, sys\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n    markup, unshown = json.loads(line)\n"
        "    if markup == 'die': os._exit(1)\n    print(json.dumps(markup.upper()), flush=True)\n"
    )
    (tmp_path / "a.xml").write_text(
        dump(page("A", "one"), page("B", "die"), page("C", "three")), encoding="utf-8"
    )
    assert text_of(tmp_path / "a.xml") == "A\n\nONE\n\nC\n\nTHREE"
