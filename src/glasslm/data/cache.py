"""The cache folder: GLASSLM_CACHE, or the cache folder of the user. It keeps downloads and tokens.

All of it but `stdin/`, the text that came through pipes, can be deleted at any time: the next run
makes it again, the text of a parquet file only as long as the parquet file exists.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glasslm import files
from glasslm.errors import (
    DISK_FULL_ERRNOS,
    ExhaustedError,
    GlasslmError,
    InputError,
    raise_if_exhausted,
)


def cache_dir(*names: str) -> Path:
    """The folder `names` inside the cache, created if necessary. Raises InputError."""
    configured = os.environ.get("GLASSLM_CACHE")
    if configured:
        root = Path(configured).expanduser()
    else:
        import platformdirs

        root = Path(platformdirs.user_cache_dir("glasslm"))
    folder = root.joinpath(*names)
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError of writing into `folder` into ExhaustedError (disk full) or InputError."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error, ExhaustedError) else error
        if isinstance(cause, OSError) and cause.errno in DISK_FULL_ERRNOS:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            raise ExhaustedError(
                f"the disk of the cache {folder} is full "
                f"({shutil.disk_usage(existing).free:,} bytes free): "
                "make room, or set GLASSLM_CACHE to a folder on another disk"
            ) from error
        if isinstance(error, GlasslmError):  # DamagedError is also an OSError.
            raise
        raise_if_exhausted(error, folder)
        raise InputError(
            f"the cache folder {folder} cannot be written ({error.strerror or error}): "
            "set GLASSLM_CACHE to another one"
        ) from error


def write_cached(path: Path, body: bytes) -> None:
    """Write a file of the cache atomically; its folder is created if necessary."""
    with explain_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, body)
