"""The KV cache of the NumPy engine. K key-value heads, H query heads, Q head size."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.documents import last_document_start
from glasslm.engines.numpy.key_blocks import block_length, rounded_size


class KVCache:
    """Keys and values of every layer, (layers, rows, K, size, Q) each, for `capacity` tokens a row.

    The arrays hold whole blocks of keys (key_blocks.py), so they may be longer than `size`.

    A model with a rolling cache keeps the newest tokens of its window only. If the whole window
    fits, a text has no end.
    """

    def __init__(
        self, c: ModelConfig, rows: int, capacity: int, dtype: Any, keep_queries: bool = False
    ) -> None:
        self.config = c
        self.size = c.cache_length(capacity)
        self.is_unbounded = c.has_rolling_cache and c.window <= capacity
        self.block_size = block_length(self.size)
        n_slots = rounded_size(self.size)
        self.keys = np.zeros((c.n_layers, rows, c.n_kv_heads, n_slots, c.head_size), dtype)
        self.values = np.zeros_like(self.keys)
        # Attention of a file gets whole texts, so the queries of earlier tokens are kept for it.
        queries = (c.n_layers, rows, c.n_heads, self.size, c.head_size)
        self.queries = np.zeros(queries if keep_queries else 0, dtype)
        self._lengths = np.zeros(rows, np.int64)
        self._last_starts = np.zeros(rows, np.int64)  # of the last document in each row

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) the number of tokens in each row."""
        return self._lengths.copy()

    def clear(self, row: int) -> None:
        """Empty one row, to use it for another text."""
        self._lengths[row] = self._last_starts[row] = 0

    def erase(self, row: int) -> None:
        """Cache.erase."""
        self.clear(row)
        self.keys[:, row] = self.values[:, row] = 0
        if self.queries.size:
            self.queries[:, row] = 0

    def copy_prefix(self, source: int, row: int, tokens: NDArray[np.int64]) -> None:
        """Cache.copy_prefix: tokens (T,)."""
        if source != row:
            kept = (self.keys, self.values, *([self.queries] if self.queries.size else []))
            for cached in kept:
                cached[:, row, :, : len(tokens)] = cached[:, source, :, : len(tokens)]
        self._lengths[row] = len(tokens)
        self._last_starts[row] = last_document_start(self.config, tokens)

    def part(self, rows: slice) -> KVCache:
        """Some of the rows, as views of the same memory."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, rows], self.values[:, rows]
        if self.queries.size:
            view.queries = self.queries[:, rows]
        view._lengths = self._lengths[rows]
        view._last_starts = self._last_starts[rows]
        return view
