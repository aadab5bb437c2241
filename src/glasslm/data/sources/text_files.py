"""Read text from files: resolve the paths of --text-file, hash the files and decode them in chunks.

Files are read in the order of their paths and joined by a blank line. A byte-order mark is dropped;
carriage returns and NULs are kept. Bytes that are not UTF-8 are an error with file and offset, or
U+FFFD with --encoding-errors replace. A parquet file that is named itself, not by its folder, is
converted to text first.
"""

from __future__ import annotations

import bz2
import codecs
import difflib
import glob
import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from glasslm import files
from glasslm.data.cache import cache_dir, explain_write_errors
from glasslm.data.sources.parquet import convert_to_text
from glasslm.data.sources.texts import SEPARATOR
from glasslm.data.special_tokens import Documents
from glasslm.errors import DamagedError, InputError
from glasslm.text import Notify

CHUNK_BYTES = 1 << 20  # read at once
# The root element of a MediaWiki export: https://www.mediawiki.org/wiki/Help:Export
MEDIAWIKI_ROOT = re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]{0,200}\?>\s*)?<mediawiki[\s>]")
BZIP2_HEADER = re.compile(rb"BZh[1-9]\x31\x41\x59\x26\x53\x59")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: absolute path, size, hash, and the address it was fetched from or ""."""

    path: str
    bytes: int
    sha256: str
    origin: str = ""


@dataclass(frozen=True)
class Source:
    """The text of a run: its files in order, and a name."""

    name: str
    files: tuple[SourceFile, ...]
    fallback: bool = False  # it replaces a corpus that could not be downloaded
    documents: Documents | None = None  # how documents end; None: a blank line joins the files

    @property
    def sha256(self) -> str:
        """Identity of the text: a hash of the contents of the files in order, not of the paths."""
        return hashlib.sha256("\n".join(file.sha256 for file in self.files).encode()).hexdigest()

    def text(self, errors: str = "strict") -> Iterator[str]:
        """The whole text in pieces of at most 2^20 characters.

        With `documents`, each special token is a piece of its own. Raises InputError for bad UTF-8
        or for a file that has changed since it was hashed.
        """
        for i, file in enumerate(self.files):
            if self.documents:
                yield from self.documents.mark_ends(_decode_file(file, errors))
                continue
            if i:
                yield SEPARATOR
            yield from _decode_file(file, errors)

    @property
    def special_tokens(self) -> frozenset[str]:
        """The pieces of `text` that are special tokens."""
        return self.documents.tokens if self.documents else frozenset()

    def require_separator(self, errors: str) -> None:
        """Raise InputError where the text does not contain the separator of its documents."""
        documents = self.documents
        assert documents is not None
        if not any(documents.has_separator(_decode_file(file, errors)) for file in self.files):
            raise InputError(
                f"the text of {self.name} does not contain --document-separator "
                f"{documents.separator!r}: give the text that stands between two documents (in "
                r"bash, $'\n\n' is a blank line)"
            )


def source_file(path: Path | str, origin: str = "") -> SourceFile:
    """Size and hash of a file. Raises InputError if it cannot be read."""
    with _open_file(str(path)) as file:
        digest = hashlib.file_digest(file, "sha256")
        return SourceFile(os.path.abspath(path), file.tell(), digest.hexdigest(), origin)


def find_source(names: tuple[str, ...], notify: Notify, separator: str = SEPARATOR) -> Source:
    """The text that `--text-file` names; `separator` stands between the rows of a parquet file.

    Raises InputError when a path or all text is missing.
    """
    paths: dict[str, str] = {}  # real path -> absolute path: a file named twice is read once
    named_files: set[str] = set()  # real paths of files that are named themselves
    stdin_copies = []
    for name in names:
        if name == "-":
            stdin_copies.append(_copy_stream(_standard_input()))
        elif _is_pipe(name):
            with _open_file(name) as pipe:
                stdin_copies.append(_copy_stream(pipe))
        else:
            for path, is_named in _expand_name(os.path.expanduser(name), notify):
                real_path = os.path.realpath(path)
                paths.setdefault(real_path, os.path.abspath(path))
                named_files |= {real_path} if is_named else set()
    ordered = sorted(paths, key=lambda real_path: Path(paths[real_path]).as_posix())
    text_paths: list[Path | str] = [*stdin_copies]
    for real_path in ordered:
        path = paths[real_path]
        if real_path in named_files:
            _refuse_mediawiki_dump(path)
            text_paths.append(convert_to_text(Path(path), notify, separator))
        else:
            text_paths.append(path)
    sources = tuple(source_file(path) for path in text_paths)
    if not any(file.bytes for file in sources):
        raise InputError(f"there is no text in {', '.join(names)}: every file is empty")
    name = "stdin" if names[0] == "-" else Path(names[0]).stem.strip("*?") or "text"
    return Source(name, sources)


def reopen_source(recorded: list[dict[str, Any]]) -> Source:
    """The text of a run from the `files` of its run.json.

    Raises DamagedError for a file that is missing or has changed.
    """
    sources = []
    for path, sha256 in ((file["path"], file["sha256"]) for file in recorded):
        if not os.path.isfile(path):
            is_copy = Path(path).stem == sha256
            copy = " (a copy of what came through a pipe or was converted)" if is_copy else ""
            raise DamagedError(
                f"{path}{copy}, on which this run was trained, is gone: "
                f"put the text with sha256 {sha256} there again"
            )
        source = source_file(path)
        if source.sha256 != sha256:
            raise DamagedError(
                f"{path} has changed since this run was trained on it: its sha256 was {sha256}, "
                f"it is {source.sha256} now. Put the original back"
            )
        sources.append(source)
    return Source("text", tuple(sources))


def _expand_name(name: str, notify: Notify) -> list[tuple[str, bool]]:
    """The files that a name stands for; each with False if the name is that of a folder above."""
    if os.path.isdir(name):
        return [(path, False) for path in _text_files(name, notify)]
    if os.path.isfile(name):
        return [(name, True)]
    if os.path.exists(name):
        raise InputError(f"{name} is neither a file nor a folder of text")
    matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if matches:
        return [file for match in matches for file in _expand_name(match, notify)]
    if glob.has_magic(name):
        raise InputError(f"no file matches {name}")
    folder = Path(name).parent
    siblings = os.listdir(folder) if folder.is_dir() else []
    similar = difflib.get_close_matches(Path(name).name, siblings, n=1)
    hint = f": did you mean {folder / similar[0]}?" if similar else ""
    raise InputError(f"there is no file or folder {name}{hint}")


def _text_files(root: str, notify: Notify) -> list[str]:
    """The text files below a folder. Hidden and binary files are left out and counted."""
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
        notify(f"{root}: left out {hidden} hidden files or folders and {binary} binary files")
    if not texts:
        raise InputError(f"there are no text files in the folder {root}")
    return texts


def _is_binary(path: str) -> bool:
    """Whether there is a NUL near the beginning, the rule of git."""
    with _open_file(path) as file:
        return b"\0" in file.read(8192)


def _is_pipe(name: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(name).st_mode)
    except (OSError, ValueError):
        return False


def _refuse_mediawiki_dump(path: str) -> None:
    """Raise InputError for a MediaWiki export, packed by bzip2 or not: its text is markup."""
    with _open_file(path) as file:
        head = file.read(1024)
    if BZIP2_HEADER.match(head):
        try:
            with bz2.open(path) as unpacked:
                head = unpacked.read(1024)
        except (OSError, EOFError):  # It is damaged, so it is refused as text that is not UTF-8.
            return
    if MEDIAWIKI_ROOT.match(head):
        raise InputError(
            f"{path} is a MediaWiki dump, which is markup and not plain text: use --corpus "
            "wikipedia, or for another language --hf-dataset wikimedia/wikipedia with --hf-config"
        )


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise InputError(
            "--text-file - reads standard input, but this program was started without one"
        )
    return sys.stdin.buffer


def _copy_stream(stream: BinaryIO) -> str:
    """Copy a stream, which can be read only once, into the cache; returns the path of the copy."""
    folder = cache_dir("stdin")
    with explain_write_errors(folder):
        chunks = iter(lambda: stream.read(CHUNK_BYTES), b"")
        return str(files.write_by_hash(folder, chunks, ".txt"))


def _open_file(path: str) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error


def _decode_file(file: SourceFile, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    digest, offset = hashlib.sha256(), 0
    with _open_file(file.path) as stream:
        while True:
            block = stream.read(CHUNK_BYTES)
            n_pending = len(decoder.getstate()[0])  # bytes of a character begun in the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                message = _explain_bad_utf8(file.path, error, offset - n_pending + error.start)
                raise InputError(message) from error
            if offset == 0:
                text = text.removeprefix("\ufeff")
            digest.update(block)
            offset += len(block)
            if text:
                yield text
            if not block:
                break
    # Otherwise the cache would keep tokens under the hash of another text.
    if digest.hexdigest() != file.sha256:
        raise InputError(
            f"{file.path} changed while it was being read: start again when it is complete"
        )


def _explain_bad_utf8(path: str, error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    if offset == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return (
            f"{path} is UTF-16, not UTF-8: "
            "convert it first, for example with iconv -f UTF-16 -t UTF-8"
        )
    return (
        f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset} ({error.reason}): convert the "
        "file, or use --encoding-errors replace to read such bytes as U+FFFD"
    )
