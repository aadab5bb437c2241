"""The KV cache of the PyTorch engine.

Letters: B rows, T new positions, S keys, K key-value heads, Q head size.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glasslm.config.schema import ModelConfig
from glasslm.engines.cache_slots import CacheSlots
from glasslm.engines.documents import continued_starts, last_document_start


class KVCache:
    """Keys and values of up to `capacity` tokens a row, (layers, B, K, size, Q) each.

    A model with a rolling cache stores one window. If the whole window fits, there is no limit to
    the length of a text. The lengths are known on the CPU, so that no step waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        c: ModelConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        keep_queries: bool = False,
    ) -> None:
        self.size = c.cache_length(capacity)
        self.is_unbounded = c.has_rolling_cache and c.window <= capacity
        shape = (c.n_layers, rows, c.n_kv_heads, self.size, c.head_size)
        self.config = c
        self.model = model  # computes the keys and values
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        # Attention of a file gets whole texts, so the queries of earlier tokens are kept for it.
        self.queries = (
            self.keys.new_zeros((c.n_layers, rows, c.n_heads, self.size, c.head_size))
            if keep_queries
            else None
        )
        self._lengths = np.zeros(rows, np.int64)
        self._last_starts = np.zeros(rows, np.int64)  # of the last document in each row

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(B,) the number of tokens in each row."""
        return self._lengths.copy()

    def clear(self, row: int) -> None:
        """Empty one row."""
        self._lengths[row] = self._last_starts[row] = 0

    def erase(self, row: int) -> None:
        """Cache.erase."""
        self.clear(row)
        for cached in (self.keys, self.values, self.queries):
            if cached is not None:
                cached[:, row] = 0

    def part(self, rows: slice) -> KVCache:
        """Cache.part."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, rows], self.values[:, rows]
        if self.queries is not None:
            view.queries = self.queries[:, rows]
        view._lengths, view._last_starts = self._lengths[rows], self._last_starts[rows]
        return view

    def copy_prefix(self, source: int, row: int, tokens: NDArray[np.int64]) -> None:
        """Cache.copy_prefix: tokens (T,)."""
        if source != row:
            kept = (self.keys, self.values, *([] if self.queries is None else [self.queries]))
            for cached in kept:
                cached[:, row, :, : len(tokens)] = cached[:, source, :, : len(tokens)]
        self._lengths[row] = len(tokens)
        self._last_starts[row] = last_document_start(self.config, tokens)

    def advance(self, counts: NDArray[np.int64], tokens: NDArray[Any]) -> CacheView:
        """Add counts[b] of tokens (B, T) to the length of each row b; returns their view.

        counts (B,). The caller then writes keys and values through the view.
        """
        slots = CacheSlots(self._lengths, counts, tokens.shape[1], self.size)
        starts = continued_starts(self.config, tokens, self._lengths, counts, self._last_starts)
        if starts is not None:
            self._last_starts[...] = starts[:, -1]
        assert self.is_unbounded or slots.end <= self.size, (
            "more tokens than the cache has room for"
        )
        self._lengths += counts
        queries, write, device = slots.query_positions, slots.write_index, self.keys.device
        keys = (
            torch.from_numpy(slots.key_positions).to(device)
            if slots.wraps
            else torch.arange(slots.end, device=device)
        )
        row_keys = None
        if slots.T == 1 and not slots.uniform and device.type == "cpu":
            n_keys = np.minimum(self._lengths, self.size)
            row_keys = [(int(b), int(n_keys[b])) for b in np.flatnonzero(counts)]
        return CacheView(
            self,
            start=slots.start if slots.uniform else None,
            cpu_positions=queries,
            positions=torch.from_numpy(queries).to(device),
            key_positions=keys,
            prefix=slots.prefix,
            starts=None if starts is None else torch.from_numpy(starts).to(device),
            write_index=write
            if isinstance(write, slice)
            else tuple(torch.from_numpy(part).to(device) for part in write),
            row_keys=row_keys,
        )


class CacheView(NamedTuple):
    """The part of a KV cache that one call writes and attends to: CacheSlots on the device."""

    cache: KVCache
    start: int | None  # the position of the first new token, where all rows have the same
    cpu_positions: NDArray[np.int64]  # `positions` as a NumPy array
    positions: Tensor  # (T,) or (B, T) of the new tokens
    key_positions: Tensor  # (S,) or (B, S) of the keys that the new tokens attend to
    prefix: int | None
    starts: Tensor | None  # (B, T) first positions of the new tokens' documents
    write_index: slice | tuple[Tensor, ...]
    # On a CPU, the rows that read a single token and the number of their keys, where it differs:
    # the rounding of attention depends on this number, and must not on that of other rows.
    row_keys: list[tuple[int, int]] | None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, K, T, Q); returns those to attend to, (B, K, S, Q) each.

        Overwrites slots of the cache. The returned tensors may be views of it.
        """
        return self._extend(self.cache.keys[layer], k), self._extend(self.cache.values[layer], v)

    def extend_queries(self, layer: int, q: Tensor) -> Tensor:
        """Write new queries (B, H, T, Q); returns those of the whole texts, (B, H, S, Q)."""
        assert self.cache.queries is not None, "the cache keeps no queries"
        return self._extend(self.cache.queries[layer], q)

    def _extend(self, cached: Tensor, new: Tensor) -> Tensor:
        visible = cached[:, :, : self.key_positions.shape[-1]]  # a view, written below
        if self.prefix is not None:
            visible = torch.cat([cached[:, :, : self.prefix], new], 2)
        if isinstance(self.write_index, slice):
            cached[:, :, self.write_index] = new
        else:
            rows, columns, slots = self.write_index
            cached[rows, :, slots] = new[rows, :, columns]
        return visible
