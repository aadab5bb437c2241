"""Find what two texts share word for word: the longest passage, and windows and lines of one.

Window hashes only propose positions. Every reported match is compared byte by byte, so a hash
collision may hide a passage but never reports a false one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.data.rolling_hash import Positions, RollingHash

# Longer than what texts of one kind share by chance, shorter than a sentence.
WINDOW_BYTES = 50
MIN_LINE_BYTES = 20  # shorter lines repeat in any text
CHUNK_BYTES = 1 << 20  # of the searched text, hashed at once
FIRST_STEP_BYTES = 16  # about what any two texts of one kind share


class Passage(NamedTuple):
    """A stretch of bytes that a piece shares with a text."""

    length: int
    piece: int  # index of the piece
    start: int  # in that piece
    text_start: int  # of the first occurrence in the text


def find_longest_passage(pieces: Sequence[bytes], text: bytes) -> Passage:
    """The longest passage of any of `pieces` that occurs in `text`; of equal ones the first.

    Time and memory are linear in the sizes (about 30 ms for 1 MB). Memory does not grow with
    `text`.

    >>> find_longest_passage([b"my dear Watson", b"a herring"], b"The Red-Headed League: my dear")
    Passage(length=7, piece=0, start=0, text_start=23)
    """
    begins = np.array([0, *accumulate(map(len, pieces))])
    joined = _HashedText(b"".join(pieces))
    # Bytes from each position to the end of its piece.
    bytes_left = np.repeat(begins[1:], np.diff(begins)) - np.arange(begins[-1])
    longest_piece = max(map(len, pieces), default=0)
    best = Passage(0, 0, 0, 0)
    for offset, chunk in _hash_chunks(text, longest_piece):
        # Bisection: a passage of `low` bytes is shared, one of `high` bytes is not.
        low, high = best.length, min(longest_piece, len(chunk.text)) + 1
        step = 1 if low else FIRST_STEP_BYTES
        starts, chunk_starts = np.arange(len(bytes_left)), np.arange(len(chunk.text))
        while high - low > 1:
            length = min(low + step, (low + high) // 2)
            long_enough = starts[bytes_left[starts] >= length]
            matches = _match_hashes(joined, long_enough, chunk, chunk_starts, length)
            match = _first_equal(joined, chunk, matches, length)
            if match is None:
                high = length
                continue
            # A longer passage begins where a shorter one does.
            low, step, starts, chunk_starts = length, 2 * step, matches.starts, matches.candidates
            start, chunk_start = match
            piece = int(np.searchsorted(begins, start, side="right")) - 1
            best = Passage(length, piece, int(start - begins[piece]), offset + int(chunk_start))
    return best


def match_windows(windows: bytes, text: bytes, width: int = WINDOW_BYTES) -> NDArray[np.bool_]:
    """(len(windows) // width,) whether each window occurs in `text`.

    The windows are the successive stretches of `width` bytes of `windows`, without overlap.
    """
    hashed = _HashedText(windows)
    starts = np.arange(len(windows) // width) * width
    in_text = np.zeros(len(starts), bool)
    for _, chunk in _hash_chunks(text, width):
        matches = _match_hashes(hashed, starts, chunk, np.arange(len(chunk.text)), width)
        equal = [
            hashed.equals(chunk, start, chunk_start, width)
            for start, chunk_start in zip(matches.starts, matches.first)
        ]
        in_text[matches.starts[np.array(equal, bool)] // width] = True
    return in_text


def count_shared_line_bytes(lines: bytes, text: bytes) -> int:
    """Bytes of those lines of `lines` that are also lines of `text`.

    White space around a line does not count, nor do lines shorter than MIN_LINE_BYTES. Windows do
    not find a text of shorter lines in another order.

    >>> count_shared_line_bytes(b"The Red-Headed League\\nby", b"The Red-Headed League\\n")
    21
    """
    shared = set(_long_lines(lines)).intersection(_long_lines(text))
    return sum(len(line) for line in _long_lines(lines) if line in shared)


def _long_lines(text: bytes) -> Iterator[bytes]:
    return (line for line in map(bytes.strip, text.split(b"\n")) if len(line) >= MIN_LINE_BYTES)


class _HashedText:
    """A text and the hashes of its windows."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.rolling_hash = RollingHash(np.frombuffer(text, np.uint8))

    def equals(self, other: _HashedText, start: int, other_start: int, length: int) -> bool:
        """Whether the windows of `length` bytes at `start` and `other_start` are equal."""
        return self.text[start : start + length] == other.text[other_start : other_start + length]


class _Matches(NamedTuple):
    """Windows of one text whose hash occurs in another."""

    starts: Positions  # (M,) of the matching windows
    first: Positions  # (M,) of the first window of the other text with the same hash
    candidates: Positions  # (C,) all positions in the other text that may match


def _match_hashes(
    hashed: _HashedText,
    starts: Positions,
    other: _HashedText,
    other_starts: Positions,
    length: int,
) -> _Matches:
    """The windows at `starts` whose hash equals that of a window of `other` at `other_starts`."""
    other_starts = other_starts[other_starts <= len(other.text) - length]
    target_hashes = hashed.rolling_hash.hash_windows(starts, length)
    hashes = other.rolling_hash.hash_windows(other_starts, length)
    # A table of the high bits removes nearly all other windows at the price of a look-up.
    bits = min(22, max(12, len(target_hashes).bit_length() + 4))
    shift = np.uint64(64 - bits)
    is_target = np.zeros(1 << bits, bool)
    is_target[_as_index(target_hashes >> shift)] = True
    candidates = np.flatnonzero(is_target[_as_index(hashes >> shift)])
    other_starts, hashes = other_starts[candidates], hashes[candidates]
    if not len(other_starts):
        return _Matches(starts[:0], other_starts, other_starts)
    order = np.argsort(hashes, kind="stable")
    index = np.minimum(np.searchsorted(hashes, target_hashes, sorter=order), len(order) - 1)
    matching = hashes[order[index]] == target_hashes
    return _Matches(starts[matching], other_starts[order[index[matching]]], other_starts)


def _first_equal(
    hashed: _HashedText, other: _HashedText, matches: _Matches, length: int
) -> tuple[int, int] | None:
    """The first match of two windows with equal bytes."""
    for start, other_start in zip(matches.starts, matches.first):
        if hashed.equals(other, start, other_start, length):
            return start, other_start
    return None


def _as_index(small: NDArray[np.uint64]) -> NDArray[Any]:
    return small.view(np.int64)  # NumPy indexes by it without a copy.


def _hash_chunks(text: bytes, width: int) -> Iterator[tuple[int, _HashedText]]:
    """Offset and chunk; chunks overlap so that every window of `width` bytes is in one of them."""
    for offset in range(0, len(text), CHUNK_BYTES):
        yield offset, _HashedText(text[offset : offset + CHUNK_BYTES + width])
