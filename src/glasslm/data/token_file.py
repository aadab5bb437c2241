"""TokenFile: the tokens of a split in a file of the cache, read piece by piece.

The file is not mapped into memory: when another program cuts a mapped file, the system kills the
process that reads behind its end (SIGBUS), and no check beforehand is early enough.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import DamagedError

TokenArray = NDArray[np.uint16] | NDArray[np.uint32]  # (N,) token ids


class TokenFile:
    """Tokens (N,) in a file of little-endian integers. Slices are arrays, read when asked for.

    >>> tokens = TokenFile(path, np.dtype(np.uint16))  # doctest: +SKIP
    >>> tokens[10:12]  # doctest: +SKIP
    array([18, 47], dtype=uint16)
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        """Open `path`, which stays readable when it is removed. Raises OSError."""
        self.path, self.dtype = path, dtype
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()  # of the position in the file, where there is no pread
        weakref.finalize(self, os.close, self._descriptor)
        self._bytes = os.fstat(self._descriptor).st_size

    def __len__(self) -> int:
        return self._bytes // self.dtype.itemsize

    def __getitem__(self, part: slice) -> TokenArray:
        """The tokens of a slice with step 1. Raises DamagedError where the file was cut."""
        start, stop, step = part.indices(len(self))
        assert step == 1, "tokens are read in their order"
        size = max(0, stop - start) * self.dtype.itemsize
        content = self._read(start * self.dtype.itemsize, size)
        return np.frombuffer(content, self.dtype)

    def _read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. The system may return fewer at once."""
        parts = [self._read_some(offset, size)]
        n_read = len(parts[0])
        while n_read < size:
            parts.append(self._read_some(offset + n_read, size - n_read))
            n_read += len(parts[-1])
            if not parts[-1]:
                remaining = os.fstat(self._descriptor).st_size
                raise DamagedError(
                    f"the tokens in the cache were cut from {self._bytes:,} to {remaining:,} bytes "
                    "while they were in use: start the command again, `glasslm resume` for a run; "
                    "it makes them again"
                )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_some(self, offset: int, size: int) -> bytes:
        if sys.platform != "win32":
            return os.pread(self._descriptor, size, offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, size)


Tokens = NDArray[Any] | TokenFile  # (N,) token ids
NO_TARGET = -1  # a target that is not predicted


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of the ids in a file of tokens."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def read_windows(tokens: Tokens, starts: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """The `width` tokens from each of `starts` (B,) as (B, width); all must exist.

    Raises DamagedError where the file of the tokens was cut.
    """
    windows = np.empty((len(starts), width), np.int64)
    for row, start in enumerate(starts.tolist()):
        windows[row] = tokens[start : start + width]
    return windows
