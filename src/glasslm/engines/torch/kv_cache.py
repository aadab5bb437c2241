"""The PyTorch engine's cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glasslm.config.schema import ModelConfig
from glasslm.engines.cache_slots import Slots


class KeyValueCache:
    """Keys and values of every layer, (layers, rows, K, size, Q) each, of up to `capacity` tokens a row.

    Of a model that rolls only the newest of a window are kept, and when the whole window fits, a text has no end. Where
    the rows stand is known on the CPU, so that no step waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        c: ModelConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.size = c.cache_length(capacity)
        self.endless = c.rolling and c.window <= capacity
        shape = (c.n_layers, rows, c.n_kv_heads, self.size, c.head_size)
        self.model = model  # whose keys and values these are
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self._lengths = np.zeros(rows, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths.copy()

    def clear(self, row: int) -> None:
        self._lengths[row] = 0

    def reading(self, counts: NDArray[np.int64], T: int) -> Reading:
        """Make room for counts[b] tokens in each row b, the first of T that are given."""
        slots = Slots(self._lengths, counts, T, self.size)
        assert self.endless or slots.end <= self.size, "more tokens than the cache has room for"
        self._lengths = self._lengths + counts
        numbers, write, device = slots.queries, slots.write, self.keys.device
        return Reading(
            self,
            start=slots.start if slots.alike else None,
            numbers=numbers,
            positions=torch.from_numpy(numbers).to(device),
            keys=torch.from_numpy(slots.keys).to(device)
            if slots.full
            else torch.arange(slots.end, device=device),
            beside=slots.beside,
            write=write
            if isinstance(write, slice)
            else tuple(torch.from_numpy(part).to(device) for part in write),
        )


class Reading(NamedTuple):
    """One call that reads new tokens into a cache: numpy/attention.py's Slots, on the device."""

    cache: KeyValueCache
    start: int | None  # where all rows stand alike, that place
    numbers: NDArray[np.int64]  # the positions, on the CPU
    positions: Tensor  # (T,) or (B, T)
    keys: Tensor  # (S,) or (B, S) the positions of the keys that are looked at
    beside: int | None
    write: slice | tuple[Tensor, ...]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values (B, K, T, Q) written; those that are looked at, (B, K, S, Q)."""
        return self._extend(self.cache.keys[layer], k), self._extend(self.cache.values[layer], v)

    def _extend(self, cached: Tensor, new: Tensor) -> Tensor:
        looked_at = cached[:, :, : self.keys.shape[-1]]  # a view, in which the new ones will be
        if self.beside is not None:
            looked_at = torch.cat([cached[:, :, : self.beside], new], 2)
        if isinstance(self.write, slice):
            cached[:, :, self.write] = new
        else:
            rows, columns, places = self.write
            cached[rows, :, places] = new[rows, :, columns]
        return looked_at
