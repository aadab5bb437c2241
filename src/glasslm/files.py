"""The one place that writes files that must not be half there, for runs and the cache: atomic, hashed, locked.

Whatever is written here is either there as a whole, under its final name, or not at all, also when the process or the
machine dies at any moment. The functions `_make_folder` to `_remove` below are every operation that changes the disk,
so that a test can count them and die at each one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import DamagedError, ExhaustedError, InputError, InUseError

Chunk = bytes | NDArray[Any]

MANIFEST = "manifest.json"
LOCK = "run.lock"
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_LARGEST_JSON = 64 << 20  # bytes; ours are a few kB, a crafted one must not fill the memory
_WINDOWS = os.name == "nt"


# -- whole files and folders ------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that its name holds either the old content or the new one, and keeps it when the power fails.

    Raises ExhaustedError when the disk is full; the old content is intact then. So do the other functions that write.
    """
    with _room(path, len(data)), _aside(path) as temporary:
        _put(temporary, [data])
        _rename(temporary, path)


def write_stream(path: Path, chunks: Iterable[Chunk]) -> None:
    """Write a file atomically, piece by piece: it may be larger than the memory."""
    with _room(path, 0), _aside(path) as temporary:
        _put(temporary, chunks)
        _rename(temporary, path)


@contextmanager
def in_the_making(path: Path) -> Iterator[Path]:
    """Where to make the file or folder `path`: it has its name when the block ends well, and is gone when it does not.

    A folder of that name must be empty.
    """
    make_folder(path.parent)
    with _room(path, 0), _aside(path) as temporary:
        yield temporary
        if path.is_dir() and not any(path.iterdir()):
            _remove(path)
        _rename(temporary, path)


def write_by_hash(folder: Path, chunks: Iterable[Chunk], suffix: str) -> Path:
    """Write a file atomically under the hash of its content, which may be larger than the memory; returns its path."""
    with _room(folder, 0), _aside(folder / "new") as temporary:
        path = folder / f"{_put(temporary, chunks)['sha256']}{suffix}"
        _rename(temporary, path)
    return path


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict, indented JSON, atomically."""
    write_atomic(path, json_bytes(value))


def write_folder(path: Path, contents: Mapping[str, Iterable[Chunk]]) -> None:
    """Write a folder of files, each of bytes and arrays, and manifest.json with their sizes and hashes.

    The folder takes its name when everything in it is on the disk, and then replaces one of the same name. The files
    are written in the order of `contents`, and an iterator is read as its file grows.
    """
    known = [chunks for chunks in contents.values() if isinstance(chunks, Sequence)]
    with _room(path, sum(map(_size, known))), _aside(path) as temporary:
        if temporary.exists():
            _remove(temporary)  # left by a dead process with our number
        _make_folder(temporary)
        manifest = {name: _put(temporary / name, chunks) for name, chunks in contents.items()}
        _put(temporary / MANIFEST, [json_bytes({"files": manifest})])
        _sync_folder(temporary)
        remove_folder(path)
        _rename(temporary, path)


def verify_folder(path: Path, hashes: bool = True) -> None:
    """Compare every file of a folder with its manifest; without `hashes` only their names and sizes, which is quick.

    Raises DamagedError for a missing, extra, truncated or altered file, with the file's name and both sizes or hashes.
    """
    manifest = path / MANIFEST
    values = read_json(manifest)
    try:
        expected = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in values["files"].items()
        }
        if manifest.read_bytes() != json_bytes(
            values
        ):  # a change that leaves the meaning is a change, too
            raise ValueError("other spacing or order")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"{manifest} was altered: it is not as glasslm wrote it ({error!r})"
        ) from None
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if extra := sorted(present - expected.keys()):
        raise DamagedError(f"{path / extra[0]} does not belong there: {manifest} does not list it")
    for name, (size, sha256) in expected.items():
        file = path / name
        if name not in present or not file.is_file():
            raise DamagedError(f"{file} is missing, though {manifest} lists it")
        if file.stat().st_size != size:
            raise DamagedError(
                f"{file} has {file.stat().st_size:,} bytes where {manifest} says {size}: it was cut"
            )
        if hashes and (found := sha256_of(file)) != sha256:
            raise DamagedError(
                f"{file} was altered: its sha256 is {found}, {manifest} says {sha256}"
            )


def make_folder(path: Path) -> None:
    """Create a folder and those above it; one that is there is fine. Raises InputError when that cannot be done."""
    try:
        _make_folder(path, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be made ({error.strerror}): choose another place"
        ) from error


def remove_folder(path: Path) -> None:
    """Remove a folder so that its name never holds half of it. A folder that is not there is fine.

    On Windows a folder that somebody reads cannot go; it stays, and goes another time.
    """
    if path.exists():
        aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-removed")
        with suppress(PermissionError):
            if aside.exists():
                _remove(aside)
            _rename(path, aside)
            _remove(aside)


def sweep(folder: Path) -> None:
    """Remove what dead processes left half written in `folder`. The caller holds the lock: nobody else writes there."""
    for leftover in sorted(folder.glob("*.tmp-[0-9]*")):
        _remove(leftover)


def sync(path: Path) -> None:
    """Have what was written to a file so far on the disk when this returns."""
    with open(path, "r+b", buffering=0) as file:
        _sync(file)


def sha256_of(path: Path) -> str:
    """The hash of a file as 64 hexadecimal digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- a log that grows -------------------------------------------------------------------------------------------------


class Appender:
    """A file that only grows, by whole records. `bytes` is its length.

    It is first cut to `start_bytes`, which must end a line: what came after the checkpoint that a run resumes from.
    Raises DamagedError when the file is shorter than that, ExhaustedError when the disk is full (no half record stays).
    """

    def __init__(self, path: Path, start_bytes: int = 0) -> None:
        self._path = path
        self._file = _open_to_append(path)
        self.bytes = self._file.seek(0, os.SEEK_END)
        if start_bytes:
            self._file.seek(min(start_bytes, self.bytes) - 1 if self.bytes else 0)
            if self.bytes < start_bytes or self._file.read(1) != b"\n":
                self.close()
                raise DamagedError(
                    f"{path} has {self.bytes:,} bytes, none of its lines ends at byte {start_bytes:,}, where the "
                    "checkpoint was written: restore the file from a copy"
                )
        self._cut(start_bytes)

    def append(self, record: bytes) -> None:
        try:
            with _room(self._path, len(record)):
                _write(self._file, record)
        except ExhaustedError:
            self._cut(self.bytes)
            raise
        self.bytes += len(record)

    def close(self) -> None:
        self._file.close()

    def _cut(self, length: int) -> None:
        _truncate(self._file, length)
        self._file.seek(length)
        self.bytes = length


# -- one process a run ------------------------------------------------------------------------------------------------


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder, created if need be, for this process; the system lets go when the process dies.

    Raises InUseError with the holder's process, machine and start when another one holds it, and InputError when
    nothing can be written there.
    """
    from filelock import FileLock, Timeout

    make_folder(folder)
    held = FileLock(folder / LOCK)
    try:
        held.acquire(
            timeout=0.2, poll_interval=0.05
        )  # a moment, in which the winner of a race writes its name
    except Timeout:
        raise InUseError(
            f"{folder} is in use by {_holder(folder / LOCK)}: wait until that ends, or choose another --run-dir"
        ) from None
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): choose another --run-dir"
        ) from error
    try:
        _sign(folder / LOCK)
        sweep(folder)
        sweep(folder / "checkpoints")
        yield
    finally:
        held.release()


# Windows locks the first byte of the file for everybody, the holder's other handles included. So it is a space,
# which nobody reads, and it is written elsewhere only.
_LOCKED_BYTES = 1


def _sign(path: Path) -> None:
    start = datetime.now(UTC).isoformat(timespec="seconds")
    signature = {"pid": os.getpid(), "host": socket.gethostname(), "start": start}
    text = b" " * _LOCKED_BYTES + json.dumps(signature).encode() + b"\n"
    with _room(path, len(text)), open(path, "r+b", buffering=0) as file:
        file.seek(_LOCKED_BYTES if _WINDOWS else 0)
        _write(file, text[file.tell() :])
        _truncate(file, len(text))


def _holder(path: Path) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(_LOCKED_BYTES)
            holder = json.loads(file.read(4096))
            return f"process {holder['pid']} on {holder['host']}, which started {holder['start']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock and has not signed yet
        return "another process"


# -- strict JSON ------------------------------------------------------------------------------------------------------


def json_bytes(value: Any, indent: int | None = 2, sort: bool = False) -> bytes:
    """`value` as strict JSON in UTF-8 with a final line end; ValueError for a number that is not finite.

    A lone surrogate (a file name that is not UTF-8, say) is written as its JSON escape.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, sort_keys=sort)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def parse_json(text: bytes) -> Any:
    """Strict JSON; ValueError for anything else, NaN and Infinity and endless nesting included."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """A JSON file; DamagedError when it is missing or is not strict JSON."""
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    if path.stat().st_size > _LARGEST_JSON:
        raise DamagedError(
            f"{path} has {path.stat().st_size:,} bytes, far more than glasslm writes"
        )
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: it is not JSON ({error})") from None


# -- every operation that changes the disk ----------------------------------------------------------------------------


def _make_folder(path: Path, exist_ok: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=exist_ok)


def _open(path: Path) -> FileIO:
    return open(path, "wb", buffering=0)


def _open_to_append(path: Path) -> FileIO:
    path.touch()
    return open(path, "r+b", buffering=0)


def _write(file: FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:  # the system may take less than it is given
        rest = rest[file.write(rest) :]


def _truncate(file: FileIO, length: int) -> None:
    file.truncate(length)


def _sync(file: FileIO) -> None:
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if not _WINDOWS:  # which has no such call and orders renames itself
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    for patience in range(20, -1, -1):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not _WINDOWS or not patience:
                raise
            time.sleep(0.05)  # a virus scanner looks at what was just written


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _put(path: Path, chunks: Iterable[Chunk]) -> dict[str, Any]:
    """Write a new file, to the disk; its manifest entry."""
    digest, size = hashlib.sha256(), 0
    with _open(path) as file:
        for chunk in chunks:
            data = (
                chunk
                if isinstance(chunk, bytes)
                else np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            )
            digest.update(data)
            _write(file, data)
            size += len(data)
        _sync(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _size(chunks: Sequence[Chunk]) -> int:
    return sum(len(chunk) if isinstance(chunk, bytes) else chunk.nbytes for chunk in chunks)


@contextmanager
def _room(path: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        needs = f"{needed:,} bytes are needed, " if needed else ""  # an iterator does not tell
        raise ExhaustedError(
            f"no room to write {path} ({error.strerror}): {needs}{free:,} are free. Free some space; what was written "
            "before is intact"
        ) from error


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Where to make what shall be renamed to `path`: on the disk for good when the block ends, gone when it fails."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
