"""The seam: what an engine can do.

An engine holds weights, gradients and moments. The training loop, evaluation, generation and
checkpoints do not ask which engine runs; estimates and checks do. Arrays cross the seam as NumPy
arrays.
Letters: B rows, T positions, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import DeviceName, EngineName, Precision
from glasslm.data.token_file import NO_TARGET as NO_TARGET
from glasslm.engines.inspection import Edit
from glasslm.engines.lazy_arrays import LazyArrays

Array = NDArray[Any]
State = Iterable[tuple[str, Array]]


class Batch(NamedTuple):
    """The rows of one step that this process computes."""

    tokens: NDArray[np.int64]  # (B, T)
    targets: NDArray[np.int64]  # (B, T), the token after each position; or NO_TARGET
    step: int  # with `rows`, the key of the dropout masks
    rows: NDArray[np.int64]  # (B,), each row's index in the step's global batch
    # (B, T): factors of the gradient of each target's nats, of any sign; None: all are 1.
    weights: NDArray[np.floating[Any]] | None = None

    def split(self, rows: int) -> Iterator[Batch]:
        """The batch in portions of `rows` rows; the last one may have fewer."""
        for start in range(0, len(self.tokens), rows):
            part = slice(start, start + rows)
            weights = None if self.weights is None else self.weights[part]
            yield Batch(self.tokens[part], self.targets[part], self.step, self.rows[part], weights)


class Losses(NamedTuple):
    """The losses of some rows: their parts of the means over the whole step."""

    cross_entropy: float  # nats
    auxiliary: dict[str, float]  # auxiliary terms by name, without their coefficients
    experts: Array | None = None  # (layers, E) how many choices each expert got

    def __add__(self, other: Losses) -> Losses:  # type: ignore[override]
        """The losses of both sets of rows together."""
        auxiliary = {name: value + other.auxiliary[name] for name, value in self.auxiliary.items()}
        experts = None if self.experts is None else self.experts + other.experts
        return Losses(self.cross_entropy + other.cross_entropy, auxiliary, experts)


class Update(NamedTuple):
    """Result of one optimizer update."""

    norm: float  # global L2 norm of the gradients before clipping
    finite: bool  # also True after a float16 overflow, which lowers the loss scale and is no fault
    applied: bool


class Cache(Protocol):
    """The KV cache of an engine: keys and values of the tokens read so far."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) the number of tokens in each row."""
        ...

    def clear(self, row: int) -> None:
        """Empty one row, to use it for another text."""
        ...

    def erase(self, row: int) -> None:
        """Empty one row and overwrite its keys and values, which may be nan or infinite.

        The weight of a hidden key is 0, and 0 times nan is nan.
        """
        ...

    def part(self, rows: slice) -> Cache:
        """Some of the rows, in the same memory."""
        ...

    def copy_prefix(self, source: int, row: int, tokens: NDArray[np.int64]) -> None:
        """Let `row` hold tokens (T,), the first that row `source` has read; source may be `row`.

        The slots of these tokens must not have been overwritten, as a rolling cache does.
        """
        ...


class Engine(Protocol):
    """Forward, backward and update. An engine knows nothing of files, text or time."""

    name: EngineName
    device: DeviceName
    precision: Precision
    compiled: bool
    micro_batch_size: int  # rows whose activations are in memory together
    rows_at_once: int  # rows computed side by side: those of all threads or ranks
    # Rows of a cache computed as one matrix. In a cache of a multiple of so many rows, the logits
    # after single tokens do not depend on the other rows, bit for bit, on a CPU. (In PyTorch, if
    # all widths are multiples of 8: the rounding of shorter vectors depends on their place.)
    row_tile: int

    @property
    def updates(self) -> int:
        """Updates applied so far: the t of Adam's bias correction."""
        ...

    @property
    def loss_scale(self) -> float:
        """The factor that keeps float16's gradients in range; 1 in every other precision."""
        ...

    def accumulate(self, batch: Batch, weight: float) -> Losses:
        """Forward and backward: add weight x the gradient of the summed nats of the targets.

        `batch.weights` multiply the gradient of the nats, and neither the returned losses nor the
        auxiliary terms. `weight` is 1 / (valid targets of the whole step), so that the returned
        losses are the parts of this batch in the means of the step. Terms that belong to a
        sequence, such as the balance of experts, count weight x T each.
        """
        ...

    def update(self, lr: float, skip_above: float = float("inf")) -> Update:
        """Clip the gradients, step the optimizer and reset the gradients.

        A norm that is not finite or is above `skip_above` leaves weights and moments unchanged.
        """
        ...

    def losses(self, tokens: Array, targets: Array) -> Array:
        """(B, T): the nats of each target given the tokens up to its position; 0 for NO_TARGET.

        tokens and targets (B, T). Uses the average of the weights if there is one.
        """
        ...

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """A KV cache for `rows` texts of up to `capacity` tokens."""
        ...

    def logits(self, tokens: Array, cache: Any, counts: Array, every: bool = False) -> Array:
        """Read counts[b] further tokens of each row b into `cache` and return logits.

        tokens (B, T), right-padded; counts (B,). Returns the logits after each row's last new
        token, (B, V); with `every`, after each position, (B, T, V). A row with count 0 is left
        unchanged, and its logits are undefined.
        """
        ...

    def inspect(
        self, batch: Batch, names: Iterable[str], edits: Sequence[Edit] = ()
    ) -> dict[str, Array]:
        """Copies of activations and gradients by name; inspection.py lists names and shapes.

        Uses the weights in training, without dropout, and computes attention explicitly, whatever
        --attention says. Gradients are of the mean over the batch. The arrays have the compute
        precision, at least float32. The run does not change. `edits` overwrite activations in this
        pass, in their order. Raises InputError for a name that the model does not have, and for
        gradients beside edits.
        """
        ...

    def readout(self, stream: Array) -> Array:
        """Residual streams (N, D) -> logits (N, V): the last norm, if any, and the output matrix.

        Of the weights that `inspect` uses: the stream after the last block gives its logits.
        """
        ...

    def state(self) -> Iterator[tuple[str, Array]]:
        """Trained weights by name, moments as `adamw.m/NAME`, averages as `ema/NAME`.

        The arrays have the precision of the weights.
        """
        ...

    def load(self, state: State | LazyArrays, updates: int = 0, loss_scale: float = 1.0) -> None:
        """Load weights, or weights and moments, by name. Missing moments become zero.

        Raises DamagedError unless every weight is there in its shape, and nothing else.
        """
        ...
