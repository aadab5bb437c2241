"""The matrices of a model in transformers that LoRA adapts, and glasslm's modules in them.

GPT-2, GPT-NeoX and Phi-3 have the queries, keys and values in one matrix, Phi-3 also the two halves
of a gated feed-forward. B (out, r) of an adapter of such a matrix has rows for each module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.interop.family import Family
from glasslm.interop.weight_names import module_height

WEIGHT = ".weight"


@dataclass(frozen=True)
class AdaptableMatrix:
    """A matrix of transformers, as (out, in), that may have an adapter."""

    target: str  # the entry of PEFT's target_modules for this matrix of every layer
    modules: tuple[str, ...]  # blocks.0.attention.q
    rows: tuple[NDArray[np.int64], ...]  # those of each module

    @property
    def height(self) -> int:
        """The number of rows."""
        return sum(map(len, self.rows))

    def split_rows(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """The rows of an array (out, ...) that belong to each module."""
        return [array[rows] for rows in self.rows]


def adaptable_matrices(c: ModelConfig, family: Family) -> dict[str, AdaptableMatrix]:
    """The matrices of a model that may have an adapter, by their paths in transformers."""
    words = [f"attention.{word}" for word in "qkvo"]
    if not c.n_experts:
        words += [
            f"feedforward.{word}" for word in ("gate", "up", "down") if c.is_gated or word != "gate"
        ]
    names = family.names(c)
    parts: dict[str, list[str]] = {}  # by the path inside a block
    for word in words:
        name = names.hf_name(f"blocks.0.{word}{WEIGHT}").removesuffix(WEIGHT)
        parts.setdefault(name.removeprefix(f"{names.layers}.0."), []).append(word)
    last_words = {path.rpartition(".")[2] for path in parts}
    is_short = len(last_words) == len(parts)  # not in GPT-2, which has c_proj twice
    rows = {path: _rows(c, modules, names.fused_by_head) for path, modules in parts.items()}
    return {
        f"{names.layers}.{i}.{path}": AdaptableMatrix(
            path.rpartition(".")[2] if is_short else path,
            tuple(f"blocks.{i}.{module}" for module in modules),
            rows[path],
        )
        for i in range(c.n_layers)
        for path, modules in parts.items()
    }


def _rows(c: ModelConfig, modules: list[str], by_head: bool) -> tuple[NDArray[np.int64], ...]:
    """The rows of each of the modules in one matrix."""
    heights = [module_height(c, module) for module in modules]
    rows = np.arange(sum(heights), dtype=np.int64)
    if by_head and len(modules) > 1:  # q, k and v of the first head first
        heads = rows.reshape(-1, len(modules), c.head_size)
        return tuple(heads[:, part].ravel() for part in range(len(modules)))
    return tuple(np.split(rows, np.cumsum(heights)[:-1]))
