"""The inputs of a forward pass besides weights and tokens, and the recorder of its activations.

Letters: B rows, T positions, N = B T, H query heads, K key-value heads, Q head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.numpy.moe import Routing
from glasslm.engines.numpy.ops import Array, New


class ActivationRecorder:
    """Copies of the activations and gradients with the given names, those of inspection.py."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.arrays: dict[str, Array] = {}

    def record(self, name: str, array: Array, shape: tuple[int, ...] | None = None) -> None:
        """Copy an array (any shape) if its name is asked for, reshaped to `shape`."""
        if name in self.names:
            self.arrays[name] = array.reshape(shape or array.shape).copy()


@dataclass(frozen=True)
class ForwardContext:
    """The inputs of one forward pass besides the weights and the tokens, and its recordings."""

    B: int
    T: int
    new: New
    dropout_keys: Callable[[int], NDArray[np.uint32]] | None  # site -> (B,); None: no dropout
    # Coefficients, in the gradient, of the balance and the router z-loss of a sequence and layer.
    penalties: tuple[float, float]
    routings: list[Routing]  # the statistics of the routers so far, layer by layer
    bias: Array | None  # (H, T, T) of the scores
    rotation: tuple[Array, Array] | None  # cos and sin (T, H + K, Q)
    recorder: ActivationRecorder | None
    starts: NDArray[np.int64] | None = None  # (B, T) positions where documents start

    def record(self, name: str, x: Array) -> None:
        """Record x (N, any) as (B, T, any); that of an expert, over its tokens, as it is."""
        if self.recorder is not None:
            shape = x.shape if ".experts." in name else (self.B, self.T, -1)
            self.recorder.record(name, x, shape)
