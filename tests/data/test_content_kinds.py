"""What is no UTF-8 text is recognized by its content, whatever its name, and named with a cure."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import os
import pickle
import random
import sqlite3
import struct
import subprocess
import sys
import tarfile
import wave
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from glasslm.config.schema import DataConfig
from glasslm.data.dataset import prepare_dataset
from glasslm.data.sources import corpora
from glasslm.data.sources.content_kinds import HEAD_BYTES, detect_markup, identify_content
from glasslm.errors import InputError

ENGLISH = "All human beings are born free and equal in dignity and rights.\r\n" * 9
JAPANESE = (
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。\n" * 9
)
CHINESE = "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。\n" * 9
TAIWANESE = "人人生而自由,在尊嚴和權利上一律平等。他們賦有理性和良心。\n" * 9
KOREAN = "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.\n" * 9
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах.\n" * 9
GREEK = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.\n" * 9
HEBREW = "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.\n" * 9
ARABIC = "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.\n" * 9
THAI = "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ\n" * 9
CZECH = "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.\n" * 9
TURKISH = "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.\n" * 9
GERMAN = "Alle Menschen sind frei und gleich an Würde und Rechten geboren.\n" * 9


def zip_bytes(*names: str) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name in names:
            archive.writestr(name, "<content/>")
    return body.getvalue()


def tar_bytes() -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return body.getvalue()


def wave_bytes() -> bytes:
    body = io.BytesIO()
    with wave.open(body, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(100))
    return body.getvalue()


def npy_bytes() -> bytes:
    body = io.BytesIO()
    np.save(body, np.arange(9))
    return body.getvalue()


def npz_bytes() -> bytes:
    body = io.BytesIO()
    np.savez(body, weights=np.arange(9))
    return body.getvalue()


def png_bytes() -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


# Content, and what the message says of it.
BINARY = {
    "gzip": (gzip.compress(ENGLISH.encode()), "a gzip file", "gunzip -c <"),
    "bzip2": (bz2.compress(ENGLISH.encode()), "a bzip2 file", "bunzip2 -c <"),
    "xz": (lzma.compress(ENGLISH.encode()), "an xz file", "unxz -c <"),
    "lzma": (lzma.compress(ENGLISH.encode(), lzma.FORMAT_ALONE), "an lzma file", "unlzma"),
    "zstd": (b"\x28\xb5\x2f\xfd\x20\x05\x29\0\0hello", "a zstd file", "unzstd"),
    "zip": (zip_bytes("a.txt"), "a zip archive", "unzip"),
    "docx": (zip_bytes("[Content_Types].xml", "word/document.xml"), "a Word document", "pandoc"),
    "xlsx": (zip_bytes("[Content_Types].xml", "xl/workbook.xml"), "Excel workbook", "csv"),
    "odt": (zip_bytes("mimetype", "content.xml"), "an OpenDocument file", "libreoffice"),
    "epub": (zip_bytes("mimetype", "META-INF/container.xml"), "an EPUB book", "pandoc"),
    "broken zip": (b"PK\3\4" + bytes(40), "a zip archive", "unzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive", "7z x"),
    "rar": (b"Rar!\x1a\x07\x01\0", "a rar archive", "unrar x"),
    "tar": (tar_bytes(), "a tar archive", "tar -xf"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\n", "a PDF document", "pdftotext"),
    "doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(50), "an Office document", "libreoffice"),
    "png": (png_bytes(), "a PNG image", "tesseract"),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "a JPEG image", "tesseract"),
    "gif": (b"GIF89a\1\0\1\0\x80\0\0", "a GIF image", "tesseract"),
    "webp": (b"RIFF\x1a\0\0\0WEBPVP8L", "a WebP image", "tesseract"),
    "wav": (wave_bytes(), "a WAV recording", "whisper"),
    "mp3": (b"ID3\4\0\0\0\0\0\0", "an MP3 recording", "whisper"),
    "ogg": (b"OggS\0\2\0\0", "an Ogg recording", "whisper"),
    "mp4": (b"\0\0\0\x20ftypisom\0\0\2\0", "an MP4 recording", "whisper"),
    "webm": (b"\x1a\x45\xdf\xa3\x9f\x42", "a Matroska or WebM video", "whisper"),
    "program": (Path(sys.executable).read_bytes()[:9000], "program", "leave it out"),
    "exe": (b"MZ\x90\0\3\0\0\0", "a Windows program", "leave it out"),
    "sqlite": (b"SQLite format 3\0\x10\0", "an SQLite database", ".dump"),
    "arrow": (b"ARROW1\0\0\xff\xff\xff\xff", "an Arrow file", "parquet"),
    "npy": (npy_bytes(), "a NumPy array", "leave it out"),
    "safetensors": (save({"a": np.zeros(3)}), "a safetensors file", "leave it out"),
    "pickle": (pickle.dumps({"a": [1, 2.5]}), "a pickle", "never opened"),
    "large pickle": (pickle.dumps(ENGLISH * 200, 4), "a pickle", "never opened"),
    "npz": (npz_bytes(), "a file of NumPy arrays", "leave it out"),
    "pyc": (importlib.util.MAGIC_NUMBER + bytes(12) + b"\xe3", "a compiled Python file", "leave"),
    "late pdf": (b"\n junk\n%PDF-1.4\n%\xe2\xe3\n1 0 obj\n", "a PDF document", "pdftotext"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image", "tesseract"),
    "avro": (b"Obj\x01\x04\x14avro.codec\x08null\0\xd0", "an Avro file", "parquet"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer", "git lfs"),
    "brotli": (np.random.default_rng(0).bytes(3000), "binary data", "leave it out"),
    "old pickle": (pickle.dumps({"a": [1, 2.5]}, 2), "a pickle", "never opened"),
}
ENCODED = {
    f"{encoding}, {text[:8]!r}": (text.encode(encoding), encoding)
    for text in (ENGLISH, JAPANESE, CHINESE, RUSSIAN)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
}
LEGACY = {
    "SHIFT_JIS": JAPANESE.encode("shift_jis"),
    "EUC-JP": JAPANESE.encode("euc_jp"),
    "GB18030": CHINESE.encode("gb18030"),
    "WINDOWS-1251": RUSSIAN.encode("cp1251"),
    "KOI8-R": RUSSIAN.encode("koi8-r"),
    "CP866": RUSSIAN.encode("cp866"),
    "ISO-8859-5": RUSSIAN.encode("iso8859-5"),
    "WINDOWS-1253": GREEK.encode("cp1253"),
    "WINDOWS-1255": HEBREW.encode("cp1255"),
    "WINDOWS-1256": ARABIC.encode("cp1256"),
    "TIS-620": THAI.encode("tis-620"),
    "WINDOWS-1250": CZECH.encode("cp1250"),
    "WINDOWS-1254": TURKISH.encode("cp1254"),
    "WINDOWS-1252": GERMAN.encode("cp1252"),
    "IBM037": ENGLISH.encode("cp037"),
}


def prepare(*paths: Path, **settings: str) -> list[str]:
    """Prepare the tokens of files; returns the messages."""
    messages: list[str] = []
    data = DataConfig(text_file=tuple(map(str, paths)), **settings)  # type: ignore[arg-type]
    prepare_dataset(data, corpora.find_source(data, messages.append), messages.append)
    return messages


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_binary_content_is_named_with_a_command(name: str, errors: str, tmp_path: Path) -> None:
    body, kind, cure = BINARY[name]
    path = tmp_path / "notes.txt"
    path.write_bytes(body)
    with pytest.raises(InputError) as caught:
        prepare(path, encoding_errors=errors)
    message = str(caught.value)
    for part in (kind, cure, str(path)):
        assert part in message
    assert "\n" not in message
    (tmp_path / "other.txt").write_text(ENGLISH)
    (note,) = prepare(tmp_path)
    assert f"left out 1 of its files and folders: notes.txt ({kind[0]}" in note or kind in note


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_wide_encodings_are_recognized_with_and_without_a_mark(
    name: str, errors: str, tmp_path: Path
) -> None:
    body, encoding = ENCODED[name]
    path = tmp_path / "notes.txt"
    path.write_bytes(body)
    with pytest.raises(InputError, match=rf"is {encoding[:6].upper()}\w* text, .*: .*iconv -f UTF"):
        prepare(path, encoding_errors=errors)
    with pytest.raises(InputError, match="iconv"):  # it is text: a folder may not leave it out
        prepare(tmp_path, encoding_errors=errors)


def letters(first: int, last: int, n: int, seed: int = 0) -> str:
    """`n` random letters of a range, without blanks and full stops."""
    draw = random.Random(seed)
    known = [chr(i) for i in range(first, last + 1) if chr(i).isalpha()]
    return "".join(draw.choices(known, k=n))


SCRIPTS = {
    "Latin": (0x61, 0x7A), "Greek": (0x3B1, 0x3C9), "Cyrillic": (0x410, 0x44F),
    "Hebrew": (0x5D0, 0x5EA), "Arabic": (0x621, 0x64A), "Devanagari": (0x905, 0x939),
    "Thai": (0xE01, 0xE2E), "Georgian": (0x10D0, 0x10F0), "kana": (0x3041, 0x3096),
    "Han": (0x4E00, 0x9FA5), "Hangul": (0xAC00, 0xD7A3),
}  # fmt: skip
ENCODINGS = {
    "Latin": ["latin-1", "cp500", "mac_roman"], "Greek": ["cp1253"], "Hebrew": ["cp1255"],
    "Cyrillic": ["koi8-r", "cp1251", "cp866", "mac_cyrillic", "iso8859-5"],
    "Thai": ["tis-620"], "kana": ["shift_jis", "euc_jp"], "Hangul": ["cp949", "johab"],
    "Han": ["gb18030"],
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_wide_text_without_blanks_is_recognized(script: str, encoding: str) -> None:
    for n in (40, 300, 6000):
        for seed in range(5):
            head = letters(*SCRIPTS[script], n, seed).encode(encoding)[:HEAD_BYTES]
            kind = identify_content(head, "a.txt")
            assert kind is not None, (n, seed)
            assert encoding[:6].upper() in kind.name, (n, seed, kind)


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_encodings_are_no_wide_text(script: str) -> None:
    """UTF-8 and legacy encodings of each script, with and without blanks, from either byte."""
    for n in (33, 400, 5000):
        text = letters(*SCRIPTS[script], n, n)
        words = " ".join(text[i : i + 5] for i in range(0, n, 5))
        for sample in (text, words, " ".join(text)):
            for encoding in ["utf-8", *ENCODINGS.get(script, [])]:
                for start in (0, 1):
                    head = sample.encode(encoding, "ignore")[start:HEAD_BYTES]
                    kind = identify_content(head, "a.txt")
                    assert kind is None or "UTF" not in kind.name, (encoding, n, start, kind)


def test_random_bytes_are_no_wide_text() -> None:
    for seed in range(1000):
        draw = np.random.default_rng(seed)
        kind = identify_content(draw.bytes(int(draw.integers(1, 3000))), "a.txt")
        assert kind is None or "UTF" not in kind.name, seed


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        (KOREAN, "euc_kr", "EUC-KR"),
        (KOREAN, "cp949", "EUC-KR"),
        (TAIWANESE, "big5", "BIG5"),
        (CHINESE, "gb2312", "GB18030"),
        (GERMAN, "mac_roman", "MACINTOSH"),
        (GERMAN, "cp850", "CP850"),
        (ENGLISH, "cp500", "IBM037"),
    ],
)
def test_siblings_of_legacy_encodings_are_guessed(
    text: str, encoding: str, guess: str, tmp_path: Path
) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=f"iconv -f {guess} -t UTF-8"):
        prepare(path)


@pytest.mark.parametrize(
    "value",
    [["a", "b", 1.5], {"a": [1, 2]}, (1, 2), "a text\nof lines", {"x": {"y": (1, "z")}}, ["é"]],
    ids=repr,
)
def test_a_pickle_of_protocol_0_is_recognized(value: object) -> None:
    kind = identify_content(pickle.dumps(value, 0), "a.txt")
    assert kind is not None
    assert kind.name == "a pickle"


def test_calls_in_pickles_are_recognized_and_lists_of_words_are_no_pickles() -> None:
    kind = identify_content(b"cos\nsystem\n(S'true'\ntR.", "a.txt")
    assert kind is not None
    assert kind.name == "a pickle"
    for text in (b"cats\ndogs\n(and others)\n", b"(lp) is a name\n", b"Vienna\np0 is a zone\n"):
        assert identify_content(text * 9, "a.txt") is None


def test_chinese_in_hz_is_recognized_with_a_command_that_works(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(CHINESE.encode("hz"))
    with pytest.raises(InputError, match="is HZ text") as caught:
        prepare(path)
    command = str(caught.value).partition("convert it with python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    assert (tmp_path / "notes.txt.utf8").read_text(encoding="utf-8") == CHINESE
    prepare(tmp_path / "notes.txt.utf8", tokenizer="byte")


def test_strings_of_json_are_noted_and_dialogue_is_not() -> None:
    strings = "".join(json.dumps(f"line {i}\nand more") + "\n" for i in range(9))
    assert detect_markup(strings.encode()) == ("JSON strings, one a line", "jq -r .")
    dialogue = '"Who is there?"\n"It is I."\n"Come in," she said, and sat down.\n' * 9
    assert detect_markup(dialogue.encode()) is None


@pytest.mark.parametrize("encoding", LEGACY)
def test_a_legacy_encoding_is_guessed_and_replaced_only_by_force(
    encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(LEGACY[encoding])
    for errors, says in {
        "strict": r"is not UTF-8: byte 0x.. at offset \d+",
        "replace": r"of its bytes \([\d,]+\) would become U\+FFFD.*replace-all",
    }.items():
        with pytest.raises(InputError, match=rf"{says}.*|iconv -f {encoding} -t UTF-8") as caught:
            prepare(path, encoding_errors=errors)
        assert f"iconv -f {encoding} -t UTF-8" in str(caught.value)
    messages = prepare(path, encoding_errors="replace-all")
    assert any("U+FFFD" in message for message in messages)


@pytest.mark.parametrize("start", ["BMW", "MZ", "ID3", "GIF8", "OggS", "BZh"])
def test_a_legacy_text_is_not_taken_for_a_format_of_its_first_letters(
    start: str, tmp_path: Path
) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(start.encode() + GERMAN.encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8: byte 0xfc at offset"):
        prepare(path)


def test_a_few_bad_bytes_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(ENGLISH.encode() * 9 + b"\xff")
    assert prepare(path, encoding_errors="replace")
    path.write_bytes("\ufffd".encode() * 999)  # a U+FFFD that is there is no bad byte
    prepare(path, tokenizer="byte")


@pytest.mark.parametrize(
    "text",
    [
        "PK is a name.", "BM", "MZ was here", "GIF8 is no image", "BZh", "ID3 is a format",
        "%!PS", "Rar! he said", "RIFF raff WAVE", "7z", "\x1b[31mred\x1b[0m", '{"a": 1}',
        "find\0-print0\0", "\0\0\0\0", "ab\0", "éa\0", "OggS\n",
    ],
)  # fmt: skip
def test_text_that_begins_like_another_format_is_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text * 30, encoding="utf-8", newline="")
    prepare(path, tokenizer="byte")


def test_all_bad_files_are_listed_at_once(tmp_path: Path) -> None:
    for i in range(15):
        (tmp_path / f"{i:02}.txt").write_bytes(GERMAN.encode("latin-1" if i else "utf-8"))
    with pytest.raises(InputError) as caught:
        prepare(tmp_path)
    lines = str(caught.value).splitlines()
    assert [f"{i:02}.txt is not UTF-8" in line for i, line in enumerate(lines[:-1], 1)] == [
        True
    ] * 10
    assert lines[-1] == "and 4 more files"


def test_omitted_files_are_named_up_to_a_bound(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(ENGLISH)
    for i in range(14):
        (tmp_path / f"{i:02}.bin").write_bytes(b"some\0thing")
    (note,) = prepare(tmp_path)
    assert "left out 14 of its files" in note
    assert "00.bin (binary: it has NUL bytes)" in note
    assert note.endswith("09.bin (binary: it has NUL bytes) and 4 more")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals or links")
def test_links_to_folders_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(ENGLISH)
    (tmp_path / "texts" / "circle").symlink_to(tmp_path / "texts", target_is_directory=True)
    (note,) = prepare(tmp_path / "texts")
    assert note.endswith("left out 1 of its files and folders: circle (a link to a folder)")
    assert prepare(tmp_path / "texts" / "circle") == [note.replace("texts:", "texts/circle:")]


def test_the_files_of_the_validation_part_are_named(tmp_path: Path) -> None:
    for name in "abcdefghij":
        (tmp_path / f"{name}.txt").write_text(name * 98)
    (note,) = prepare(tmp_path)  # 998 bytes: the validation part begins in i.txt
    assert "validation part: 100 bytes of 2 of 10 files" in note
    assert note.index("i.txt") < note.index("j.txt")
    (note,) = prepare(tmp_path, val_fraction=0.05)  # type: ignore[arg-type]
    assert note.endswith("1 of 10 files, " + str(tmp_path / "j.txt"))
    assert prepare(tmp_path / "a.txt", tokenizer="byte") == []
    # Where a text has fewer or more bytes than its files, those of the validation part are unknown.
    (tmp_path / "a.txt").write_bytes(b"a" * 999 + b"\xff")
    notes = prepare(tmp_path, encoding_errors="replace")
    assert not any("validation part" in note for note in notes)
    (tmp_path / "a.txt").write_text("a#" * 98)
    notes = prepare(tmp_path, document_separator="#")  # type: ignore[arg-type]
    assert not any("validation part" in note for note in notes)
    notes = prepare(tmp_path, special_tokens=("<|end|>",))  # type: ignore[arg-type]
    assert "2 of 10 files" in notes[-1]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("<!DOCTYPE html>\n<html><p>Hello.</p></html>", "HTML"),
        ("\ufeff\n<HTML>", "HTML"),
        (r"{\rtf1\ansi Hello.}", "RTF"),
        ('<?xml version="1.0"?><a/>', "XML"),
        ("% a comment\n\\documentclass{article}\n", "LaTeX"),
        ('{"text": "one"}\n{"text": "two"}\n', "JSON lines"),
        ('{ "text" : "one"}\r\n{ "text" : "two"}\r\n', "JSON lines"),
        ('[\n {"text": "one"},\n {"text": "two"}\n]', "JSON"),
        ('{"text": "' + ENGLISH.strip() * 99 + '"}', "JSON"),
        ('{\n "cells": [], "nbformat": 4}', "a notebook"),
        ('<svg width="9"><text>Hello.</text></svg>', "XML or HTML"),
        ("%!PS-Adobe-3.0\n(Hello.) show\n", "PostScript"),
        ("1\r\n00:00:01,000 --> 00:00:02,000\r\nHello.\r\n", "a subtitle file"),
        ("WEBVTT\n\n00:01.000 --> 00:02.000\nHello.\n", "a subtitle file"),
        ("From a@b.org Sat Nov 28 2026\nSubject: Hello\n\nHello.\n", "email"),
        ("id,text\n" + '1,"Hello, world"\n' * 9, "CSV"),
        ("id\ttext\n" + "1\tHello.\n" * 9, "CSV"),
    ],
)
def test_markup_is_noted_and_kept(text: str, language: str, tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_text(text, encoding="utf-8")
    (note,) = prepare(path, tokenizer="byte")
    assert f"{path} is {language}, and the model learns the markup" in note


@pytest.mark.parametrize("encoding", ["iso2022_jp", "iso2022_kr", "utf-7"])
def test_text_in_seven_bits_is_recognized(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    text = "모든 인간은 자유롭다.\n" * 9 if encoding == "iso2022_kr" else JAPANESE
    path.write_bytes(text.encode(encoding))
    name = encoding.upper().replace("2022_", "-2022-")
    with pytest.raises(InputError, match=f"iconv -f {name}"):
        prepare(path)


@pytest.mark.parametrize(
    "text", ["def f(i):\n    return 1+cos(i)\n", "x = a+fraction - 2\n", "b = LIMIT+ELLIPSIS\n"]
)
def test_short_code_is_not_another_encoding(text: str) -> None:
    """Each is valid UTF-7 of CJK characters."""
    assert not text.encode().decode("utf-7").isascii()
    assert identify_content(text.encode(), "a.py") is None


@pytest.mark.parametrize(
    "text",
    [
        "1+1=2, a+b-c, C++, +49 30 123456 and x+yz+abcd\n",
        "Tyger, Tyger, burning bright,\nIn the forests of the night,\n",
        "<s> one sentence\n", "[1] a note\n", "{curly} words\n", "From here on, it is text.\n",
        "\x1b[1mbold\x1b[0m costs $5\n",
    ],
)  # fmt: skip
def test_plain_text_is_neither_markup_nor_another_encoding(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text * 20)
    assert prepare(path, tokenizer="byte") == []


def test_binary_data_after_text_is_named_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(ENGLISH.encode() * 30 + np.random.default_rng(0).bytes(9000))
    with pytest.raises(InputError, match=r"at offset 17,?5\d\d .* binary data begins"):
        prepare(path)


def test_a_database_of_sqlite_is_recognized(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "data.txt") as connection:
        connection.execute("create table t (a text)")
    connection.close()
    with pytest.raises(InputError, match="SQLite database"):
        prepare(tmp_path / "data.txt")
