"""The text of a run: its files with their hashes, decoded in pieces.

Files are read in the order of their paths and joined by a blank line. A byte-order mark is dropped;
carriage returns and NULs are kept. Bytes that are not UTF-8 are an error with file and offset, or
U+FFFD with --encoding-errors replace. With --json-field, the documents of JSON lines are joined
instead (json_lines.py).
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from glasslm.data.sources.content_kinds import (
    HEAD_BYTES,
    explain_conversion,
    identify_content,
    is_binary,
)
from glasslm.data.sources.json_lines import read_documents
from glasslm.data.sources.texts import SEPARATOR
from glasslm.data.special_tokens import Documents
from glasslm.errors import DamagedError, InputError, explain_system_errors

CHUNK_BYTES = 1 << 20  # read at once


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
    json_field: str | None = None  # the files are JSON lines, and this field of each is the text

    @property
    def sha256(self) -> str:
        """Identity of the text: a hash of the contents of the files in order, not of the paths."""
        field = [] if self.json_field is None else [f"json_field {self.json_field}"]
        parts = [*(file.sha256 for file in self.files), *field]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def text(self, errors: str = "strict") -> Iterator[str]:
        """The whole text in pieces of at most 2^20 characters, or one document of JSON lines.

        With `documents`, each special token is a piece of its own. `errors` is --encoding-errors.
        Raises InputError for bad UTF-8, a bad line of JSON, and a file that has changed since it
        was hashed.
        """
        is_first = True
        for file in self.files:
            for document in self._read_documents(file, errors):
                if self.documents:
                    yield from self.documents.mark_ends(document)
                    continue
                if not is_first:
                    yield SEPARATOR
                yield from document
                is_first = False

    def _read_documents(self, file: SourceFile, errors: str) -> Iterator[Iterable[str]]:
        """The documents of a file, each in pieces: the whole text, or the field of each line."""
        texts = _decode_file(file, errors)
        if self.json_field is None:
            yield texts
            return
        for document in read_documents(texts, self.json_field, file.path, errors):
            yield [document]

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
    with open_file(str(path)) as file:
        digest = hashlib.file_digest(file, "sha256")
        return SourceFile(os.path.abspath(path), file.tell(), digest.hexdigest(), origin)


def reopen_source(recorded: list[dict[str, Any]], json_field: str | None = None) -> Source:
    """The text of a run from the `files` of its run.json, and the --json-field of its config.

    Raises DamagedError for a file that is missing or has changed.
    """
    sources = []
    for file in recorded:
        path, sha256 = file["path"], file["sha256"]
        if not os.path.isfile(path):
            copy = " (a copy of what came through a pipe or was converted)" if is_copy(file) else ""
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
    return Source("text", tuple(sources), json_field=json_field)


def is_copy(recorded: dict[str, Any]) -> bool:
    """Whether a recorded file is a copy in the cache, which is named by its hash."""
    return Path(recorded["path"]).stem == recorded["sha256"]


def open_file(path: str) -> BufferedReader:
    """A file opened for reading bytes. Raises InputError."""
    with explain_system_errors(path, lambda why: InputError(f"{path} cannot be read ({why})")):
        return open(path, "rb")


def _decode_file(file: SourceFile, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if errors == "strict" else "replace")
    digest, offset = hashlib.sha256(), 0
    with open_file(file.path) as stream:
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
    with open_file(path) as file:
        head = file.read(HEAD_BYTES)
        if (kind := identify_content(head, path)) is not None:
            return kind.explain(path)
        # The encoding is guessed from the lines around the bad byte.
        file.seek(max(0, offset - HEAD_BYTES // 2))
        nearby = file.read(HEAD_BYTES)
    lines = nearby[nearby.find(b"\n") + 1 :] if offset > HEAD_BYTES // 2 else nearby
    bad_byte = f"byte 0x{error.object[error.start]:02x} at offset {offset} ({error.reason})"
    if is_binary(lines):
        return f"{path} is not UTF-8: at {bad_byte} binary data begins: cut the file there"
    return (
        f"{path} is not UTF-8: {bad_byte}: {explain_conversion(lines, path)}, "
        "or use --encoding-errors replace to read such bytes as U+FFFD"
    )


def find_bad_utf8(file: SourceFile) -> str | None:
    """A message that names the first bytes that are not UTF-8, with the cure; None without any."""
    try:
        for _ in _decode_file(file, "strict"):
            pass
    except InputError as error:
        return str(error)
    return None


def count_bad_bytes(file: SourceFile) -> int:
    """The number of bytes of a file that --encoding-errors replace reads as U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    n_bad = 0
    with open_file(file.path) as stream:
        while block := stream.read(CHUNK_BYTES):
            pending = decoder.getstate()[0]
            n_bad += decoder.decode(block).count("\ufffd")
            n_bad -= (pending + block).count("\ufffd".encode())
    return n_bad + decoder.decode(b"", final=True).count("\ufffd")
