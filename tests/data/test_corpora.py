"""Files and corpora: the paths and their order, every character read once, and dumps refused."""

from __future__ import annotations

import bz2
import io
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.schema import DataConfig
from glasslm.data.sources import corpora, text_files
from glasslm.data.sources.text_files import Source, source_file
from glasslm.errors import DamagedError, InputError
from glasslm.text import Notify


def quiet(message: str) -> None:
    pass


def find_files(*names: Path | str, notify: Notify = quiet) -> Source:
    return corpora.find_source(DataConfig(text_file=tuple(map(str, names))), notify)


def text_of(source: Source, errors: str = "strict") -> str:
    return "".join(source.text(errors))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text, nested text, something hidden and something binary."""
    for name, body in {
        "b.txt": b"second",
        "a.txt": b"first",
        "deep/c.md": b"third",
        ".hidden": b"not this",
        ".git/config": b"nor this",
        "picture.png": b"\x89PNG\0\0",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
    return tmp_path


def test_a_folder_gives_its_text_files_in_order_and_lists_the_rest(folder: Path) -> None:
    messages: list[str] = []
    source = find_files(folder, notify=messages.append)
    assert text_of(source) == "first\n\nsecond\n\nthird"
    assert messages == [
        f"note: {folder}: left out 3 of its files and folders: "
        ".git (hidden), .hidden (hidden), picture.png (a PNG image)"
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b.txt", "a.txt"], "first\n\nsecond"),
        (["*.txt"], "first\n\nsecond"),
        (["**/*.md"], "third"),
        (["deep", "b.txt"], "second\n\nthird"),
        (["a.txt", "*.txt", "./a.txt"], "first\n\nsecond"),
    ],
)
def test_files_folders_and_patterns_mix(folder: Path, names: list[str], expected: str) -> None:
    assert text_of(find_files(*(folder / name for name in names))) == expected


def test_standard_input_is_kept_so_that_it_can_be_read_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("wörter\r\n".encode())))
    source = find_files("-")
    assert source.name == "stdin"
    assert text_of(source) == text_of(source) == "wörter\r\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_like_standard_input(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [sys.executable, "-c", f"open({str(pipe)!r}, 'w').write('through a pipe')"]
    ):
        assert text_of(find_files(pipe)) == "through a pipe"


def test_paths_are_absolute_wherever_they_were_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "deep")
    source = find_files("../b.txt", "c.md", "../a.*")
    assert [Path(file.path) for file in source.files] == [
        folder / "a.txt",
        folder / "b.txt",
        folder / "deep" / "c.md",
    ]


def test_the_text_of_a_run_is_that_of_its_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(text_file=("*.txt", "deep"))
    monkeypatch.chdir(folder)
    source = corpora.find_source(data, quiet)
    facts = {"files": [asdict(file) for file in source.files]}
    monkeypatch.chdir(folder / "deep")
    (folder / "c.txt").write_text("not there when the run was made")
    assert corpora.find_run_source(data, facts, quiet).files == source.files
    (folder / "b.txt").write_text("other")
    with pytest.raises(
        DamagedError,
        match=rf"b\.txt has changed .* was {source.files[1].sha256}, it is [0-9a-f]{{64}} now",
    ):
        corpora.find_run_source(data, facts, quiet)
    (folder / "b.txt").unlink()
    with pytest.raises(
        DamagedError, match=rf"b\.txt, on which .* is gone: .* sha256 {source.files[1].sha256}"
    ):
        corpora.find_run_source(data, facts, quiet)


def test_a_run_from_standard_input_does_not_read_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"only once")))
    data = DataConfig(text_file=("-",))
    facts = {"files": [asdict(file) for file in corpora.find_source(data, quiet).files]}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"something else")))
    assert text_of(corpora.find_run_source(data, facts, quiet)) == "only once"
    Path(facts["files"][0]["path"]).unlink()
    with pytest.raises(DamagedError, match="a copy of what came through a pipe"):
        corpora.find_run_source(data, facts, quiet)


def test_identity_is_of_contents_not_paths(tmp_path: Path) -> None:
    for name, body in {"a": "x", "b": "y", "c": "x", "d": "z"}.items():
        (tmp_path / name).write_text(body)
    assert find_files(tmp_path / "a").sha256 == find_files(tmp_path / "c").sha256
    assert (
        len(
            {
                find_files(*(tmp_path / n for n in names)).sha256
                for names in ("a", "b", "ab", "ad", "bc")
            }
        )
        == 5
    )


def test_byte_order_mark_goes_carriage_returns_and_nuls_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeffa\r\nb\0\ufeffc".encode())
    assert text_of(find_files(tmp_path / "a")) == "a\r\nb\0\ufeffc"


@given(text=st.text(min_size=1), chunk=st.integers(1, 7))
def test_chunks_never_cut_a_character(
    tmp_path_factory: pytest.TempPathFactory, text: str, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "text"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            text_files, "CHUNK_BYTES", chunk + 2
        )  # the mark at the beginning comes in one piece
        assert text_of(Source("t", (source_file(path),))) == text


@given(
    before=st.text(),
    bad=st.sampled_from([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf5\x80"]),
    chunk=st.integers(3, 9),
)
def test_bad_utf8_is_named_with_its_offset(
    tmp_path_factory: pytest.TempPathFactory, before: str, bad: bytes, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("bad") / "text"
    path.write_bytes(b"-" + before.encode() + bad + b" after")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", chunk)
        source = Source("t", (source_file(path),))
        with pytest.raises(
            InputError, match=rf"text is not UTF-8: .* at offset {1 + len(before.encode())} "
        ):
            text_of(source)
        assert text_of(source, "replace") == path.read_bytes().decode("utf-8", "replace")


def test_the_python_corpus_is_code_that_every_machine_has() -> None:
    messages: list[str] = []
    source = corpora.find_source(DataConfig(corpus="python"), messages.append)
    text = text_of(source)
    assert not source.fallback
    assert text.isascii()
    assert 1_000_000 < len(text) <= 5_000_000
    assert source.sha256 in messages[0]
    assert not any("/test/" in Path(file.path).as_posix() for file in source.files)
    assert [file.path for file in source.files] == sorted(file.path for file in source.files)
    assert source == corpora.find_source(DataConfig(corpus="python"), quiet)


def test_shakespeare_is_taken_from_the_cache(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "shakespeare.txt").write_bytes(
        (data_dir / "tinyshakespeare.txt").read_bytes()
    )
    source = corpora.find_source(DataConfig(), quiet)
    assert (source.name, source.fallback, len(text_of(source))) == ("shakespeare", False, 1_115_394)


DUMP = """<?xml version="1.0" encoding="utf-8"?>
<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
<page><title>Ada</title><revision><text>[[Ada]]</text></revision></page></mediawiki>
"""


@pytest.mark.parametrize("name", ["dump.xml", "dump.xml.bz2", "dump.data"])
def test_a_mediawiki_dump_is_refused_with_the_flags_that_replace_it(
    name: str, tmp_path: Path
) -> None:
    body = DUMP.encode()
    packed = bz2.compress(body) if name.endswith("bz2") else b"\xef\xbb\xbf" + body
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(
        InputError, match=r"is a MediaWiki dump.* --corpus wikipedia, .* --hf-dataset"
    ):
        find_files(tmp_path / name)


def test_other_xml_and_a_dump_in_a_folder_are_text(tmp_path: Path) -> None:
    page = "<html><mediawiki/></html>"
    (tmp_path / "page.xml").write_text(page)
    assert text_of(find_files(tmp_path / "page.xml")) == page
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "dump.xml").write_text(DUMP, newline="")
    assert text_of(find_files(tmp_path / "folder")) == DUMP
