"""Which elements dropout removes, as an integer hash: the same in both engines, on any thread, rank or recomputation.

An element is kept when hash(seed, step, row, site, element) is at or above p x 2^32. The hash chains murmur3's
finaliser (A. Appleby, 2011), which an engine evaluates over the elements with wrapping 32-bit arithmetic; this file
makes the key that starts the chain, one for each row of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EMBEDDING_SITE = 0
PROBABILITIES, AFTER_ATTENTION, AFTER_FEEDFORWARD = 1, 2, 3  # sites of a block


def site(layer: int, place: int) -> int:
    """The number of a place in a block; the embedding, before all blocks, is EMBEDDING_SITE."""
    return 3 * layer + place


def row_keys(seed: int, step: int, rows: NDArray[np.int64], site: int) -> NDArray[np.uint32]:
    """(B,) the keys of the rows of a step at a site; `rows` are indices in the step's global batch."""
    key = np.array([0x9E3779B9], np.uint32)
    for word in (seed, seed >> 32, step, site):
        key = mix(key ^ np.uint32(word & 0xFFFFFFFF))
    return mix(key ^ rows.astype(np.uint32))


def mix(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """murmur3's 32-bit finaliser, element by element."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def threshold(p: float) -> int:
    """Hashes below it are dropped."""
    return int(p * 2**32)
