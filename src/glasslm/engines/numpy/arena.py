"""Memory that is handed out again as soon as nobody looks at it.

Large arrays from np.empty are fresh pages that the operating system must clear, which costs as much as computing with
them. An arena keeps the memory: ops ask it for arrays, stay pure to the reader, and from the second step on nothing is
allocated.
"""

from __future__ import annotations

import weakref
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 64  # bytes: a cache line and an AVX-512 register


class Arena:
    """`arena(shape)` is np.empty(shape): an array whose memory returns to the arena when its last view is gone.

    Threads share one: every step on its books is a single operation of a list or a dictionary, which no other thread
    can split.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.bytes = 0  # ever taken from the system
        self._idle: dict[int, list[memoryview]] = {}
        self._lent: dict[int, _Loan] = {}

    def __call__(self, shape: tuple[int, ...]) -> NDArray[Any]:
        size = prod(shape)
        try:
            memory = self._idle.setdefault(size, []).pop()
        except IndexError:
            memory = self._take(size)
        # An array made from a memoryview is the base of all its views, so its own end is the end of the last of them.
        array = np.frombuffer(memory, self.dtype)
        loan = _Loan(array, self._return)
        loan.memory = memory
        self._lent[id(loan)] = loan
        return array.reshape(shape)

    def _take(self, size: int) -> memoryview:
        spare = ALIGNMENT // self.dtype.itemsize
        raw = np.empty(size + spare, self.dtype)
        self.bytes += raw.nbytes
        start = (-raw.ctypes.data % ALIGNMENT) // self.dtype.itemsize
        return raw[start : start + size].data.cast("B")

    def _return(self, loan: weakref.ref[NDArray[Any]]) -> None:
        returned = self._lent.pop(id(loan))
        self._idle[len(returned.memory) // self.dtype.itemsize].append(returned.memory)


class _Loan(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("memory",)
    memory: memoryview
