"""Hashes of all windows of a sequence: polynomials modulo 2^64, computed from prefix sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BASE = 0x9E3779B97F4A7C15  # odd, and so invertible modulo 2^64

Positions = NDArray[np.intp]


class RollingHash:
    """Hashes of the windows of one sequence, of any length, with a few array operations.

    Equal windows have equal hashes, also in two sequences. Different windows may have equal hashes.
    The high bits are mixed better than the low bits, because the base is odd.
    """

    def __init__(self, codes: NDArray[Any]) -> None:
        """`codes`: (N,) unsigned integers, such as bytes or code points."""
        n = len(codes)
        self._inverse_powers = np.cumprod(np.full(n, pow(BASE, -1, 1 << 64), np.uint64))
        self._prefix_sums: NDArray[np.uint64] = np.zeros(n + 1, np.uint64)
        powers = np.cumprod(np.full(n, BASE, np.uint64))
        np.cumsum(codes * powers, out=self._prefix_sums[1:])

    def hash_windows(self, starts: Positions, length: int) -> NDArray[np.uint64]:
        """(len(starts),) hashes of the windows of `length` elements that begin at `starts`."""
        sums = self._prefix_sums[starts + length] - self._prefix_sums[starts]
        return np.multiply(sums, self._inverse_powers[starts], dtype=np.uint64)

    def hash_all_windows(self, length: int) -> NDArray[np.uint64]:
        """(N - length + 1,) hashes of all windows of `length` elements; empty if N < length."""
        n_windows = len(self._inverse_powers) - length + 1
        if n_windows < 1:
            return np.zeros(0, np.uint64)
        sums = self._prefix_sums[length:] - self._prefix_sums[:n_windows]
        return np.multiply(sums, self._inverse_powers[:n_windows], dtype=np.uint64)
