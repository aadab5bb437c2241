"""Atomic and hashed writing: all files of runs and of the cache, except TensorBoard's events.

A file or folder written here is complete under its final name or absent, even when the process or
the machine dies at any moment. The functions `_make_folder` to `_remove` below are all operations
here that change the disk: a test counts them and dies at each one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import (
    DISK_FULL_ERRNOS,
    DamagedError,
    ExhaustedError,
    InputError,
    explain_system_errors,
)
from glasslm.strict_json import json_bytes, parse_json

Chunk = bytes | NDArray[Any]

MANIFEST = "manifest.json"
REPLACED = "-replaced"  # ends the name of a folder that a new one is about to replace
_MAX_JSON_BYTES = 64 << 20  # glasslm writes a few kB; a crafted file must not fill the memory
_WINDOWS = os.name == "nt"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whose name holds the old content or the new one, also after a power failure.

    Like all functions here that write, it raises ExhaustedError when the disk is full; the old
    content is intact then.
    """
    write_stream(path, [data], len(data))


def write_stream(path: Path, chunks: Iterable[Chunk], needed: int = 0) -> None:
    """Write a file atomically, in pieces: it may be larger than the memory; of `needed` bytes."""
    with _disk_full_errors(path, needed), _temp_path(path) as temporary:
        _write_hashed(temporary, chunks)
        _rename(temporary, path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path for the new file or folder `path`, renamed to it at the end of the block.

    It is deleted when the block raises; the next call removes those of killed processes. Raises
    InputError where `path` exists and is not an empty folder.
    """
    make_folder(path.parent)
    with _disk_full_errors(path, 0), _locked_temp_path(path) as temporary:
        yield temporary
        if path.is_dir() and not any(path.iterdir()):
            _remove(path)
        if path.exists():
            raise InputError(f"{path} exists already: choose a new name")
        _rename(temporary, path)


def write_by_hash(folder: Path, chunks: Iterable[Chunk], suffix: str) -> Path:
    """Write a file, atomically and in pieces, named by its SHA-256; returns its path."""
    with _disk_full_errors(folder, 0), _locked_temp_path(folder / "new") as temporary:
        path = folder / f"{_write_hashed(temporary, chunks)['sha256']}{suffix}"
        _rename(temporary, path)
    return path


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict, indented JSON, atomically."""
    write_atomic(path, json_bytes(value))


def write_folder(path: Path, contents: Mapping[str, Iterable[Chunk]]) -> None:
    """Write a folder atomically: files of bytes and arrays, and a manifest of sizes and hashes.

    It replaces a folder of the same name. The files are written in the order of `contents`; an
    iterator is read while its file is written.
    """
    sequences = [chunks for chunks in contents.values() if isinstance(chunks, Sequence)]
    needed = sum(memoryview(chunk).nbytes for chunks in sequences for chunk in chunks)
    with _disk_full_errors(path, needed), _temp_path(path) as temporary:
        remove(temporary)  # left by a dead process that had this process's number
        _make_folder(temporary)
        manifest = {
            name: _write_hashed(temporary / name, chunks) for name, chunks in contents.items()
        }
        _write_hashed(temporary / MANIFEST, [json_bytes({"files": manifest})])
        _sync_folder(temporary)
        _put_in_place(temporary, path)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished folder to `path`, and remove the folder that was there.

    After a kill between the two renames, `remove_leftovers` gives the old one its name back.
    """
    replaced = path.with_name(f"{path.name}.tmp-{os.getpid()}{REPLACED}")
    remove(replaced)
    try:
        if path.exists():
            _rename(path, replaced)
        _rename(temporary, path)
    except BaseException:
        if replaced.exists() and not path.exists():
            _rename(replaced, path)
        raise
    with suppress(PermissionError):  # Windows: another process reads it
        remove(replaced)


def verify_folder(path: Path, hashes: bool = True) -> None:
    """Compare all files of a folder with its manifest; without `hashes` only names and sizes.

    Raises DamagedError for a missing, extra, truncated or altered file, with its name and both
    sizes or hashes.
    """
    manifest = path / MANIFEST
    values = read_json(manifest)
    try:
        expected = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in values["files"].items()
        }
        if manifest.read_bytes() != json_bytes(values):  # the same values, formatted otherwise
            raise ValueError("other spacing or order")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{manifest} was altered: {error!r}") from None
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if extra := sorted(present - expected.keys()):
        raise DamagedError(f"{path / extra[0]} does not belong there: {manifest} does not list it")
    for name, (size, sha256) in expected.items():
        file = path / name
        if name not in present or not file.is_file():
            raise DamagedError(f"{file} is missing, though {manifest} lists it")
        if (n_bytes := file.stat().st_size) != size:
            raise DamagedError(f"{file} has {n_bytes:,} bytes, {manifest} says {size}: it was cut")
        if hashes and (actual := file_sha256(file)) != sha256:
            raise DamagedError(
                f"{file} was altered: its sha256 is {actual}, {manifest} says {sha256}"
            )


def make_folder(path: Path) -> None:
    """Create a folder, with its parents, unless it exists; InputError where that is impossible."""
    with explain_system_errors(
        path, lambda why: InputError(f"{path} cannot be created ({why}): choose another place")
    ):
        _make_folder(path, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists. A folder may stay in part when the process dies."""
    if path.exists():
        _remove(path)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists, so that its name never holds a part of it.

    On Windows a folder that another process reads stays until the next call.
    """
    if path.exists():
        renamed = path.with_name(f"{path.name}.tmp-{os.getpid()}-removed")
        with suppress(PermissionError):
            remove(renamed)
            _rename(path, renamed)
            _remove(renamed)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of dead processes from `folder`. The caller holds its lock.

    A folder that was to be replaced, and whose place is empty, is put back.
    """
    for leftover in sorted(folder.glob("*.tmp-[0-9]*")):
        name, _, ending = leftover.name.rpartition(".tmp-")
        if ending.endswith(REPLACED) and not (folder / name).exists():
            _rename(leftover, folder / name)
        else:
            _remove(leftover)


def _remove_orphans(folder: Path) -> None:
    """Remove what killed processes left in `_locked_temp_path`, also files written beside it."""
    from filelock import FileLock, Timeout

    for lock in sorted(folder.glob("*.tmp-[0-9]*.lock")):
        # A process that lives holds it; OSError: another process removes it, too.
        with suppress(Timeout, OSError), FileLock(lock, timeout=0):
            for entry in folder.iterdir():
                if f"{entry.name}.".startswith(f"{lock.stem}.") and entry != lock:
                    _remove(entry)
            lock.unlink()


def overwrite(path: Path, data: bytes, start: int = 0) -> None:
    """Replace the content of a small file in place, from byte `start` on by data[start:]."""
    with _disk_full_errors(path, len(data)), open(path, "r+b", buffering=0) as file:
        file.seek(start)
        _write(file, data[start:])
        _truncate(file, len(data))


def sync_file(path: Path) -> None:
    """Flush what was written to a file so far to the disk."""
    with open(path, "r+b", buffering=0) as file:
        _sync(file)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits; the file is read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- a log that grows ------------------------------------------------------------------------------


class Appender:
    """A file that grows by whole records. `bytes` is its length.

    The constructor cuts it to `start_bytes`, the end of a line: a resumed run drops what follows
    its checkpoint. Raises DamagedError when the file is shorter or no line ends there,
    ExhaustedError when the disk is full; no partial record stays.
    """

    def __init__(self, path: Path, start_bytes: int = 0) -> None:
        self._path, self._file = path, _open_to_append(path)
        self.bytes = self._file.seek(0, os.SEEK_END)
        if start_bytes:
            self._file.seek(min(start_bytes, self.bytes) - 1 if self.bytes else 0)
            if self.bytes < start_bytes or self._file.read(1) != b"\n":
                self.close()
                raise DamagedError(
                    f"{path} has {self.bytes:,} bytes, and no line ends at byte {start_bytes:,}, "
                    "where the checkpoint was written: restore the file from a copy"
                )
        self._cut(start_bytes)

    def append(self, record: bytes) -> None:
        """Write a record; it is visible to all readers when this returns."""
        try:
            with _disk_full_errors(self._path, len(record)):
                _write(self._file, record)
        except ExhaustedError:
            self._cut(self.bytes)
            raise
        self.bytes += len(record)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut(self, length: int) -> None:
        _truncate(self._file, length)
        self._file.seek(length)
        self.bytes = length


def read_json(path: Path) -> Any:
    """The value of a JSON file; DamagedError when it is missing, too large or not strict JSON."""
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise DamagedError(
            f"{path} has {path.stat().st_size:,} bytes: glasslm writes {_MAX_JSON_BYTES:,} at most"
        )
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: it is not JSON ({error})") from None


# -- every operation that changes the disk ---------------------------------------------------------


def _make_folder(path: Path, exist_ok: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=exist_ok)


def _open(path: Path) -> FileIO:
    return open(path, "wb", buffering=0)


def _open_to_append(path: Path) -> FileIO:
    path.touch()
    return open(path, "r+b", buffering=0)


def _write(file: FileIO, data: bytes | memoryview) -> None:
    unwritten = memoryview(data)
    while unwritten:  # the system may write a part only
        unwritten = unwritten[file.write(unwritten) :]


def _truncate(file: FileIO, length: int) -> None:
    file.truncate(length)


def _sync(file: FileIO) -> None:
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if not _WINDOWS:  # Windows has no such call and orders renames itself
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    for retries_left in range(20, -1, -1):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not _WINDOWS or not retries_left:
                raise
            time.sleep(0.05)  # a virus scanner has the new file open


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_hashed(path: Path, chunks: Iterable[Chunk]) -> dict[str, Any]:
    """Write a new file and flush it to the disk; returns its manifest entry."""
    digest, size = hashlib.sha256(), 0
    with _open(path) as file:
        for chunk in chunks:
            data: bytes | memoryview
            if isinstance(chunk, bytes):
                data = chunk
            else:
                data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            digest.update(data)
            _write(file, data)
            size += len(data)
        _sync(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


@contextmanager
def _disk_full_errors(path: Path, needed: int) -> Iterator[None]:
    """Raise ExhaustedError where the disk is full. `needed` bytes are to be written; 0: unknown."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        free = shutil.disk_usage(path.parent).free
        needs = f"{needed:,} bytes are needed, " if needed else ""
        raise ExhaustedError(
            f"no room to write {path} ({error.strerror}): {needs}{free:,} are free. Free some "
            "space; what was written before is intact"
        ) from error


@contextmanager
def _temp_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which the block renames; deleted when the block raises."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
    except BaseException:
        with suppress(OSError):  # the error of the block is the one to report
            remove(temporary)
        raise
    _sync_folder(path.parent)


@contextmanager
def _locked_temp_path(path: Path) -> Iterator[Path]:
    """A `_temp_path` with a lock: after a kill nobody holds it, and the next call removes both."""
    from filelock import FileLock

    _remove_orphans(path.parent)
    lock = path.with_name(f"{path.name}.tmp-{os.getpid()}.lock")
    try:
        with _temp_path(path) as temporary, FileLock(lock):
            yield temporary
    finally:
        lock.unlink(missing_ok=True)
