"""Find the files that --text-file names, and refuse or leave out those that hold no text.

A file that is named itself must be text; a parquet file is converted first. Other files of a folder
are left out and listed. All files that cannot be read are reported in one message.
"""

from __future__ import annotations

import bz2
import collections
import glob
import os
import re
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from glasslm import files
from glasslm.data.cache import cache_dir, explain_write_errors
from glasslm.data.sources.content_kinds import (
    HEAD_BYTES,
    detect_markup,
    explain_conversion,
    identify_content,
)
from glasslm.data.sources.parquet import convert_to_text
from glasslm.data.sources.text_files import (
    CHUNK_BYTES,
    Source,
    SourceFile,
    count_bad_bytes,
    find_bad_utf8,
    is_copy,
    open_file,
    source_file,
)
from glasslm.data.sources.texts import SEPARATOR
from glasslm.errors import InputError, raise_if_exhausted
from glasslm.text import Notify, ignore_message, similar_names, to_one_line

# The root element of a MediaWiki export: https://www.mediawiki.org/wiki/Help:Export
MEDIAWIKI_ROOT = re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]{0,200}\?>\s*)?<mediawiki[\s>]")
BZIP2_HEADER = re.compile(rb"BZh[1-9]\x31\x41\x59\x26\x53\x59")
MAX_BAD_SHARE = 0.01  # of the bytes of a file, which --encoding-errors replace may replace
MAX_LISTED_FILES = 10  # in one message


def find_source(
    names: tuple[str, ...],
    notify: Notify,
    errors: str = "strict",
    json_field: str | None = None,
    separator: str = SEPARATOR,
) -> Source:
    """The text that `--text-file` names. `errors` is --encoding-errors, `json_field` --json-field.

    `separator` stands between the rows of a parquet file.
    Raises InputError when a path or all text is missing, and for files that are not UTF-8 text.
    """
    paths: dict[str, str] = {}  # real path -> absolute path: a file named twice is read once
    named_files: set[str] = set()  # real paths of files that are named themselves
    stdin_copies = []
    for name in names:
        if name == "-":
            stdin_copies.append(_copy_stream(_standard_input()))
        elif _is_pipe(name):
            with open_file(name) as pipe:
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
    if errors != "replace-all":
        _require_text(sources, errors)
    _notify_markup(sources, json_field, notify)
    name = "stdin" if names[0] == "-" else Path(names[0]).stem.strip("*?") or "text"
    return Source(name, sources, json_field=json_field)


def convert_again(
    recorded: list[dict[str, Any]], names: tuple[str, ...], notify: Notify, separator: str
) -> list[dict[str, Any]]:
    """The recorded files of a run, whose lost texts of parquet files are converted again.

    `names` are those of its --text-file. The record of a file that cannot be made again stays as it
    is. Raises InputError where a parquet file cannot be read.
    """
    if all(os.path.isfile(file["path"]) or not is_copy(file) for file in recorded):
        return recorded
    converted: dict[str, str] = {}  # sha256 -> path
    for name in map(os.path.expanduser, names):
        named_files: list[tuple[str, bool]] = []
        if name != "-" and not _is_pipe(name):
            with suppress(InputError):  # the parquet file is gone, too
                named_files = _expand_name(name, ignore_message)
        for path in [Path(path) for path, is_named in named_files if is_named]:
            text = convert_to_text(path, notify, separator)
            converted |= {text.stem: str(text)} if text != path else {}
    return [file | {"path": converted.get(file["sha256"], file["path"])} for file in recorded]


def _require_text(sources: tuple[SourceFile, ...], errors: str) -> None:
    """Raise InputError, with a line for each file that is not UTF-8 text."""
    problems = [problem for file in sources if (problem := _find_problem(file, errors))]
    if problems:
        n_more = len(problems) - MAX_LISTED_FILES
        more = [f"and {n_more:,} more files"] if n_more > 0 else []
        raise InputError("\n".join(problems[:MAX_LISTED_FILES] + more))


def _find_problem(file: SourceFile, errors: str) -> str | None:
    """Why a file cannot be read as text, with the cure; None if it can."""
    head = _read_head(file.path)
    kind = identify_content(head, file.path)
    if kind is not None:
        return kind.explain(file.path)
    n_bad = count_bad_bytes(file)
    if not n_bad:
        return None
    if errors == "strict":
        return find_bad_utf8(file)
    if n_bad <= MAX_BAD_SHARE * file.bytes:
        return None
    return (
        f"{file.path} is not UTF-8: {n_bad / file.bytes:.0%} of its bytes ({n_bad:,}) would become "
        f"U+FFFD: {explain_conversion(head, file.path)}, or force it with --encoding-errors "
        "replace-all"
    )


def _notify_markup(sources: tuple[SourceFile, ...], json_field: str | None, notify: Notify) -> None:
    """Send a note for each markup language, because a model would learn the markup, too."""
    paths = collections.defaultdict(list)
    for file in sources:
        if json_field is None and (markup := detect_markup(_read_head(file.path))):
            paths[markup].append(file.path)
    for (language, cure), names in paths.items():
        others = f" and {len(names) - 1:,} more files are" if len(names) > 1 else " is"
        notify(f"note: {names[0]}{others} {language}, and the model learns the markup, too: {cure}")


def _expand_name(name: str, notify: Notify) -> list[tuple[str, bool]]:
    """The files that a name stands for; each with False if the name is that of a folder above."""
    if os.path.isdir(name):
        return [(path, False) for path in _text_files(name, notify)]
    if os.path.isfile(name):
        return [(name, True)]
    if os.path.exists(name):
        raise InputError(
            f"{name} is neither a file nor a folder of text: expected one of them, a pattern, or - "
            "for standard input"
        )
    matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if matches:
        return [file for match in matches for file in _expand_name(match, notify)]
    if glob.has_magic(name):
        raise InputError(
            f"no file matches {name}: check the pattern, and the folder that it starts from"
        )
    folder = Path(name).parent
    siblings = os.listdir(folder) if folder.is_dir() else []
    similar = similar_names(Path(name).name, siblings)
    hint = f": did you mean {folder / similar[0]}?" if similar else ""
    raise InputError(f"there is no file or folder {name}{hint}")


def _text_files(root: str, notify: Notify) -> list[str]:
    """The text files below a folder.

    Hidden files, binary files and links to folders, which may lead in a circle, are left out and
    listed.
    """
    texts, omitted = [], []

    def fail(error: OSError) -> None:
        raise_if_exhausted(error, error.filename)
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}): change its permissions, or name "
            "another folder"
        )

    for folder, folders, names in os.walk(root, onerror=fail):
        omitted += [(folder, name, "hidden") for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        omitted += [
            (folder, name, "a link to a folder")
            for name in folders
            if os.path.islink(os.path.join(folder, name))
        ]
        for name in sorted(names):
            reason = _reason_to_omit(os.path.join(folder, name))
            if reason:
                omitted.append((folder, name, reason))
            else:
                texts.append(os.path.join(folder, name))
    if omitted:
        listed = ", ".join(
            f"{to_one_line(os.path.relpath(os.path.join(folder, name), root))} ({reason})"
            for folder, name, reason in omitted[:MAX_LISTED_FILES]
        )
        n_more = len(omitted) - MAX_LISTED_FILES
        more = f" and {n_more:,} more" if n_more > 0 else ""
        notify(f"note: {root}: left out {len(omitted):,} of its files and folders: {listed}{more}")
    if not texts:
        raise InputError(
            f"there are no text files in the folder {root}: expected UTF-8 text in files that are "
            "not hidden; a file that is named itself is read"
        )
    return texts


def _reason_to_omit(path: str) -> str:
    """Why a file of a folder is left out; "" for text, also in another encoding."""
    if os.path.basename(path).startswith("."):
        return "hidden"
    if not os.path.isfile(path):
        return "not a file"
    head = _read_head(path)
    kind = identify_content(head, path)
    if kind is not None:
        return "" if kind.is_text else kind.name
    return "binary: it has NUL bytes" if b"\0" in head else ""  # the rule of git


def _read_head(path: str) -> bytes:
    with open_file(path) as file:
        return file.read(HEAD_BYTES)


def _is_pipe(name: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(name).st_mode)
    except (OSError, ValueError):
        return False


def _refuse_mediawiki_dump(path: str) -> None:
    """Raise InputError for a MediaWiki export, packed by bzip2 or not: its text is markup."""
    with open_file(path) as file:
        head = file.read(1024)
    if BZIP2_HEADER.match(head):
        try:
            with bz2.open(path) as unpacked:
                head = unpacked.read(1024)
        except (OSError, EOFError) as error:
            raise_if_exhausted(error, path)
            return  # It is damaged, so it is refused as text that is not UTF-8.
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
