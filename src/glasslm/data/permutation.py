"""Random bijections of a range without memory: the orders in which epochs visit their windows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = 6
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: its high bits mix well
SPLITMIX64_FACTOR = 0xBF58476D1CE4E5B9  # the second factor of splitmix64


def make_philox(seed: int, index: int) -> np.random.Philox:
    """The random numbers of a step or an epoch."""
    return np.random.Philox(key=np.array([seed, index], np.uint64))


def draw_keys(seed: int, epoch: int, count: int = FEISTEL_ROUNDS) -> NDArray[np.uint64]:
    """(count,) random numbers of an epoch, such as the keys of `permute_indices`."""
    return make_philox(seed, epoch).random_raw(count)


def permute_indices(
    indices: NDArray[np.int64], n: int, keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """The images of `indices`, same shape (B,), under a random bijection of range(n).

    `keys` is (FEISTEL_ROUNDS,) and selects the bijection. Time and memory do not depend on n. A
    Feistel network permutes the least power of four that holds n. An image outside range(n) is
    permuted again until it falls inside, which keeps the map a bijection (Black and Rogaway 2002,
    "cycle walking").
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    result = indices.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> half_bits, result[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(GOLDEN_RATIO_64)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(SPLITMIX64_FACTOR)
            left, right = right, left ^ (mixed >> np.uint64(40)) & mask
        result[outside] = left << half_bits | right
        outside = result >= n
    return result.astype(np.int64)


def items_at(seed: int, places: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """The items, below `total`, at `places` (B,) of an endless sequence of passes over all items.

    Each pass has every item once, in an order of its own.
    """
    passes, items = np.divmod(places, total)
    for number in np.unique(passes).tolist():
        in_pass = passes == number
        items[in_pass] = permute_indices(items[in_pass], total, draw_keys(seed, number))
    return items
