"""Parquet files given by --text-file: converted once, recognized by content, damaged or not."""

from __future__ import annotations

import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from glasslm.config.schema import DataConfig
from glasslm.data.sources import corpora, text_files
from glasslm.errors import DamagedError, InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))


def find_files(*paths: Path, messages: list[str] | None = None) -> text_files.Source:
    notify = (lambda message: None) if messages is None else messages.append
    return corpora.find_source(DataConfig(text_file=tuple(map(str, paths))), notify)


def text_of(*paths: Path) -> str:
    return "".join(find_files(*paths).text())


def write_parquet(path: Path, columns: dict[str, Any], rows: int = 1000) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def test_the_texts_of_a_parquet_file_are_joined_by_blank_lines(tmp_path: Path) -> None:
    texts = [None if i % 7 == 3 else f"\u00fcber {i}" for i in range(2000)]
    columns = {"id": list(range(2000)), "other": ["no"] * 2000, "text": texts}
    path = write_parquet(tmp_path / "a.bin", columns, rows=300)
    messages: list[str] = []
    assert "".join(find_files(path, messages=messages).text()) == "\n\n".join(
        text for text in texts if text
    )
    assert [line.split(":")[0] for line in messages] == ["a.bin", "note"]
    assert "converting" in messages[0]
    assert f"{sum(text is None for text in texts)} of the 2,000 texts" in messages[1]


def test_the_only_column_with_text_is_taken_and_of_several_none(tmp_path: Path) -> None:
    assert text_of(write_parquet(tmp_path / "one.parquet", {"n": [1], "story": ["Once"]})) == "Once"
    with pytest.raises(
        InputError,
        match=r"two\.parquet has no column 'text', but several that hold text, q, a: rename the",
    ):
        find_files(write_parquet(tmp_path / "two.parquet", {"q": ["?"], "n": [1], "a": ["!"]}))
    with pytest.raises(
        InputError, match=r"no column of .*none\.parquet holds text: there are n, m$"
    ):
        find_files(write_parquet(tmp_path / "none.parquet", {"n": [1], "m": [2.0]}))


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
    messages: list[str] = []
    source = find_files(first, messages=messages)
    assert len(messages) == 1
    assert (
        find_files(first, messages=messages).files
        == find_files(again, messages=messages).files
        == source.files
    )
    assert len(messages) == 1
    Path(source.files[0].path).write_text("one\n\ntwO")  # damaged in the cache
    assert find_files(first, messages=messages).files == source.files
    assert len(messages) == 2
    assert text_of(first) == "one\n\ntwo"


def test_a_run_goes_on_with_the_converted_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    data = DataConfig(text_file=(str(path),))
    source = find_files(path)
    facts = {"files": [asdict(file) for file in source.files]}
    converted, original = Path(facts["files"][0]["path"]), path.read_bytes()
    path.unlink()
    assert (
        "".join(corpora.find_run_source(data, facts, lambda message: None).text()) == "one\n\ntwo"
    )
    converted.unlink()
    path.write_bytes(original)  # then the text is converted again
    assert corpora.find_run_source(data, facts, lambda message: None).files == source.files
    converted.unlink()
    write_parquet(path, {"text": ["one", "three"]})
    with pytest.raises(DamagedError, match="or was converted"):
        corpora.find_run_source(data, facts, lambda message: None)
    path.unlink()
    with pytest.raises(DamagedError, match="or was converted"):
        corpora.find_run_source(data, facts, lambda message: None)


@pytest.mark.parametrize("damage", ["cut", "middle", "footer", "magic", "lies"])
def test_a_damaged_parquet_file_is_named(damage: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(500)]})
    body = path.read_bytes()
    path.write_bytes(
        {
            "cut": body[:-100],
            "middle": body[:40] + b"\xff" * (len(body) // 2) + body[40 + len(body) // 2 :],
            "footer": body[:-8] + b"\xff\xff\xff\x7fPAR1",
            "magic": b"PAR1" + b"\0" * 5000 + b"PAR1",
            "lies": b"<html>Welcome to this hotel</html>",
        }[damage]
    )
    with pytest.raises(
        InputError, match=r"a\.parquet is (a damaged parquet file|called a parquet file)"
    ) as caught:
        find_files(path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.txt"))


@pytest.mark.parametrize("kind", ["dictionary", "one long text", "many texts"])
def test_a_file_that_unpacks_to_gigabytes_is_refused(kind: str, tmp_path: Path) -> None:
    """Also where the size that the file states is small: a dictionary has one copy of a text."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    if kind == "dictionary":
        noise = random.Random(0).randbytes(15_000).hex()
        texts = pyarrow.array(["a" * 1_000_000 + noise])
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 500_000), texts)
        parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
    else:
        texts = ["b" * 60_000_000] if kind == "one long text" else ["b" * 30_000] * 2000
        table = pyarrow.table({"text": texts})
        parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(
        InputError, match=r"a\.parquet has [\d.]+ kB, but unpacks to [\d.]+ MB or more; expected"
    ):
        find_files(path)
    assert not list((tmp_path / "cache").rglob("*.txt"))


def test_text_that_begins_like_a_parquet_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "golf.txt").write_text("PAR1 is an easy hole.")
    assert text_of(tmp_path / "golf.txt") == "PAR1 is an easy hole."


def test_a_missing_library_is_one_line_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1\0\0\0PAR1")
    with pytest.raises(
        InputError, match=r"needs the library pyarrow: pip install 'glasslm\[hub\]'"
    ):
        find_files(tmp_path / "a.parquet")
