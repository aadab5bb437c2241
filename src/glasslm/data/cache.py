"""The cache folder, where downloads, spooled input and tokens are kept between runs: GLASSLM_CACHE, or the user's own.

Everything in it can be deleted at any time; the next run makes it again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glasslm import files
from glasslm.errors import ExhaustedError, GlasslmError, InputError


def cache_dir(*names: str) -> Path:
    """The folder `names` inside the cache, made if it is missing. Raises InputError where it cannot be."""
    chosen = os.environ.get("GLASSLM_CACHE")
    if chosen:
        root = Path(chosen).expanduser()
    else:
        import platformdirs

        root = Path(platformdirs.user_cache_dir("glasslm"))
    folder = root.joinpath(*names)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the failures of writing into `folder` into one clear line: ExhaustedError (disk full) or InputError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ExhaustedError) or error.errno in files.FULL:
            there = next(path for path in (folder, *folder.parents) if path.exists())
            raise ExhaustedError(
                f"the disk of the cache {folder} is full ({shutil.disk_usage(there).free:,} bytes free): make room, or "
                "set GLASSLM_CACHE to a folder on another disk"
            ) from error
        if isinstance(error, GlasslmError):  # DamagedError is an OSError as well
            raise
        raise InputError(
            f"the cache folder {folder} cannot be written ({error.strerror or error}): set GLASSLM_CACHE to another one"
        ) from error


def keep(path: Path, body: bytes) -> None:
    """Write a file into the cache so that it is there whole or not at all."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, body)
