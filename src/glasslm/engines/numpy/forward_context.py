"""The inputs of a forward pass besides weights and tokens, and the recorder of its activations.

Letters: B rows, T positions, N = B T, H query heads, K key-value heads, Q head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import LayerKind
from glasslm.engines.inspection import REPLACED_ATTENTION, Edit
from glasslm.engines.numpy.attention import scores_and_weights
from glasslm.engines.numpy.moe import Routing
from glasslm.engines.numpy.operations import Operations
from glasslm.engines.numpy.ops import Array, New
from glasslm.engines.numpy.positions import ScoreBias, dense_bias
from glasslm.errors import InputError


class ActivationRecorder:
    """Copies of the activations and gradients with the given names, those of inspection.py.

    `edits` overwrite activations before they are copied and used.
    """

    def __init__(self, names: Iterable[str], edits: Sequence[Edit] = ()) -> None:
        self.names, self.edits = frozenset(names), edits
        self.arrays: dict[str, Array] = {}

    def record(self, name: str, array: Array) -> None:
        """Copy an array (any shape) if its name is asked for."""
        if name in self.names:
            self.arrays[name] = array.copy()

    def edit(self, name: str, array: Array) -> None:
        """Overwrite parts of an array (any shape), in place, where an edit says so."""
        for edit in self.edits:
            if edit.name == name:
                array[edit.index] = edit.value


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
    rotations: Mapping[LayerKind, tuple[Array, Array]]  # cos and sin (T, H + K, R) by kind of layer
    recorder: ActivationRecorder | None
    starts: NDArray[np.int64] | None = None  # (B, T) positions where documents start

    def record(self, name: str, x: Array) -> None:
        """Edit and record x (N, any) as (B, T, any); that of an expert, over its tokens, as it is.

        Edits change x itself, so nothing may be computed from it before.
        """
        if self.recorder is not None:
            shape = x.shape if ".experts." in name else (self.B, self.T, *x.shape[1:])
            view = x.reshape(shape)
            assert not x.size or np.may_share_memory(view, x), "an edit would change a copy"
            self.recorder.edit(name, view)
            self.recorder.record(name, view)

    def record_attention(
        self,
        prefix: str,
        qk: Array,
        K: int,
        bias: ScoreBias,
        window: int,
        operations: Operations,
        softcap: float = 0.0,
    ) -> None:
        """Record scores and weights (B, H, T, T), which are computed here for every kernel.

        qk (B, T, H + K, Q). Raises InputError where a file replaces attention.
        """
        names = f"{prefix}.scores", f"{prefix}.weights"
        if self.recorder is None or self.recorder.names.isdisjoint(names):
            return
        softmax = operations.softmax
        if operations.replaces_attention:
            raise InputError(REPLACED_ATTENTION)
        positions = np.arange(self.T)
        dense = dense_bias(bias, positions, positions)
        arrays = scores_and_weights(qk, K, dense, window, self.starts, softmax, softcap)
        for name, array in zip(names, arrays):
            self.recorder.record(name, array)
