"""Recognize what a file contains by its first bytes, and the command that makes text of it."""

from __future__ import annotations

import codecs
import collections
import csv
import json
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass

from glasslm.errors import InputError, explain_system_errors
from glasslm.text import quote_path

HEAD_BYTES = 8192  # of a file, by which its content is recognized
MAX_STRAY_SHARE = 0.01  # of the characters of UTF-16 that may be control characters
MIN_NUL_SHARE = 0.7  # of the high bytes of Western text in UTF-16
MIN_SPACE_SHARE = 0.01  # of the characters of UTF-16 that are white space or full stops
MIN_UNITS, MIN_DIFFERENT_UNITS = 32, 8  # of 16 bits, to recognize a script without blanks
MIN_ROW_SHARE = 0.9  # of the letters of an alphabet, which are in one row of 256 characters
# Rows of Unicode: alphabets up to Khmer, without the bytes of line ends, and kana.
ALPHABET_ROWS = {*range(1, 0x1E), 0x30} - {0x0A, 0x0D}
IDEOGRAPH_ROWS = {0x00, 0x30, *range(0x4E, 0xA0), *range(0xAC, 0xD8), 0xFF}
MIN_FOREIGN_SHARE = 0.2  # of a legacy text of another script, whose characters are not ASCII
MIN_SEVEN_BIT_SHARE = 0.01  # of the characters of text in 7 bits, which are not ASCII
MIN_EBCDIC_SHARE = 0.8  # of the characters of EBCDIC that are letters and blanks
MIN_BINARY_BYTES = 8
MIN_BINARY_SHARE = 0.01  # of bytes that are control characters, and of bytes that are not UTF-8
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
# Names of kinds that `glasslm import` recognizes, too.
GGUF, PICKLE, PYTORCH_ARCHIVE = "a GGUF model", "a pickle", "a PyTorch file"


@dataclass(frozen=True)
class ContentKind:
    """A kind of content. In `cure`, {path} stands for the path of the file."""

    name: str
    cure: str
    is_text: bool = False  # text in another encoding

    def explain(self, path: str) -> str:
        """A message that names the file, its content and the cure."""
        return f"{path} is {self.name}, not UTF-8 text: {self.cure.format(path=quote_path(path))}"


_NO_TEXT = "it holds no text; leave it out"
_RUNS_CODE = "it is never opened here, as it may run code; leave it out"
_RECOGNIZE = "recognize its letters first, with tesseract {path} {path}"
_TRANSCRIBE = "transcribe its speech first, with whisper {path}"
_UNKNOWN = "convert it with the program that made it, or leave it out"
_PANDOC = "convert it with pandoc -t plain -o {path}.txt {path}"
_OFFICE = "convert it with libreoffice --headless --convert-to {to} {{path}}"
_UNPACK = "unpack it with {command} {{path}}"
# Read through a pipe: gunzip and unxz refuse a file without their own suffix.
_DECOMPRESS = "unpack it with {command} -c < {{path}} > {{path}}.txt"

# (offset, first bytes, name, cure). Longer beginnings come before shorter ones that they include.
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b", "a gzip file", _DECOMPRESS.format(command="gunzip")),
    (0, b"BZh", "a bzip2 file", _DECOMPRESS.format(command="bunzip2")),
    (0, b"\xfd7zXZ\0", "an xz file", _DECOMPRESS.format(command="unxz")),
    (0, b"\x5d\0\0", "an lzma file", _DECOMPRESS.format(command="unlzma")),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", _DECOMPRESS.format(command="unzstd")),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", _DECOMPRESS.format(command="unlz4")),
    (0, b"\x1f\x9d", "a file of compress", _DECOMPRESS.format(command="uncompress")),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.format(command="7z x")),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK.format(command="unrar x")),
    (257, b"ustar", "a tar archive", _UNPACK.format(command="tar -xf")),
    (0, b"%PDF-", "a PDF document", "convert it with pdftotext {path}"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", _OFFICE.format(to="txt:Text")),
    (0, b"\x89PNG", "a PNG image", _RECOGNIZE),
    (0, b"\xff\xd8\xff", "a JPEG image", _RECOGNIZE),
    (0, b"GIF8", "a GIF image", _RECOGNIZE),
    (0, b"II*\0", "a TIFF image", _RECOGNIZE),
    (0, b"MM\0*", "a TIFF image", _RECOGNIZE),
    (0, b"BM", "a BMP image", _RECOGNIZE),
    (8, b"WEBP", "a WebP image", _RECOGNIZE),
    (8, b"WAVE", "a WAV recording", _TRANSCRIBE),
    (8, b"AVI ", "an AVI video", _TRANSCRIBE),
    (0, b"ID3", "an MP3 recording", _TRANSCRIBE),
    (0, b"\xff\xfb", "an MP3 recording", _TRANSCRIBE),
    (0, b"\xff\xf3", "an MP3 recording", _TRANSCRIBE),
    (0, b"OggS", "an Ogg recording", _TRANSCRIBE),
    (0, b"fLaC", "a FLAC recording", _TRANSCRIBE),
    (0, b"\xff\xf1", "an AAC recording", _TRANSCRIBE),
    (4, b"ftyphei", "a HEIC image", _RECOGNIZE),
    (4, b"ftypmif1", "a HEIC image", _RECOGNIZE),
    (4, b"ftypavif", "an AVIF image", _RECOGNIZE),
    (4, b"ftyp", "an MP4 recording", _TRANSCRIBE),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", _TRANSCRIBE),
    (0, b"\x7fELF", "an ELF program", _NO_TEXT),
    (0, b"MZ", "a Windows program", _NO_TEXT),
    (0, b"\xcf\xfa\xed\xfe", "a macOS program", _NO_TEXT),
    (0, b"\xce\xfa\xed\xfe", "a macOS program", _NO_TEXT),
    (0, b"\xca\xfe\xba\xbe", "a Java class or macOS program", _NO_TEXT),
    (0, b"\0asm", "a WebAssembly program", _NO_TEXT),
    (2, b"\r\n\0\0\0\0", "a compiled Python file", _NO_TEXT),
    (0, b"\0\1\0\0", "a font", _NO_TEXT),
    (0, b"SQLite format 3\0", "an SQLite database", "export it: sqlite3 {path} .dump > {path}.txt"),
    (0, b"PAR1", "a parquet file", "give its own name with --text-file, not that of its folder"),
    (0, b"ARROW1", "an Arrow file", "write its column of text as a parquet file"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "write its column of text as a parquet file"),
    (0, b"Obj\1", "an Avro file", "write its column of text as a parquet file"),
    (0, b"ORC", "an ORC file", "write its column of text as a parquet file"),
    (0, b"AT&TFORM", "a DjVu document", "convert it with djvutxt {path} {path}.txt"),
    (60, b"BOOKMOBI", "a Kindle book", "convert it with ebook-convert {path} {path}.txt"),
    (0, b"bplist00", "a binary property list", "convert it with plutil -convert xml1 {path}"),
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the text with git lfs pull"),
    (0, b"\x93NUMPY", "a NumPy array", _NO_TEXT),
    (0, b"\x89HDF\r\n", "an HDF5 file", _NO_TEXT),
    (0, b"GGUF", GGUF, _NO_TEXT),
    (0, b"\x80\x02", PICKLE, _RUNS_CODE),
    (0, b"\x80\x03", PICKLE, _RUNS_CODE),
    (0, b"\x80\x04", PICKLE, _RUNS_CODE),
    (0, b"\x80\x05", PICKLE, _RUNS_CODE),
)
# (a member of a zip archive, name, cure)
_ZIP_MEMBERS = (
    ("word/document.xml", "a Word document", _PANDOC),
    ("xl/workbook.xml", "an Excel workbook", _OFFICE.format(to="csv")),
    ("ppt/presentation.xml", "a PowerPoint presentation", _OFFICE.format(to="pdf")),
    ("META-INF/container.xml", "an EPUB book", _PANDOC),
    ("content.xml", "an OpenDocument file", _OFFICE.format(to="txt:Text")),
    (".npy", "a file of NumPy arrays", _NO_TEXT),
    ("data.pkl", PYTORCH_ARCHIVE, _RUNS_CODE),
)
_ICONV = "convert it with iconv -f {encoding} -t UTF-8 {{path}} > {{path}}.utf8"
_DECODE_HZ = (  # GNU iconv of Linux does not know it
    'convert it with python -X utf8 -c "import sys; '
    "print(sys.stdin.buffer.read().decode('hz'), end='')\" < {path} > {path}.utf8"
)
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Text in an encoding of 7 bits: (encoding, how its other letters begin, fewest of them). Sums in
# code, such as 1+cos(x), are UTF-7 of a few other letters.
_SEVEN_BITS = (
    ("ISO-2022-JP", rb"\x1b\$[@B]", 1),
    ("ISO-2022-KR", rb"\x1b\$\)C", 1),
    ("UTF-7", rb"\+[A-Za-z0-9+/]{3}", 8),
    ("HZ", rb"~\{", 1),
)
# A pickle of protocol 0 is ASCII: a list, a dictionary, a tuple or a call.
_ASCII_PICKLE = re.compile(
    rb"\([ld]p\d+\n|\((?:[IVFLS][^\n]*\n(?:p\d+\n)?)+tp\d+\n"
    rb"|c[\w.]+\n[\w.]+\n(?:p\d+\n|\(\(?[SVI])|[SV][^\n]*\np\d+\n\."
)
# Encodings of one byte a letter, with frequent letters of their languages beyond ASCII. The first
# encoding with the largest share of such letters is the guess.
_WESTERN = "äöüßéèêàçñáíóúãõåæøîôâïëùûœ“”„‘’–…"
_ALPHABETS = (
    ("WINDOWS-1252", _WESTERN),
    ("MACINTOSH", _WESTERN),
    ("CP850", _WESTERN),
    ("WINDOWS-1250", "ěščřžýáíéůúťďňąćęłńóśźżőűöü"),
    ("WINDOWS-1254", "çğıöşüİâî"),
    ("WINDOWS-1251", "оеаинтсрвлкмдпу"),
    ("KOI8-R", "оеаинтсрвлкмдпу"),
    ("CP866", "оеаинтсрвлкмдпу"),
    ("ISO-8859-5", "оеаинтсрвлкмдпу"),
    ("WINDOWS-1253", "αοιεστνηυρκπμλςάέήίόύώ"),
    ("WINDOWS-1255", "יוהלאתרבמשנםדעח"),
    ("WINDOWS-1256", "ايلمنوترةبعدهسف"),
    ("TIS-620", "านรอกเง่ยลมดทวสต้ัีิคปบหุไ"),
)
# (pattern of the beginning, name, what removes it)
_MARKUP = (
    (rb"\s*(<!--.{0,500}-->\s*)?<(!doctype html|html|head|body)\b", "HTML", "pandoc -t plain"),
    (rb"\s*\{\\rtf", "RTF", "pandoc -f rtf -t plain"),
    (rb"\s*<\?xml\b", "XML", "a parser of XML"),
    (rb"\s*<([a-z][\w:.-]*)(\s[^<>]*)?>.*</", "XML or HTML", "pandoc -f html -t plain"),
    (rb"(\s*%[^\n]*\n)*\s*\\documentclass\b", "LaTeX", "pandoc -f latex -t plain"),
    (rb"%!PS", "PostScript", "ps2ascii"),
    (rb"\s*\{\s*\"(cells|nbformat)\"", "a notebook", "jupyter nbconvert --to markdown"),
    (rb"\s*\{\s*\"[^\n]*\}\r?\n\s*\{\s*\"", "JSON lines", "--json-field NAME"),
    (rb"\s*(\{\s*\"[^\"\n]*\"\s*:|\[\s*[\[{\"])", "JSON", "jq, or --json-field NAME for lines"),
    (rb"WEBVTT\b|\s*\d+\r?\n\d\d:\d\d:\d\d,\d+ -->", "a subtitle file", "grep -v -e '-->'"),
    (rb"(From \S+@\S+ [^\n]*|(Received|Return-Path): [^\n]*)\n", "email", "a parser of email"),
)
_CSV_DELIMITERS = (",", "\t", ";")
MIN_CSV_ROWS = 3


def identify_content(head: bytes, path: str) -> ContentKind | None:
    """The kind of a file that is not UTF-8 text, by its first HEAD_BYTES; None for other files."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return _encoded_text(encoding)
    unmarked = _unmarked_encoding(head)
    if unmarked is None:
        unmarked = _seven_bit_encoding(head)
    if unmarked is not None:
        return _encoded_text(unmarked)
    has_controls = re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head) is not None
    if _ASCII_PICKLE.match(head):
        return ContentKind(PICKLE, _RUNS_CODE)
    is_text = not has_controls and _is_utf8(head)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _identify_zip(path)
    for offset, magic, name, cure in _MAGIC:
        if not head[offset:].startswith(magic):
            continue
        # A text in a legacy encoding may begin with the letters BM or MZ.
        is_letters = re.fullmatch(rb"[ -~]+", magic) is not None
        is_certain = magic.startswith((b"%PDF-", b"version https"))
        if is_certain or has_controls or not (is_letters or is_text):
            return ContentKind(name, cure)
    # PDF allows 1,024 other bytes before its header.
    if re.search(rb"[\s\xbf]%PDF-\d", head[:1024]) and (b" obj" in head or not is_text):
        return ContentKind("a PDF document", "convert it with pdftotext {path}")
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:10] == b'{"' and header_bytes < MAX_SAFETENSORS_HEADER_BYTES and not is_text:
        return ContentKind("a safetensors file", _NO_TEXT)
    return ContentKind("binary data", _UNKNOWN) if is_binary(head) else None


def detect_markup(head: bytes) -> tuple[str, str] | None:
    """The markup language of a text, and the program that removes the markup; None without one."""
    for pattern, name, program in _MARKUP:
        if re.match(pattern, head.removeprefix(codecs.BOM_UTF8), re.IGNORECASE | re.DOTALL):
            return name, program
    if _is_json_strings(head):
        return "JSON strings, one a line", "jq -r ."
    if _is_csv(head.decode("utf-8", "replace")):
        return "CSV", "write its column of text as a text or parquet file"
    return None


def explain_conversion(head: bytes, path: str) -> str:
    """The command that converts a text in a legacy encoding, which is guessed."""
    command = _ICONV.format(encoding=_guess_encoding(head)).format(path=quote_path(path))
    return f"{command} (the encoding is a guess)"


def _encoded_text(encoding: str) -> ContentKind:
    command = _DECODE_HZ if encoding == "HZ" else _ICONV.format(encoding=encoding)
    return ContentKind(f"{encoding} text", command, is_text=True)


def _is_utf8(head: bytes) -> bool:
    """Whether the bytes are UTF-8; the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _unmarked_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a byte-order mark.

    Letters of Western scripts have NULs as their high bytes. Text in other scripts is recognized by
    its white space and full stops, or by the rows of Unicode that its letters are from.
    """
    may_be_utf8 = _is_utf8(head) and re.search(rb"[\x01-\x08\x0e-\x1a]", head) is None
    for unmarked in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        unit = 4 if "32" in unmarked else 2
        # The high byte of each unit is the one with the NULs.
        high = head[unit - 1 :: unit] if unmarked.endswith("LE") else head[::unit]
        low = head[::unit] if unmarked.endswith("LE") else head[unit - 1 :: unit]
        text = codecs.getincrementaldecoder(unmarked)("replace").decode(head)
        n_stray = sum(not (c.isprintable() or c.isspace()) or c == "\ufffd" for c in text)
        n_spaces = sum(c in " \n\u3000\u3001\u3002" for c in text)
        has_nuls = high.count(0) > max(MIN_NUL_SHARE * len(high), 4 * low.count(0))
        has_spaces = n_spaces > MIN_SPACE_SHARE * len(text)
        has_rows = unit == 2 and _has_rows_of_a_script(high, low)
        is_foreign = (has_spaces or has_rows) and not may_be_utf8
        if n_stray <= MAX_STRAY_SHARE * len(text) and (has_nuls or is_foreign):
            return unmarked
    return None


def _has_rows_of_a_script(high: bytes, low: bytes) -> bool:
    """Whether the high bytes of 16-bit units are those of one script, and the low bytes vary.

    An alphabet has one high byte, which no text in 8 bits has in every second place. Chinese and
    Korean have two ranges, in which half of all bytes are; multibyte encodings such as Shift-JIS
    have no second bytes below 0x40, where a quarter of these low bytes are.
    """
    n = len(high)
    if n < MIN_UNITS or len(set(low)) < MIN_DIFFERENT_UNITS:
        return False
    row, n_row = collections.Counter(high).most_common(1)[0]
    if row in ALPHABET_ROWS and n_row > MIN_ROW_SHARE * n:
        return True
    n_ideographs = sum(byte in IDEOGRAPH_ROWS for byte in high)
    is_spread = min(sum(byte < 0x40 for byte in low), sum(byte >= 0x80 for byte in low)) > n / 10
    return is_spread and n_ideographs > (1 - MAX_STRAY_SHARE) * n


def _identify_zip(path: str) -> ContentKind:
    # A damaged archive has no list of members: it is still "a zip archive".
    with suppress(zipfile.BadZipFile, InputError, ValueError, NotImplementedError):
        with explain_system_errors(path, InputError), zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        for member, name, cure in _ZIP_MEMBERS:
            end = member if member.startswith(".") else f"/{member}"
            if any(f"/{entry}".endswith(end) for entry in members):
                return ContentKind(name, cure)
    return ContentKind("a zip archive", _UNPACK.format(command="unzip"))


def _seven_bit_encoding(head: bytes) -> str | None:
    """An encoding of other letters in ASCII bytes, in which all of the text can be read."""
    for encoding, pattern, min_letters in _SEVEN_BITS:
        if head.isascii() and re.search(pattern, head):
            with suppress(UnicodeDecodeError):
                text = codecs.getincrementaldecoder(encoding)().decode(head)
                foreign = [character for character in text if not character.isascii()]
                fewest = max(min_letters, MIN_SEVEN_BIT_SHARE * len(text))
                if len(foreign) >= fewest and "".join(foreign).isprintable():
                    return encoding
    return None


def is_binary(head: bytes) -> bool:
    """Whether bytes that are not UTF-8 have control characters as no text in any encoding has."""
    n_controls = len(re.findall(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head))
    n_bad = head.decode("utf-8", "replace").count("\ufffd") - head.count("\ufffd".encode())
    min_bytes = max(MIN_BINARY_BYTES, MIN_BINARY_SHARE * len(head))
    return min(n_controls, n_bad) >= min_bytes and not _is_ebcdic(head)


def _is_ebcdic(head: bytes) -> bool:
    text = head.decode("cp037")
    n_letters = sum(c.isascii() and (c.isalnum() or c == " ") for c in text)
    return n_letters > MIN_EBCDIC_SHARE * len(text)


def _is_json_strings(head: bytes) -> bool:
    """Whether each line, of 3 or more, is a string of JSON; the last one may be cut."""
    lines = [line for line in head.splitlines()[:-1] if line.strip()]
    with suppress(ValueError):
        return len(lines) >= MIN_CSV_ROWS and all(
            isinstance(json.loads(line), str) for line in lines
        )
    return False


def _is_csv(text: str) -> bool:
    """Whether all lines have the same number of fields, at least 2, and the first names them."""
    for delimiter in _CSV_DELIMITERS:
        rows: list[list[str]] = []
        with suppress(csv.Error):
            rows = list(csv.reader(text.splitlines(), delimiter=delimiter))[:-1]
        if len(rows) < MIN_CSV_ROWS or len(rows[0]) < 2:
            continue
        has_names = all(re.fullmatch(r"\w[\w-]*( \w[\w-]*)?", field.strip()) for field in rows[0])
        if has_names and all(len(row) == len(rows[0]) for row in rows):
            return True
    return False


def _guess_encoding(head: bytes) -> str:
    """The encoding in which most letters beyond ASCII are those of its languages."""
    if _is_ebcdic(head):
        return "IBM037"
    for encoding, first, last in (
        ("SHIFT_JIS", "\u3040", "\u30ff"),
        ("EUC-JP", "\u3040", "\u30ff"),
        ("EUC-KR", "\uac00", "\ud7a3"),
        ("GB18030", "\u4e00", "\u9fff"),
        ("BIG5", "\u4e00", "\u9fff"),
    ):
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(head)
            foreign = [character for character in text if ord(character) > 127]
            n_expected = sum(first <= character <= last for character in foreign)
            if n_expected > 0.5 * len(foreign) and len(foreign) > MIN_FOREIGN_SHARE * len(text):
                return encoding
    shares = {}
    for encoding, letters in _ALPHABETS:
        foreign = [c for c in head.decode(encoding, "replace") if ord(c) > 127]
        shares[encoding] = sum(c in letters for c in foreign) / max(len(foreign), 1)
    return max(shares, key=lambda encoding: shares[encoding])
