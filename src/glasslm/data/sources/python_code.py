"""The interpreter's own standard library as a corpus: real code, on every machine, with nothing to download.

Its tests are left out (they are twice the rest), and every file that is not ASCII, so that a character model meets at
most 128 symbols.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from glasslm.data.sources.files import Source, SourceFile, source_file
from glasslm.data.sources.texts import SEPARATOR
from glasslm.errors import InputError
from glasslm.text import Say

FACTS = (
    "at most 5 MB",
    "PSF-2.0 (Python's own)",
    "this Python's standard library without its tests; nothing to download",
)

MOST = 5_000_000  # bytes, separators included
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def find(say: Say) -> Source:
    """The first files by path that fit into 5 MB. Raises InputError where Python keeps its library in an archive."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[SourceFile] = []
    total = 0
    for path in _modules(root):
        body = path.read_bytes()
        if not body or not body.isascii():
            continue
        total += len(body) + (len(SEPARATOR) if files else 0)
        if total > MOST:
            break
        files.append(source_file(path))
    if not files:
        raise InputError(
            f"there are no Python files in {root}: give a text of your own with --text-file PATH"
        )
    source = Source("python", tuple(files))
    size = sum(file.bytes for file in files)
    version = ".".join(map(str, sys.version_info[:3]))
    what = f"{len(files)} files of Python {version}'s library, licence PSF-2.0"
    say(f"corpus python: {what}, {size:,} bytes, sha256 {source.sha256}")
    return source


def _modules(root: Path) -> Iterator[Path]:
    """Every module under `root` in the order of their paths, whatever the file system's own order."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        # _sysconfigdata records the machine that built Python, not code
        found += [
            Path(folder, n)
            for n in names
            if n.endswith(".py") and not n.startswith("_sysconfigdata")
        ]
    return iter(sorted(found, key=lambda path: path.relative_to(root).as_posix()))
