"""Text from files: which ones a list of paths, folders, patterns and - means, and their text, read in chunks.

Files are taken in the order of their paths and joined by a blank line. A byte-order mark is dropped; carriage returns
and NULs are kept; bytes that are not UTF-8 are an error with file and offset, or U+FFFD when asked for. Parquet files
and MediaWiki dumps that are given by their names, and not by a folder's, are converted to text first.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from glasslm import files
from glasslm.data.cache import cache_dir, writing
from glasslm.data.sources.converted import as_text
from glasslm.data.sources.texts import SEPARATOR
from glasslm.errors import DamagedError, InputError
from glasslm.text import Say

CHUNK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class SourceFile:
    """One file as it was found: its absolute path, raw size and hash; where it was fetched from, if that is known."""

    path: str
    bytes: int
    sha256: str
    origin: str = ""


@dataclass(frozen=True)
class Source:
    """The text of a run: files in their order, and under what name."""

    name: str
    files: tuple[SourceFile, ...]
    fallback: bool = False  # it stands in for a corpus that could not be had

    @property
    def sha256(self) -> str:
        """Identity of the text: of the files' contents in order, not of their paths."""
        return hashlib.sha256("\n".join(file.sha256 for file in self.files).encode()).hexdigest()

    def text(self, errors: str = "strict") -> Iterator[str]:
        """The whole text in pieces of at most 2^20 characters. Raises InputError for bad UTF-8 or a changed file."""
        for i, file in enumerate(self.files):
            if i:
                yield SEPARATOR
            yield from _decoded(file, errors)


def source_file(path: Path | str, origin: str = "") -> SourceFile:
    """Size and hash of a file. Raises InputError if it cannot be read."""
    with _opened(str(path)) as file:
        digest = hashlib.file_digest(file, "sha256")
        return SourceFile(os.path.abspath(path), file.tell(), digest.hexdigest(), origin)


def find(given: tuple[str, ...], say: Say) -> Source:
    """The text that `--text-file` names. Raises InputError when a path is missing, or when there is no text in it."""
    found: dict[
        str, str
    ] = {}  # real path -> absolute path as given: a file named twice is read once
    named: set[str] = set()  # real paths of files that were given themselves
    spooled = []
    for name in given:
        if name == "-":
            spooled.append(_spool(_standard_input()))
        elif _is_pipe(name):
            with _opened(name) as pipe:
                spooled.append(_spool(pipe))
        else:
            for path, itself in _expand(os.path.expanduser(name), say):
                real = os.path.realpath(path)
                found.setdefault(real, os.path.abspath(path))
                named |= {real} if itself else set()
    ordered = sorted(found, key=lambda real: Path(found[real]).as_posix())
    paths = [as_text(Path(found[real]), say) if real in named else found[real] for real in ordered]
    sources = tuple(source_file(path) for path in [*spooled, *paths])
    if not any(file.bytes for file in sources):
        raise InputError(f"there is no text in {', '.join(given)}: every file is empty")
    return Source(
        "stdin" if given[0] == "-" else Path(given[0]).stem.strip("*?") or "text", sources
    )


def of_run(recorded: list[dict[str, Any]]) -> Source:
    """The text of a run from the `files` of its run.json. Raises DamagedError for one that is gone or has changed."""
    found = []
    for path, sha256 in ((file["path"], file["sha256"]) for file in recorded):
        if not os.path.isfile(path):
            copy = (
                " (a copy of what came through a pipe or was converted)"
                if Path(path).stem == sha256
                else ""
            )
            raise DamagedError(
                f"{path}{copy}, on which this run was trained, is gone: put the text with sha256 {sha256} there again"
            )
        found.append(source_file(path))
        if found[-1].sha256 != sha256:
            raise DamagedError(
                f"{path} has changed since this run was trained on it: its sha256 was {sha256}, it is "
                f"{found[-1].sha256} now. Put the original back"
            )
    return Source("text", tuple(found))


def _expand(name: str, say: Say) -> list[tuple[str, bool]]:
    """The files that a name means, and of each whether the name is its own rather than a folder's."""
    if os.path.isdir(name):
        return [(path, False) for path in _text_files(name, say)]
    if os.path.isfile(name):
        return [(name, True)]
    if os.path.exists(name):
        raise InputError(f"{name} is neither a file nor a folder of text")
    matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if matches:
        return [found for match in matches for found in _expand(match, say)]
    if glob.has_magic(name):
        raise InputError(f"no file matches {name}")
    folder = Path(name).parent
    beside = os.listdir(folder) if folder.is_dir() else []
    close = difflib.get_close_matches(Path(name).name, beside, n=1)
    raise InputError(
        f"there is no file or folder {name}"
        + (f": did you mean {folder / close[0]}?" if close else "")
    )


def _text_files(root: str, say: Say) -> list[str]:
    """The text files below a folder; what is hidden or binary is left out and counted."""
    texts, hidden, binary = [], 0, 0

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})")

    for folder, folders, names in os.walk(root, onerror=fail):
        hidden += sum(name.startswith(".") for name in folders + names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith(".") or not os.path.isfile(path):
                continue
            if _is_binary(path):
                binary += 1
            else:
                texts.append(path)
    if hidden or binary:
        say(f"{root}: left out {hidden} hidden files or folders and {binary} binary files")
    if not texts:
        raise InputError(f"there are no text files in the folder {root}")
    return texts


def _is_binary(path: str) -> bool:
    """A NUL near the beginning, which is how git tells."""
    with _opened(path) as file:
        return b"\0" in file.read(8192)


def _is_pipe(name: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(name).st_mode)
    except (OSError, ValueError):
        return False


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise InputError(
            "--text-file - reads standard input, but this program was started without one"
        )
    return sys.stdin.buffer


def _spool(stream: BinaryIO) -> str:
    """Copy a stream, which can be read only once, into the cache, under the hash of its content."""
    folder = cache_dir("stdin")
    with writing(folder):
        return str(files.write_by_hash(folder, iter(lambda: stream.read(CHUNK), b""), ".txt"))


def _opened(path: str) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error


def _decoded(file: SourceFile, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    digest, offset = hashlib.sha256(), 0
    with _opened(file.path) as stream:
        while True:
            block = stream.read(CHUNK)
            held = len(decoder.getstate()[0])  # bytes of a character that the last block began
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise InputError(
                    _not_utf8(file.path, error, offset - held + error.start)
                ) from error
            if offset == 0:
                text = text.removeprefix("\ufeff")
            digest.update(block)
            offset += len(block)
            if text:
                yield text
            if not block:
                break
    if (
        digest.hexdigest() != file.sha256
    ):  # or the cache would keep tokens under the hash of another text
        raise InputError(
            f"{file.path} changed while it was being read: start again when it is complete"
        )


def _not_utf8(path: str, error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    if offset == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"{path} is UTF-16, not UTF-8: convert it first, for example with iconv -f UTF-16 -t UTF-8"
    return (
        f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset} ({error.reason}): convert the file, or use "
        "--encoding-errors replace to read such bytes as U+FFFD"
    )
