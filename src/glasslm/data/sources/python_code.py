"""The standard library of the running Python as a corpus: code that needs no download.

Its tests are left out, because they are twice the rest. Files that are not ASCII are left out, so a
character model has at most 128 symbols.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from glasslm.data.sources.text_files import Source, SourceFile, source_file
from glasslm.data.sources.texts import SEPARATOR
from glasslm.errors import InputError
from glasslm.text import Notify

FACTS = (
    "at most 5 MB",
    "PSF-2.0 (Python's own)",
    "this Python's standard library without its tests; nothing to download",
)

MAX_BYTES = 5_000_000  # separators included
EXCLUDED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def find_source(notify: Notify) -> Source:
    """The first files by path that fit into 5 MB.

    Raises InputError where Python keeps its library in an archive.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[SourceFile] = []
    total = 0
    for path in _list_modules(root):
        body = path.read_bytes()
        if not body or not body.isascii():
            continue
        total += len(body) + (len(SEPARATOR) if files else 0)
        if total > MAX_BYTES:
            break
        files.append(source_file(path))
    if not files:
        raise InputError(
            f"there are no Python files in {root}: give a text of your own with --text-file PATH"
        )
    source = Source("python", tuple(files))
    size = sum(file.bytes for file in files)
    version = ".".join(map(str, sys.version_info[:3]))
    content = f"{len(files)} files of Python {version}'s library, licence PSF-2.0"
    notify(f"corpus python: {content}, {size:,} bytes, sha256 {source.sha256}")
    return source


def _list_modules(root: Path) -> Iterator[Path]:
    """Every module under `root`, sorted by path: file systems list folders in different orders."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
        paths += [
            Path(folder, name)
            for name in names
            # _sysconfigdata records the machine that built Python.
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return iter(sorted(paths, key=lambda path: path.relative_to(root).as_posix()))
