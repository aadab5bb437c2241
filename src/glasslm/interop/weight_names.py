"""Where each weight of glasslm is in the files of a model family, and the way back.

Each weight has one place: a tensor of the file, or a part of one that transformers keeps fused.

Letters: H query heads, K key-value heads, Q head size, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig

Array = NDArray[Any]

QKV = ("attention.q", "attention.k", "attention.v")
GATE_UP = ("feedforward.gate", "feedforward.up")


class Place(NamedTuple):
    """A tensor of the file, and the function that takes a weight out of it."""

    hf_name: str
    take: Callable[[Array], Array]


@dataclass(frozen=True)
class WeightNames:
    """The names of a family's modules, by glasslm's names of the same modules."""

    top: Mapping[str, str]  # outside the blocks: embedding, norm, head, position
    layers: str  # what stands before the number of a block
    modules: Mapping[str, str]  # inside a block
    # Modules that transformers keeps in one tensor, one above the other.
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_by_head: bool = False  # q, k and v of the first head first, as in GPT-NeoX
    transposed: frozenset[str] = frozenset()  # modules of a block stored as (in, out), as in GPT-2
    skipped_positions: int = 0  # rows before that of position 0
    # Modules of a block with a bias in transformers that a model of glasslm may lack: it is 0.
    bias_slots: frozenset[str] = frozenset()

    def hf_name(self, name: str) -> str:
        """transformers' name of the tensor that holds a weight.

        blocks.0.attention.q.weight -> model.layers.0.self_attn.q_proj.weight
        """
        module, _, kind = name.rpartition(".")
        if module in self.top:
            return f"{self.top[module]}.{kind}"
        _, i, inner = module.split(".", 2)
        return f"{self.layers}.{i}.{self._block_module(inner)}.{kind}"

    def _block_module(self, module: str) -> str:
        for hf_module, parts in self.fused.items():
            if module in parts:
                return hf_module
        words = module.split(".")
        if len(words) == 4:  # feedforward.experts.3.up
            experts = self.modules["feedforward.experts"]
            return f"{experts}.{words[2]}.{self.modules[f'experts.{words[3]}']}"
        return self.modules[module]

    def place(self, c: ModelConfig, name: str) -> Place:
        """Where the weight `name` of a model is."""
        hf_name = self.hf_name(name)
        if name == "position.weight" and self.skipped_positions:
            return Place(hf_name, lambda array: array[self.skipped_positions :])
        if not name.startswith("blocks."):
            return Place(hf_name, _as_it_is)
        _, _, inner = name.rpartition(".")[0].split(".", 2)
        hf_module = self._block_module(inner)
        turn = _transpose if hf_module in self.transposed else _as_it_is
        parts = self.fused.get(hf_module)
        if parts is None:
            return Place(hf_name, turn)
        heights = [module_height(c, part) for part in parts]
        if self.fused_by_head:
            index = parts.index(inner)
            return Place(
                hf_name, lambda array: _take_of_each_head(array, index, len(parts), c.head_size)
            )
        start = sum(heights[: parts.index(inner)])
        rows = slice(start, start + module_height(c, inner))
        return Place(hf_name, lambda array: _take_rows(turn(array), rows, sum(heights)))

    def to_hf_weights(self, c: ModelConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
        """All weights by transformers' names, from all weights by glasslm's names."""
        hf_weights: dict[str, Array] = {}
        for name in _with_bias_slots(c, weights, self.bias_slots):
            hf_name = self.hf_name(name)
            if hf_name in hf_weights:  # fused, and put together before
                continue
            array = self._tensor(c, weights, name)
            if name == "position.weight" and self.skipped_positions:
                skipped = np.zeros((self.skipped_positions, array.shape[1]), array.dtype)
                array = np.concatenate([skipped, array])
            hf_weights[hf_name] = array
        return hf_weights

    def _tensor(self, c: ModelConfig, weights: Mapping[str, Array], name: str) -> Array:
        """transformers' tensor that holds the weight `name`."""
        if not name.startswith("blocks."):
            return _or_zeros(c, weights, name)
        module, _, kind = name.rpartition(".")
        _, i, inner = module.split(".", 2)
        hf_module = self._block_module(inner)
        parts = self.fused.get(hf_module, (inner,))
        arrays = [_or_zeros(c, weights, f"blocks.{i}.{part}.{kind}") for part in parts]
        if self.fused_by_head and len(parts) > 1:
            heads = [array.reshape(-1, c.head_size, *array.shape[1:]) for array in arrays]
            joined = np.concatenate(heads, 1)
            return joined.reshape(-1, *arrays[0].shape[1:])
        array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        return _transpose(array) if hf_module in self.transposed else array


def module_height(c: ModelConfig, module: str) -> int:
    """The number of rows of a module of a block: the length of its bias."""
    heights = {
        "attention.q": c.n_heads * c.head_size,
        "attention.k": c.n_kv_heads * c.head_size,
        "attention.v": c.n_kv_heads * c.head_size,
        "feedforward.gate": c.d_ff,
        "feedforward.up": c.d_ff,
    }
    return heights.get(module, c.d_model)


def _with_bias_slots(c: ModelConfig, names: Iterable[str], slots: frozenset[str]) -> Iterable[str]:
    """`names`, and the biases that transformers has besides them."""
    known = set(names)
    yield from names
    for i in range(c.n_layers):
        for module in sorted(slots - {"norm", "head"}):
            if (name := f"blocks.{i}.{module}.bias") not in known:
                yield name
    for module in ("norm", "head"):
        if module in slots and f"{module}.bias" not in known:
            yield f"{module}.bias"


def _or_zeros(c: ModelConfig, weights: Mapping[str, Array], name: str) -> Array:
    """A weight, or the zeros of a bias that glasslm's model does not have."""
    if name in weights:
        return weights[name]
    module, _, kind = name.rpartition(".")
    assert kind == "bias", name
    if module == "head":
        return np.zeros(len(weights["head.weight"]), np.float32)
    inner = module.split(".", 2)[2] if module.startswith("blocks.") else module
    return np.zeros(module_height(c, inner), np.float32)


def _as_it_is(array: Array) -> Array:
    return array


def _transpose(array: Array) -> Array:
    return np.ascontiguousarray(array.T)


def _take_rows(array: Array, rows: slice, height: int) -> Array:
    """Some rows of a fused tensor; no rows where it does not have the expected height."""
    return array[rows] if len(array) == height else array[:0]


def _take_of_each_head(array: Array, index: int, parts: int, Q: int) -> Array:
    """(H parts Q, ...) -> the rows of one part of all heads, (H Q, ...)."""
    if len(array) % (parts * Q):
        return array[:0]
    heads = array.reshape(-1, parts, Q, *array.shape[1:])
    return heads[:, index].reshape(-1, *array.shape[1:])
