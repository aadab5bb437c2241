"""Where the tokens of one call go in a cache of keys and values, for both engines."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Slots:
    """Where new tokens go in a cache of keys and values, and which ones they look at; it serves both engines.

    Row b holds before[b] tokens already and reads the first counts[b] of T more. The token at position p goes into slot
    p mod size, and where the ring is full it replaces the one `size` tokens before it, which no window of that size
    shows to it. So a single new token is written first, and the slots are all that it sees. Of several the first may
    still see what the last replace: they are looked at `beside` so many slots, and written afterwards.
    """

    def __init__(
        self, before: NDArray[np.int64], counts: NDArray[np.int64], T: int, size: int
    ) -> None:
        one = len(before) == 1
        self.before, self.counts, self.T, self.size = before.copy(), counts, T, size
        self.start = int(before[0])
        self.end = self.start + int(counts[0]) if one else int((before + counts).max())
        # Rows that are alike (the usual case) are written and masked as one.
        self.alike = (one and int(counts[0]) == T) or bool(
            (before == self.start).all() and (counts == T).all()
        )
        self.full = self.end > size
        self.beside = min(int(before.max()), size) if self.full and T > 1 else None
        self.seen = (
            min(self.end, size) if self.beside is None else self.beside + T
        )  # S, how many keys are looked at

    @property
    def queries(self) -> NDArray[np.int64]:
        """(T,) if the rows are alike, else (B, T): the positions of the new tokens."""
        if self.alike:
            return np.arange(self.start, self.end)
        return np.minimum(
            self.before[:, None] + np.arange(self.T), max(self.end - 1, 0)
        )  # padding stays in tables

    @property
    def keys(self) -> NDArray[np.int64]:
        """(S,), or (B, S) where they differ from row to row: the positions of the keys; below 0 a slot is empty."""
        if not self.full:
            return np.arange(self.end)
        if self.beside is None:
            keys = self._held(self.before + self.counts)
        else:
            numbers = self.before[:, None] + np.arange(self.T)
            keys = np.concatenate([self._held(self.before)[:, : self.beside], numbers], 1)
        return keys[0] if self.alike else keys

    def _held(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B, size) the position that each slot holds in a row of this length."""
        newest = lengths[:, None] - 1
        return newest - (newest - np.arange(self.size)) % self.size

    @functools.cached_property
    def write(self) -> slice | tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The slots of the new tokens in every row; or rows, columns and slots, of those that are to be kept."""
        if self.alike and (self.T == 1 or not self.full):
            return slice(self.start % self.size, (self.end - 1) % self.size + 1)
        column = np.arange(self.T)
        rows, columns = np.nonzero(
            (column < self.counts[:, None]) & (column >= self.counts[:, None] - self.size)
        )
        return rows, columns, (self.before[rows] + columns) % self.size
