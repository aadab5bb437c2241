"""The arrays of the parameter table as views of one flat array, and stacks of them as matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.model.parameters import ParameterSpec

# q, k and v (gate and up) multiply the same input: stacked, they are one product instead of three.
STACKED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


class Weights:
    """The arrays of the parameter table: one array for all, `flat`, and its views by name.

    A name is one of the table, whose array has the shape of the table, or that of a stack
    (blocks.0.attention.qkv.weight), whose height is the sum of those of its arrays. The same class
    holds weights, gradients and moments. In `flat`, arrays with the same group and decay are
    neighbours, so that an optimizer updates them in a few long runs.
    """

    def __init__(self, table: Mapping[str, ParameterSpec], dtype: DTypeLike) -> None:
        self.flat: NDArray[Any] = np.zeros(sum(spec.size for spec in table.values()), dtype)
        self.arrays: dict[str, NDArray[Any]] = {}
        self.trained_names = frozenset(name for name, spec in table.items() if spec.trained)
        self._starts: dict[str, int] = {}
        position = 0
        for name, spec in sorted(
            table.items(), key=lambda item: (item[1].trained, item[1].group, item[1].decay)
        ):
            self._starts[name] = position
            position += spec.size
            self.arrays[name] = self.flat[self._starts[name] : position].reshape(spec.shape)
        self._stacks = _stacks(table)
        self._views = self.arrays | {
            stack: self._stack_view(parts) for stack, parts in self._stacks.items()
        }

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._views[name]

    def parts(self, name: str) -> Iterator[tuple[str, slice]]:
        """The modules of a stack or a single matrix, each with the columns of its product."""
        start = 0
        for part in self._stacks.get(name, [name]):
            end = start + len(self.arrays[part])
            yield part.rpartition(".")[0], slice(start, end)
            start = end

    def select(self, prefix: str) -> dict[str, NDArray[Any]]:
        """The arrays and stacks whose names begin with `prefix`, by the rest of the name."""
        return {
            name.removeprefix(prefix): view
            for name, view in self._views.items()
            if name.startswith(prefix)
        }

    def contiguous(self, names: list[str]) -> NDArray[Any]:
        """(numbers,): the arrays `names` as one view. They must be neighbours in `flat`."""
        start = min(self._starts[name] for name in names)
        end = max(self._starts[name] + self.arrays[name].size for name in names)
        size = sum(self.arrays[name].size for name in names)
        assert end - start == size, "the arrays are not neighbours"
        return self.flat[start:end]

    def _stack_view(self, names: list[str]) -> NDArray[Any]:
        height = sum(len(self.arrays[name]) for name in names)
        return self.contiguous(names).reshape(height, *self.arrays[names[0]].shape[1:])


def _stacks(table: Mapping[str, ParameterSpec]) -> dict[str, list[str]]:
    """The names of the arrays of each stack, by its name."""
    stacks = {}
    for name in table:
        prefix, _, suffix = name.rpartition(".")
        module, _, part = prefix.rpartition(".")
        if suffix not in ("weight", "bias"):
            continue
        for stack, parts in STACKED.items():
            names = [f"{module}.{other}.{suffix}" for other in parts]
            if part == parts[0] and all(other in table for other in names):
                stacks[f"{module}.{stack}.{suffix}"] = names
    return stacks
