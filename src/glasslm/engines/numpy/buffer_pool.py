"""A buffer pool: memory is reused when the last view of it is freed.

Large arrays from np.empty are fresh pages that the operating system must clear, which costs as much
as computing with them. The pool keeps the memory, so that from the second step on nothing is
allocated, and no op has to say when a buffer is free.
"""

from __future__ import annotations

import weakref
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 64  # bytes: a cache line and an AVX-512 register


class BufferPool:
    """`pool(shape)` is np.empty(shape) on memory that returns to the pool with its last view.

    Threads share a pool: each change of its books is a single operation of a list or a dictionary,
    which the interpreter does not interrupt.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.allocated_bytes = 0  # taken from the system so far
        self._free: dict[int, list[memoryview]] = {}  # by the number of elements
        self._loans: dict[int, _Loan] = {}

    def __call__(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array of this shape, whose contents are undefined."""
        size = prod(shape)
        try:
            memory = self._free.setdefault(size, []).pop()
        except IndexError:
            memory = self._allocate(size)
        # An array made from a memoryview is the base of all its views, so it is freed last.
        array = np.frombuffer(memory, self.dtype)
        loan = _Loan(array, self._return)
        loan.memory = memory
        self._loans[id(loan)] = loan
        return array.reshape(shape)

    def _allocate(self, size: int) -> memoryview:
        padding = ALIGNMENT // self.dtype.itemsize
        raw = np.empty(size + padding, self.dtype)
        self.allocated_bytes += raw.nbytes
        start = (-raw.ctypes.data % ALIGNMENT) // self.dtype.itemsize
        return raw[start : start + size].data.cast("B")

    def _return(self, reference: weakref.ref[NDArray[Any]]) -> None:
        loan = self._loans.pop(id(reference))
        self._free[len(loan.memory) // self.dtype.itemsize].append(loan.memory)


class _Loan(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to an array that was handed out, with the memory behind it."""

    __slots__ = ("memory",)
    memory: memoryview
