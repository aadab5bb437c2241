"""One forward pass over one text, whose activations are recorded when they are first asked for.

Letters: T positions, L layers, H heads, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.inspection import Edit, forward_names
from glasslm.engines.protocol import NO_TARGET, Batch
from glasslm.inference.sampling import log_probabilities
from glasslm.inference.trained_model import Model

Array = NDArray[Any]

# Attention weights of a text that are kept; those of longer texts are computed again, in portions.
MAX_KEPT_WEIGHTS_BYTES, MAX_PORTION_BYTES = 64 << 20, 256 << 20
BIG_NAMES = (".scores", ".weights", ".preactivation", ".activation", ".experts")


class RecordedPass:
    """What `model` computes while it reads the tokens `ids` (T,): activations by name.

    The names are those of engines/inspection.py; the arrays have no axis B.
    """

    def __init__(self, model: Model, ids: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        self.model = model
        self.ids = np.asarray(ids, np.int64)
        self.config = model.config.model
        self._arrays: dict[str, Array] = {}

    @property
    def length(self) -> int:
        """The number of tokens, T."""
        return len(self.ids)

    @property
    def targets(self) -> NDArray[np.int64]:
        """(T,): the token after each position; NO_TARGET after the last."""
        return np.append(self.ids[1:], NO_TARGET)

    @property
    def bytes(self) -> int:
        """The memory of the activations."""
        return sum(array.nbytes for array in self._arrays.values())

    def __getitem__(self, name: str) -> Array:
        """An activation, without the axis B. Raises InputError where the model does not have it."""
        if name not in self._arrays:
            self._record([name])
        return self._arrays[name]

    def weights(self, layer: int) -> Array:
        """The attention weights (H, T, T) of a layer."""
        name = _weights_name(layer)
        return self[name] if self._keeps_weights else self.inspect([name])[name][0]

    def all_weights(self) -> Iterator[Array]:
        """The attention weights (H, T, T) of every layer in turn, in as few passes as fit."""
        layers = range(self.config.n_layers)
        if self._keeps_weights:
            yield from (self.weights(layer) for layer in layers)
            return
        count = max(1, MAX_PORTION_BYTES // self._weights_bytes)
        for first in layers[::count]:
            names = [_weights_name(layer) for layer in layers[first : first + count]]
            arrays = self.inspect(names)
            yield from (arrays.pop(name)[0] for name in names)

    @property
    def log_probabilities(self) -> NDArray[np.float64]:
        """(T, V): of the token after each position, by the model alone."""
        return log_probabilities(self["logits"])

    def log_probabilities_at(self, t: int) -> NDArray[np.float64]:
        """(V,): of the token after position t."""
        return log_probabilities(self["logits"][t])

    def inspect(
        self, names: Iterable[str], edits: Sequence[Edit] = (), rows: int = 1
    ) -> dict[str, Array]:
        """Activations of `rows` equal rows of this text, each with its own `edits`: (rows, ...)."""
        return self.model.engine.inspect(make_batch(self.ids, self.targets, rows), names, edits)

    @property
    def _keeps_weights(self) -> bool:
        """Whether the attention weights of all layers are recorded together, and kept."""
        size = self.config.n_layers * self._weights_bytes
        return size <= MAX_KEPT_WEIGHTS_BYTES and not self.model.config.operations.ops

    @property
    def _weights_bytes(self) -> int:
        """The attention weights of a layer, in float32."""
        return 4 * self.config.n_heads * self.length**2

    def _record(self, names: list[str]) -> None:
        """Record `names`, and, because a pass costs more than memory, what else is small."""
        small = [name for name in forward_names(self.config) if not _is_big(name)]
        if self._keeps_weights:
            small += [_weights_name(layer) for layer in range(self.config.n_layers)]
        missing = [name for name in {*names, *small} if name not in self._arrays]
        for name, array in self.inspect(missing).items():
            self._arrays[name] = array if ".experts." in name else array[0]


def _weights_name(layer: int) -> str:
    return f"blocks.{layer}.attention.weights"


def _is_big(name: str) -> bool:
    return any(part in name for part in BIG_NAMES)


def make_batch(ids: NDArray[np.int64], targets: NDArray[np.int64], rows: int = 1) -> Batch:
    """A batch of `rows` equal rows with the tokens `ids` (T,) and `targets` (T,)."""
    return Batch(np.tile(ids, (rows, 1)), np.tile(targets, (rows, 1)), 0, np.zeros(rows, np.int64))


def top_tokens(logprobs: Array, count: int) -> NDArray[np.int64]:
    """The likeliest tokens of log-probabilities (..., V), likeliest first: (..., count or V)."""
    count = min(count, logprobs.shape[-1])
    top = np.sort(np.argpartition(-logprobs, count - 1, axis=-1)[..., :count], axis=-1)
    order = np.argsort(-np.take_along_axis(logprobs, top, -1), axis=-1, kind="stable")
    return np.take_along_axis(top, order, -1)


def choose_candidates(logprobs: Array, count: int, target: int) -> NDArray[np.int64]:
    """(count,) or (count + 1,): the likeliest tokens of logprobs (V,), and `target` if it is none.

    `target` NO_TARGET adds nothing.
    """
    candidates = top_tokens(logprobs, count)
    if target == NO_TARGET or target in candidates:
        return candidates
    return np.append(candidates, target)
