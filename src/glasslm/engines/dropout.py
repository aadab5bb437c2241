"""The hash that chooses which elements dropout removes: the same in both engines and on any rank.

An element is kept when hash(seed, step, row, site, element) is at or above p x 2^32. The hash
chains murmur3's finalizer (A. Appleby, 2011). Each engine evaluates the last link of the chain over
the elements, in wrapping 32-bit arithmetic; this module computes the key that starts it, one for
each row of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EMBEDDING_SITE = 0
PROBABILITIES, AFTER_ATTENTION, AFTER_FEEDFORWARD = 1, 2, 3  # the places in a block


def site_number(layer: int, place: int) -> int:
    """The site of a place in a block. The embedding, before all blocks, is EMBEDDING_SITE."""
    return 3 * layer + place


def row_keys(seed: int, step: int, rows: NDArray[np.int64], site: int) -> NDArray[np.uint32]:
    """(B,): the keys of the rows of a step at a site.

    rows (B,) are indices in the step's global batch, so that a key does not depend on how the batch
    is divided over threads or ranks.
    """
    key = np.array([0x9E3779B9], np.uint32)
    for word in (seed, seed >> 32, step, site):
        key = mix_bits(key ^ np.uint32(word & 0xFFFFFFFF))
    return mix_bits(key ^ rows.astype(np.uint32))


def mix_bits(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """murmur3's 32-bit finalizer of each element of h (any shape). Overwrites and returns h."""
    shifted = h >> np.uint32(16)
    h ^= shifted
    h *= np.uint32(0x85EBCA6B)
    np.right_shift(h, np.uint32(13), out=shifted)
    h ^= shifted
    h *= np.uint32(0xC2B2AE35)
    np.right_shift(h, np.uint32(16), out=shifted)
    h ^= shifted
    return h


def drop_threshold(p: float) -> int:
    """The number below which a hash means that the element is dropped."""
    return int(p * 2**32)
