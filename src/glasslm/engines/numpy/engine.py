"""The NumPy engine: the verbs of engines/__init__.py over the hand-written model.

A batch is cut into micro-batches of a fixed size, which threads compute side by side while BLAS is held to one thread
each; their gradients are added in ascending order. So the bits of a result do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import ThreadpoolController

from glasslm.config import RunConfig
from glasslm.engines import Batch, State, Update
from glasslm.engines.dropout import row_keys
from glasslm.engines.numpy import optimizer
from glasslm.engines.numpy.arena import Arena
from glasslm.engines.numpy.inference import KeyValueCache, read
from glasslm.engines.numpy.model import Model
from glasslm.engines.numpy.ops import Array, cross_entropy
from glasslm.engines.numpy.weights import Weights
from glasslm.errors import DamagedError
from glasslm.parameters import Row, table

Item = TypeVar("Item")
Result = TypeVar("Result")


class NumpyEngine:
    """`config` must be resolved. Weights are zero until `load`."""

    name = "numpy"

    def __init__(self, config: RunConfig, vocab_size: int, threads: int, dtype: DTypeLike = np.float32) -> None:
        self.config = config
        self.updates = 0
        self.rows = table(config.model, vocab_size)
        self.dtype = np.dtype(dtype)
        self.weights = Weights(self.rows, dtype)
        self.model = Model(config.model, self.weights)
        self.threads = threads
        self._gradients: Weights | None = None  # made when training starts; inference needs none
        self._fresh = True  # the next gradient replaces what is there
        self._moments: dict[str, Array] = {}
        # Muon's products first and then by size, so that the threads end their part of an update together.
        self._costly_first = sorted(
            self.rows,
            key=lambda name: (
                moment_kind(self.rows[name], config.optimizer.optimizer) != "muon",
                -self.rows[name].size,
            ),
        )
        self._memory = Arena(dtype)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._blas = ThreadpoolController()

    def accumulate(self, batch: Batch, weight: float) -> float:
        if self._gradients is None:
            self._gradients = Weights(self.rows, self.dtype)
        micro = self.config.train.micro_batch_size
        parts = [slice(start, start + micro) for start in range(0, len(batch.tokens), micro)]
        loss = 0.0
        for nats, of_weights in self._spread(lambda part: self._differentiate(batch, part, weight), parts):
            loss += weight * nats
            for name, gradient in of_weights.items():
                if self._fresh:
                    self._gradients[name][...] = gradient
                else:
                    self._gradients[name][...] += gradient
            self._fresh = False
        return loss

    def _differentiate(self, batch: Batch, part: slice, weight: float) -> tuple[float, dict[str, Array]]:
        """The summed nats of some rows of the batch, and weight x their gradient by name of the weight."""
        nats, backward = self.forward(batch, part)
        return math.fsum(nats), backward(weight)

    def forward(self, batch: Batch, part: slice = slice(None)) -> tuple[Array, Callable[[float], dict[str, Array]]]:
        """The nats (N,) of some rows of a training batch, dropout included; backward(weight) as in `accumulate`."""
        c, rows, new = self.config, batch.rows[part], self._memory

        def keys(site: int) -> NDArray[np.uint32]:
            return row_keys(c.train.seed, batch.step, rows, site)

        dropping = c.model.dropout or c.model.attention_dropout
        logits, model_back = self.model.forward(batch.tokens[part], new, keys if dropping else None)
        nats, loss_back = cross_entropy(logits, batch.targets[part].reshape(-1), new)
        return nats, lambda weight: model_back(loss_back(weight))

    def gradients(self, batch: Batch, weight: float) -> dict[str, Array]:
        """The gradient that `accumulate` makes of a batch, by name; it is forgotten again."""
        self._fresh = True
        self.accumulate(batch, weight)
        self._fresh = True
        assert self._gradients is not None
        return self._gradients.rows

    def update(self, lr: float, skip_above: float = math.inf) -> Update:
        assert self._gradients is not None, "update before accumulate"
        assert not self._fresh, "update before accumulate"
        gradients = self._gradients.rows
        self._fresh = True
        squares = self._spread(lambda name: float(np.vdot(gradients[name], gradients[name])), self.rows)
        norm = math.sqrt(sum(squares))
        finite = math.isfinite(norm)
        if not finite or norm > skip_above:
            return Update(norm, finite, applied=False)
        clip = self.config.optimizer.grad_clip
        scale = min(1.0, clip / norm) if clip and norm else 1.0
        self.updates += 1
        for _ in self._spread(lambda name: self._step(name, gradients[name], lr, scale), self._costly_first):
            pass
        return Update(norm, finite, applied=True)

    def _step(self, name: str, gradient: Array, lr: float, scale: float) -> None:
        c, p = self.config.optimizer, self.weights[name]
        decay = c.weight_decay if self.rows[name].decay else 0.0
        kind = moment_kind(self.rows[name], c.optimizer)
        moments = [self._moment(f"{kind}.{which}/{name}", p) for which in MOMENTS[kind]]
        if kind == "adamw":
            m, v = moments
            optimizer.adamw(p, gradient, m, v, t=self.updates, lr=lr, decay=decay, betas=c.betas, scale=scale)
        elif kind == "muon":
            optimizer.muon(p, gradient, *moments, lr=lr, decay=decay, momentum=c.momentum, scale=scale)
        else:
            optimizer.sgd(p, gradient, *moments, lr=lr, decay=decay, momentum=c.momentum, scale=scale)

    def _moment(self, key: str, like: Array) -> Array:
        if key not in self._moments:
            self._moments[key] = np.zeros_like(like)
        return self._moments[key]

    def losses(self, tokens: Array, targets: Array) -> Array:
        micro = max(1, self.config.train.micro_batch_size)
        parts = [slice(start, start + micro) for start in range(0, len(tokens), micro)]

        def one(part: slice) -> Array:
            logits, _ = self.model.forward(tokens[part], self._memory)
            nats, _ = cross_entropy(logits, targets[part].reshape(-1), self._memory)
            return nats.reshape(targets[part].shape)

        return np.concatenate(list(self._spread(one, parts)))

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        c = self.config.model
        return KeyValueCache(c.n_layers, rows, c.n_kv_heads, capacity, c.head_size, self.dtype)

    def logits(self, tokens: Array, cache: KeyValueCache, counts: Array, every: bool = False) -> Array:
        with self._blas.limit(limits=1, user_api="blas"):
            return read(self.model, tokens, cache, np.asarray(counts, np.int64), every)

    def state(self) -> Iterator[tuple[str, Array]]:
        for name in self.rows:
            yield name, self.weights[name]
        for name, row in self.rows.items():
            kind = moment_kind(row, self.config.optimizer.optimizer)
            for which in MOMENTS[kind]:
                yield f"{kind}.{which}/{name}", self._moment(f"{kind}.{which}/{name}", self.weights[name])

    def load(self, state: State, updates: int = 0) -> None:
        wanted = {name: row.shape for name, row in self.rows.items()}
        missing, loaded = set(wanted), {}
        for key, array in state:
            name = key.rpartition("/")[2]
            if name not in wanted:
                raise DamagedError(
                    f"the entry '{key}' belongs to no weight of this model: is it another architecture's?"
                )
            if array.shape != wanted[name]:
                raise DamagedError(f"the entry '{key}' has shape {array.shape}, but this model's is {wanted[name]}")
            loaded[key] = array
            missing.discard(key)
        if missing:
            raise DamagedError(f"the entry '{min(missing)}' is missing ({len(missing)} of {len(wanted)} weights are)")
        self._moments = {key: array.astype(self.dtype) for key, array in loaded.items() if "/" in key}
        for name in wanted:
            self.weights[name][...] = loaded[name]
        self.updates = updates

    def _spread(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """function(item) for each item, computed on all threads, given out in the order of the items."""
        with self._blas.limit(limits=1, user_api="blas"):
            yield from self._pool.map(function, items) if self._pool else map(function, items)


MOMENTS = {"adamw": ("m", "v"), "muon": ("m",), "sgd": ("m",)}


def moment_kind(row: Row, chosen: str) -> str:
    """The optimizer that moves a row: muon leaves all but the hidden matrices to adamw."""
    return row.group if chosen == "muon" else chosen
