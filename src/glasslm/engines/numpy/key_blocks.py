"""Attention of single tokens of several rows, in blocks of keys.

The rounding of a product depends on its shape. A text must not depend on the texts beside it, so
each of its products has the shape of one block of keys, and the results of the blocks are added in
ascending order. Blocks that a row does not need add zeros. A call of NumPy computes many rows and
blocks, because each call takes turns with the other threads.

B rows, S keys, K key-value heads, G query heads a key-value head, Q head size, N blocks, C keys of
a block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.numpy.ops import Array
from glasslm.engines.numpy.soft_cap import cap_scores

KEY_BLOCK = 32  # keys
MAX_GAP = 2  # rows without a block between rows that need it, computed with them


def block_length(size: int) -> int:
    """The keys of a block in a cache for `size` tokens a row."""
    return min(KEY_BLOCK, size)


def rounded_size(size: int) -> int:
    """The tokens a row for which such a cache has memory: those of whole blocks."""
    return math.ceil(size / block_length(size)) * block_length(size)


class KeyBlocks:
    """The blocks of keys that some rows attend to."""

    def __init__(self, n_keys: list[int], size: int) -> None:
        """n_keys (B,): the keys of each row; 0 for a row that reads nothing. size: C."""
        self.size, self.count = size, math.ceil(max(n_keys) / size)
        self.products: list[tuple[slice, slice]] = []  # the rows and the blocks of each
        for block in range(self.count):
            rows = [row for row, n in enumerate(n_keys) if n > block * size]
            for group in group_rows(rows):
                self._add_product(group, block)

    def _add_product(self, rows: slice, block: int) -> None:
        """Compute a block of some rows, in one product with the block before it if it can be."""
        if self.products and self.products[-1] == (rows, slice(self.products[-1][1].start, block)):
            start = self.products.pop()[1].start
        else:
            start = block
        self.products.append((rows, slice(start, block + 1)))

    @property
    def key_count(self) -> int:
        """S: the keys of all blocks."""
        return self.count * self.size


def group_rows(rows: list[int]) -> list[slice]:
    """Slices that hold the ascending `rows`; a gap of up to MAX_GAP others is computed with them.

    >>> group_rows([0, 1, 4, 9])
    [slice(0, 5, None), slice(9, 10, None)]
    """
    groups: list[slice] = []
    for row in rows:
        start = groups.pop().start if groups and row - groups[-1].stop <= MAX_GAP else row
        groups.append(slice(start, row + 1))
    return groups


def fit_positions(key_positions: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Positions (..., S) of keys cut or filled to (..., count); -1 means an empty slot."""
    fitted = np.full((*key_positions.shape[:-1], count), -1)
    n_kept = min(count, key_positions.shape[-1])
    fitted[..., :n_kept] = key_positions[..., :n_kept]
    return fitted


def attend_by_blocks(
    q: Array,
    keys: Array,
    values: Array,
    blocks: KeyBlocks,
    bias: Array | None,
    hidden_mask: Any,
    softcap: float = 0.0,
) -> Array:
    """q (B, K, G, 1, Q), keys and values (B, K, S, Q) -> (B, K, G, 1, Q).

    `bias` (..., S) is added to the scores, after a `softcap`; hidden_mask (..., S) marks the keys
    that are not seen.
    """
    B, K, G, _, Q = q.shape
    N, C = blocks.count, blocks.size
    keys = keys.reshape(B, K, N, C, Q).swapaxes(-1, -2)
    values = values.reshape(B, K, N, C, Q)
    q = q.swapaxes(2, 3) * (1 / math.sqrt(Q))
    scores = np.zeros((B, K, G, 1, N * C), q.dtype)
    block_scores = scores.reshape(B, K, G, N, C).swapaxes(2, 3)  # a view
    for rows, part in blocks.products:
        np.matmul(q[rows], keys[rows, :, part], block_scores[rows, :, part])
    if softcap:
        cap_scores(scores, softcap)
    if bias is not None:
        scores += bias
    np.copyto(scores, -math.inf, where=hidden_mask)
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    # The last number beside the values is the sum of the weights.
    sums = np.zeros((N, B, K, G, Q + 1), q.dtype)
    block_sums = sums.transpose(1, 2, 0, 3, 4)  # (B, K, N, G, Q + 1)
    for rows, part in blocks.products:
        mixed = block_sums[rows, :, part, :, :Q]
        np.matmul(block_scores[rows, :, part], values[rows, :, part], mixed)
    np.add.reduce(block_scores, axis=-1, out=block_sums[..., Q])
    total: Array = np.add.reduce(sums, axis=0)[..., None, :]
    return total[..., :Q] / total[..., Q:]
