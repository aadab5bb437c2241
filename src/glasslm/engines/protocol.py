"""The seam: what an engine can do. Nothing above this line of the project asks which engine runs.

An engine holds weights, gradients and moments and knows eight verbs; loop, evaluation, generation and checkpoints are
written once, in terms of them. Arrays cross the seam as NumPy arrays. B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import DeviceName, EngineName, Precision

Array = NDArray[Any]
State = Iterable[tuple[str, Array]]


class Batch(NamedTuple):
    """The rows of one step that this process computes."""

    tokens: NDArray[np.int64]  # (B, T)
    targets: NDArray[np.int64]  # (B, T), the token after each position; -1 is not predicted
    step: int  # with `rows`, the key of the dropout masks
    rows: NDArray[np.int64]  # (B,), each row's index in the step's global batch

    def parts(self, rows: int) -> Iterator[Batch]:
        """The same in portions of so many rows, the last one perhaps of fewer."""
        for start in range(0, len(self.tokens), rows):
            part = slice(start, start + rows)
            yield Batch(self.tokens[part], self.targets[part], self.step, self.rows[part])


class Losses(NamedTuple):
    """What a forward pass over training rows came to: their parts of the means over the whole step."""

    cross_entropy: float  # nats
    auxiliary: dict[
        str, float
    ]  # further terms that are minimised, by name, without their coefficients
    experts: Array | None = (
        None  # (layers, E) how many choices each expert got, in a mixture of experts
    )

    def __add__(self, other: Losses) -> Losses:  # type: ignore[override]
        """Of these rows and of further ones."""
        auxiliary = {name: value + other.auxiliary[name] for name, value in self.auxiliary.items()}
        experts = None if self.experts is None else self.experts + other.experts
        return Losses(self.cross_entropy + other.cross_entropy, auxiliary, experts)


class Update(NamedTuple):
    """What became of a step's gradients."""

    norm: float  # global L2 norm before clipping
    finite: bool  # also where float16 overflowed and the loss scale went down: that is no fault
    applied: bool


class Cache(Protocol):
    """Keys and values of what was read so far; opaque but for its lengths."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) the number of tokens held for each row."""
        ...

    def clear(self, row: int) -> None:
        """Forget one row, to use it for another text."""
        ...


class Engine(Protocol):
    """Forward, backward, update, and nothing about files, text or time."""

    name: EngineName
    device: DeviceName
    precision: Precision
    compiled: bool
    micro_batch_size: int  # rows whose activations are in memory together
    rows_at_once: int  # rows computed side by side: those of all threads or ranks

    @property
    def updates(self) -> int:
        """Updates applied so far: the t of Adam's bias correction."""
        ...

    @property
    def loss_scale(self) -> float:
        """What keeps float16's gradients in range; 1 in every other precision."""
        ...

    def accumulate(self, batch: Batch, weight: float) -> Losses:
        """Forward and backward over `batch`; adds weight x the gradient of the summed nats of its targets.

        `weight` is 1 / (valid targets of the whole step), so that what is returned is this part of the step's means.
        Terms that belong to a sequence, such as the balance of experts, count weight x T each.
        """
        ...

    def update(self, lr: float, skip_above: float = float("inf")) -> Update:
        """Clip the gradients, step the optimizer, forget the gradients.

        A norm that is not finite, or is above `skip_above`, leaves weights and moments as they were.
        """
        ...

    def losses(self, tokens: Array, targets: Array) -> Array:
        """(B, T) nats of each target given the tokens up to its position; 0 where the target is -1."""
        ...

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Room for `rows` texts of up to `capacity` tokens."""
        ...

    def logits(self, tokens: Array, cache: Any, counts: Array, every: bool = False) -> Array:
        """Read `counts[b]` further tokens of each row b of `tokens` (B, T), right-padded, into `cache`.

        Returns the logits after each row's last new token, (B, V); with `every`, after each position, (B, T, V).
        A row with count 0 is left alone and its logits mean nothing.
        """
        ...

    def inspect(self, batch: Batch, names: Iterable[str]) -> dict[str, Array]:
        """Copies of what inspection.py has names for, of the weights in training: looking never changes a run.

        There is no dropout, and attention is written out, however it is trained. Gradients are of the mean over the
        batch. In the compute precision, float32 at least. Raises InputError for a name that the model has not.
        """
        ...

    def state(self) -> Iterator[tuple[str, Array]]:
        """Trained weights by name, moments as `adamw.m/NAME`, averages as `ema/NAME`, in the compute precision."""
        ...

    def load(self, state: State, updates: int = 0, loss_scale: float = 1.0) -> None:
        """Take weights, or weights and moments, by name. Every weight must be there in its shape, and nothing else.

        Moments that are not there become zero.
        """
        ...
