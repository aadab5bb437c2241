"""What two texts have in common, word for word: the longest passage, and which windows are found again.

A window's hash is a polynomial of its bytes modulo 2^64, taken from prefix sums, so that all windows of any one length
cost a few array operations. Hashes only point to the places; what is told has been compared byte by byte, so that a
collision might hide a passage, but never makes one up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW = 50  # bytes: longer than what texts of one kind share by chance, shorter than a sentence
CHUNK = 1 << 20  # bytes of the searched text that are hashed at once
FIRST_TRY = 16  # bytes: about what any two texts of one kind share
BASE = 0x9E3779B97F4A7C15  # odd, and so invertible modulo 2^64

Places = NDArray[np.intp]


class Passage(NamedTuple):
    """A stretch of bytes that stands in both."""

    length: int
    piece: int  # which of the pieces has it
    start: int  # where in that piece
    place: int  # where in the searched text, the first time


def longest_shared(pieces: Sequence[bytes], text: bytes) -> Passage:
    """The longest passage of any of the `pieces` that stands in `text`; of several, the one that `text` has first.

    Time and memory are linear in the sizes (about 30 ms for 1 MB); memory does not grow with `text`.

    >>> longest_shared([b"my dear Watson", b"a red herring"], b"The Red-Headed League: my dear fellow")
    Passage(length=8, piece=0, start=0, place=23)
    """
    begins = np.array([0, *accumulate(map(len, pieces))])
    joined = _Hashed(b"".join(pieces))
    left = np.repeat(begins[1:], np.diff(begins)) - np.arange(
        begins[-1]
    )  # bytes to the end of the own piece
    widest = max(map(len, pieces), default=0)
    best = Passage(0, 0, 0, 0)
    for offset, chunk in _chunks(text, widest):
        low, high = (
            best.length,
            min(widest, len(chunk.text)) + 1,
        )  # `low` bytes are shared, `high` are not
        step = 1 if low else FIRST_TRY
        starts, places = np.arange(len(left)), np.arange(len(chunk.text))
        while high - low > 1:
            length = min(low + step, (low + high) // 2)
            pairs = _pairs(joined, starts[left[starts] >= length], chunk, places, length)
            hit = next(
                (
                    pair
                    for pair in zip(pairs.starts, pairs.found)
                    if joined.same(chunk, *pair, length)
                ),
                None,
            )
            if hit is None:
                high = length
                continue
            low, step, starts, places = (
                length,
                2 * step,
                pairs.starts,
                pairs.places,
            )  # longer ones begin there, too
            piece = int(np.searchsorted(begins, hit[0], side="right")) - 1
            best = Passage(length, piece, int(hit[0] - begins[piece]), offset + int(hit[1]))
    return best


def windows_found(windows: bytes, text: bytes, width: int = WINDOW) -> NDArray[np.bool_]:
    """(len(windows) // width,) for each `width` bytes of `windows`, side by side, whether they stand in `text`."""
    mine = _Hashed(windows)
    starts = np.arange(len(windows) // width) * width
    found = np.zeros(len(starts), bool)
    for _, chunk in _chunks(text, width):
        pairs = _pairs(mine, starts, chunk, np.arange(len(chunk.text)), width)
        same = [
            mine.same(chunk, start, place, width) for start, place in zip(pairs.starts, pairs.found)
        ]
        found[pairs.starts[np.array(same, bool)] // width] = True
    return found


class _Hashed:
    """A text whose windows have hashes."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self._inverses = np.cumprod(np.full(len(text), pow(BASE, -1, 1 << 64), np.uint64))
        self._sums: NDArray[np.uint64] = np.zeros(len(text) + 1, np.uint64)
        powers = np.cumprod(np.full(len(text), BASE, np.uint64))
        np.cumsum(np.frombuffer(text, np.uint8) * powers, out=self._sums[1:])

    def hashes(self, places: Places, length: int) -> NDArray[np.uint64]:
        """(len(places),) of the windows of `length` bytes that begin there."""
        ends, begins = self._sums[places + length], self._sums[places]
        return np.multiply(ends - begins, self._inverses[places], dtype=np.uint64)

    def same(self, other: _Hashed, start: int, place: int, length: int) -> bool:
        return self.text[start : start + length] == other.text[place : place + length]


class _Pairs(NamedTuple):
    starts: Places  # of the windows that were found
    found: Places  # where, the first time, each of them
    places: Places  # all where any of them may be


def _pairs(mine: _Hashed, starts: Places, other: _Hashed, places: Places, length: int) -> _Pairs:
    """Of the windows that begin at `starts`, those whose hash one of the windows of `other` at `places` has, too."""
    places = places[places <= len(other.text) - length]
    wanted, there = mine.hashes(starts, length), other.hashes(places, length)
    bits = min(22, max(12, len(wanted).bit_length() + 4))
    high = np.uint64(
        64 - bits
    )  # of a polynomial with an odd base the high bits are the well mixed ones
    table = np.zeros(1 << bits, bool)
    table[_as_index(wanted >> high)] = True
    maybe = np.flatnonzero(
        table[_as_index(there >> high)]
    )  # nearly all others are gone, at the price of a look-up
    places, there = places[maybe], there[maybe]
    if not len(places):
        return _Pairs(starts[:0], places, places)
    order = np.argsort(there, kind="stable")
    at = np.minimum(np.searchsorted(there, wanted, sorter=order), len(order) - 1)
    found = there[order[at]] == wanted
    return _Pairs(starts[found], places[order[at[found]]], places)


def _as_index(small: NDArray[np.uint64]) -> NDArray[Any]:
    return small.view(np.int64)  # which NumPy takes for an index without copying


def _chunks(text: bytes, widest: int) -> Iterator[tuple[int, _Hashed]]:
    """Offset and chunk; they overlap, so that every window of `widest` bytes is whole in one of them."""
    for offset in range(0, len(text), CHUNK):
        yield offset, _Hashed(text[offset : offset + CHUNK + widest])
