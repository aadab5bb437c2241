"""Slots of a KV cache: where the tokens of one call are written, and which keys they attend to.

Both engines use it. Letters: B rows, T new positions, S keys.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class CacheSlots:
    """The slots that one call writes in a KV cache, and the keys that its queries attend to.

    Row b of the cache holds lengths[b] tokens and reads the first counts[b] of T new ones. The
    cache is a ring: the token at position p goes into slot p mod size. When the ring is full, that
    slot holds the token at p - size, which is outside the attention window of the new token.

    A single new token is written first and attends to the slots afterwards. Of several new tokens,
    the first may still attend to tokens that the last ones overwrite. So they attend to the first
    `prefix` slots followed by the new keys, and are written afterwards.
    """

    def __init__(
        self, lengths: NDArray[np.int64], counts: NDArray[np.int64], T: int, size: int
    ) -> None:
        """lengths (B,) tokens in each row of the cache, counts (B,) new ones, size slots a row."""
        single = len(lengths) == 1
        self.lengths, self.counts, self.T, self.size = lengths.copy(), counts, T, size
        self.start = int(lengths[0])
        self.end = self.start + int(counts[0]) if single else int((lengths + counts).max())
        # Rows with equal lengths and counts (the usual case) are written and masked as one.
        self.uniform = (single and int(counts[0]) == T) or bool(
            (lengths == self.start).all() and (counts == T).all()
        )
        self.wraps = self.end > size
        self.prefix = min(int(lengths.max()), size) if self.wraps and T > 1 else None
        self.key_count = min(self.end, size) if self.prefix is None else self.prefix + T  # S

    @property
    def query_positions(self) -> NDArray[np.int64]:
        """(T,) if the rows are uniform, else (B, T): the positions of the new tokens."""
        if self.uniform:
            return np.arange(self.start, self.end)
        positions = self.lengths[:, None] + np.arange(self.T)
        return np.minimum(positions, max(self.end - 1, 0))  # padding stays inside position tables

    @property
    def key_positions(self) -> NDArray[np.int64]:
        """(S,), or (B, S) where rows differ: the positions of the keys; -1 or less: empty slot."""
        if not self.wraps:
            return np.arange(self.end)
        if self.prefix is None:
            keys = self._slot_positions(self.lengths + self.counts)
        else:
            new = self.lengths[:, None] + np.arange(self.T)
            keys = np.concatenate([self._slot_positions(self.lengths)[:, : self.prefix], new], 1)
        return keys[0] if self.uniform else keys

    def _slot_positions(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B, size): the position in each slot of a row that holds lengths[b] tokens."""
        newest = lengths[:, None] - 1
        return newest - (newest - np.arange(self.size)) % self.size

    @functools.cached_property
    def write_index(self) -> slice | tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The slots of the new tokens in every row; or rows, columns and slots, (tokens,) each.

        Padding and tokens that later ones of the same call would overwrite have no entry.
        """
        if self.uniform and (self.T == 1 or not self.wraps):
            return slice(self.start % self.size, (self.end - 1) % self.size + 1)
        column = np.arange(self.T)
        rows, columns = np.nonzero(
            (column < self.counts[:, None]) & (column >= self.counts[:, None] - self.size)
        )
        return rows, columns, (self.lengths[rows] + columns) % self.size
