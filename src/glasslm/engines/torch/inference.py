"""Inference: the forward pass with a KV cache, in tiles of rows on a CPU.

Letters: B rows, T new positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glasslm.engines.torch.kv_cache import KVCache
from glasslm.engines.torch.layers import upcast
from glasslm.engines.torch.model import Transformer

Array = NDArray[Any]

# Rows of a cache that a CPU computes together. In a product of 4, 8 or 16 rows, each has the same
# bits in every place and beside any other rows (docs/log.md).
CPU_ROW_TILE = 16


def read_tokens(tokens: Array, cache: KVCache, counts: NDArray[np.int64], every: bool) -> Array:
    """Engine.logits: tokens (B, T), counts (B,) -> (B, V), or (B, T, V) with `every`."""
    if cache.keys.device.type != "cpu":
        return _read_rows(tokens, cache, counts, every)
    tiles = [slice(start, start + CPU_ROW_TILE) for start in range(0, len(tokens), CPU_ROW_TILE)]
    logits = [_read_rows(tokens[tile], cache.part(tile), counts[tile], every) for tile in tiles]
    return logits[0] if len(tiles) == 1 else np.concatenate(logits)


def _read_rows(tokens: Array, cache: KVCache, counts: NDArray[np.int64], every: bool) -> Array:
    """`read_tokens` of rows that are computed together."""
    model, device, (B, T) = cache.model, cache.keys.device, tokens.shape
    assert isinstance(model, Transformer)
    if not counts.any():
        return np.zeros((B, *[T] * every, len(model.embedding.weight)), np.float32)
    view = cache.advance(counts, tokens)
    x, _ = model.hidden_states(torch.from_numpy(np.ascontiguousarray(tokens)).to(device), view=view)
    if not every:
        x = x[
            torch.arange(B, device=device), torch.from_numpy(np.maximum(counts - 1, 0)).to(device)
        ]
    logits: Array = upcast(model.logits(x)).cpu().numpy()
    return logits
