"""Which windows of the text make the batch of a step."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

Shard = NDArray[np.uint16] | NDArray[np.uint32]  # the tokens of a split, (N,)
ROUNDS = 6  # of the Feistel network that permutes windows


class Order:
    """Which windows of the training tokens make up the batch of a step.

    By default each row is a window drawn at random. With `epochs`, windows do not overlap, and each pass visits every
    one of them once, in an order of its own and shifted by a phase of its own, so that its edges fall elsewhere.
    """

    def __init__(
        self, n_tokens: int, block_size: int, batch_size: int, seed: int, epochs: bool
    ) -> None:
        assert n_tokens > block_size, "require_room comes first"
        self.n_tokens, self.block_size, self.batch_size = n_tokens, block_size, batch_size
        self.seed, self.epochs = seed, epochs
        self.windows = (n_tokens - 1) // block_size  # of one pass: every target is predicted once

    def batch(
        self, tokens: Shard, step: int, rows: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets, each (len(rows), T), of these rows of the batch of `step` (from 0)."""
        starts = self.starts(step, np.asarray(rows, np.int64))
        windows = tokens[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def starts(self, step: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(len(rows),) position of each row's first token."""
        if not self.epochs:
            draws = np.random.Generator(self._philox(step)).random(self.batch_size)
            drawn: NDArray[np.int64] = (draws * (self.n_tokens - self.block_size)).astype(np.int64)[
                rows
            ]
            return drawn
        passes, samples = np.divmod(step * self.batch_size + rows, self.windows)
        starts = np.empty(len(rows), np.int64)
        for one in np.unique(passes):
            keys = self._philox(int(one)).random_raw(ROUNDS + 1)
            phase = int(keys[-1]) % ((self.n_tokens - 1) % self.block_size + 1)
            mine = passes == one
            starts[mine] = phase + self.block_size * permuted(
                samples[mine], self.windows, keys[:-1]
            )
        return starts

    def _philox(self, index: int) -> np.random.Philox:
        return np.random.Philox(key=np.array([self.seed, index], np.uint64))

    def epoch(self, step: int) -> float:
        """Passes over the training tokens after `step` steps."""
        return step * self.batch_size / self.windows

    def steps_for(self, epochs: float) -> int:
        """The number of steps that visit every window `epochs` times."""
        return math.ceil(Fraction(str(epochs)) * self.windows / self.batch_size)


def permuted(indices: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a bijection of range(n), drawn by `keys`, sends each index: in constant time and memory, whatever n.

    A Feistel network permutes the least power of four that holds n; what falls outside range(n) is sent on until it
    falls inside, which keeps it a bijection (Black and Rogaway 2002, "cycle walking").
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = indices.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(
                0x9E3779B97F4A7C15
            )  # 2^64 / golden ratio, odd: its high bits mix well
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(
                0xBF58476D1CE4E5B9
            )  # splitmix64's second factor
            left, right = right, left ^ (mixed >> np.uint64(40)) & mask
        result[outside] = left << half | right
        outside = result >= n
    return result.astype(np.int64)
