"""Arrays that are read one at a time, so that no second copy of a model is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


class LazyArrays(Mapping[str, Array]):
    """Arrays by name, each computed or read from a file whenever it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Array]) -> None:
        """`read(name)` returns the array of that name, of its shape."""
        self.shapes, self._read = dict(shapes), read

    def __getitem__(self, name: str) -> Array:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # that of Mapping would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays together."""
        return sum(4 * math.prod(shape) for shape in self.shapes.values())
