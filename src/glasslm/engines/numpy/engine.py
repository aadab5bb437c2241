"""The NumPy engine: the verbs of engines/__init__.py over the hand-written model.

A batch is cut into micro-batches of a fixed size, which threads compute side by side while BLAS is held to one thread
each; their gradients are added in ascending order. So the bits of a result do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import ThreadpoolController

from glasslm.config.schema import DeviceName, EngineName, Precision, RunConfig
from glasslm.engines.choice import micro_batch_size
from glasslm.engines.dropout import row_keys
from glasslm.engines.inspection import GRADIENT, require_known
from glasslm.engines.numpy import ops, optimizer
from glasslm.engines.numpy.arena import Arena
from glasslm.engines.numpy.inference import KeyValueCache, read
from glasslm.engines.numpy.model import Look, Model
from glasslm.engines.numpy.ops import Array
from glasslm.engines.numpy.optimizer import CHUNK
from glasslm.engines.numpy.weights import Weights
from glasslm.engines.objective import coefficients
from glasslm.engines.protocol import Batch, Losses, State, Update
from glasslm.engines.state import AVERAGE, MOMENTS, decay_of_average, moment_kind, read_state
from glasslm.model.parameters import parameter_table

ROWS_READ = 16  # into a cache by one thread

Item = TypeVar("Item")
Result = TypeVar("Result")


class NumpyEngine:
    """`config` must be resolved. Weights are zero until `load`."""

    name: EngineName = "numpy"
    device: DeviceName = "cpu"
    compiled = False

    def __init__(
        self, config: RunConfig, vocab_size: int, threads: int, dtype: DTypeLike = np.float32
    ) -> None:
        self.config = config
        self.precision: Precision = "fp64" if np.dtype(dtype) == np.float64 else "fp32"
        self.updates, self.loss_scale = 0, 1.0
        self.rows = parameter_table(config.model, vocab_size)
        self.dtype = np.dtype(dtype)
        self.weights = Weights(self.rows, dtype)
        self.model = Model(config.model, self.weights)
        self.average = Weights(self.rows, dtype) if config.optimizer.ema else None
        self.used = (
            Model(config.model, self.average) if self.average else self.model
        )  # by all but training
        self.micro_batch_size = micro_batch_size(config, "numpy")
        self.rows_at_once = threads * self.micro_batch_size
        self._trained = {name: row for name, row in self.rows.items() if row.trained}
        self._coefficients = coefficients(config)
        self._gradients: Weights | None = None  # made when training starts; inference needs none
        self._fresh = True  # the next gradient replaces what is there
        self._kinds = {
            name: moment_kind(row, config.optimizer.optimizer)
            for name, row in self._trained.items()
        }
        self._moments: dict[
            str, Weights
        ] = {}  # "adamw.m": the first moments of the rows that AdamW moves, ...
        self._memory = Arena(dtype)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._blas = ThreadpoolController().select(user_api="blas").lib_controllers

    def accumulate(self, batch: Batch, weight: float) -> Losses:
        if self._gradients is None:
            self._gradients = Weights(self._trained, self.dtype)
        parts = chunks(len(batch.tokens), self.micro_batch_size)
        found = []
        for losses, of_weights in self._spread(
            lambda part: self._differentiate(batch, part, weight), parts
        ):
            found.append(losses)
            for name, gradient in of_weights.items():
                if self._fresh:
                    self._gradients[name][...] = gradient
                else:
                    self._gradients[name][...] += gradient
            self._fresh = False
        return functools.reduce(Losses.__add__, found)

    def _differentiate(
        self, batch: Batch, part: slice, weight: float
    ) -> tuple[Losses, dict[str, Array]]:
        """The losses of some rows of the batch, and their gradient by name of the weight."""
        losses, backward = self.forward(batch, weight, part)
        return losses, backward()

    def forward(
        self, batch: Batch, weight: float, part: slice = slice(None), look: Look | None = None
    ) -> tuple[Losses, Callable[[], dict[str, Array]]]:
        """The losses of some rows of a training batch, dropout included, and the way back, as in `accumulate`.

        Whoever looks sees the model without dropout, and in memory of its own.
        """
        c, rows, terms = self.config, batch.rows[part], self._coefficients
        new = self._memory if look is None else self.model.empty
        targets = batch.targets[part].reshape(-1)

        def keys(site: int) -> NDArray[np.uint32]:
            return row_keys(c.train.seed, batch.step, rows, site)

        dropping = (c.model.dropout or c.model.attention_dropout) and look is None
        each = (
            weight * batch.tokens.shape[1] / c.model.n_layers
        )  # a sequence's share of the mean over all, in a layer
        penalties = (each * terms.get("balance", 0.0), each * terms.get("router_z", 0.0))
        logits, routings, model_back = self.model.forward(
            batch.tokens[part], new, keys if dropping else None, penalties, look
        )
        nats, nats_back = ops.cross_entropy(logits, targets, new)
        further = {
            name: op(logits, targets, new)
            for name, op in ops.SOFTMAX_TERMS.items()
            if name in terms
        }
        auxiliary = {name: weight * math.fsum(values) for name, (values, _) in further.items()}
        experts = None
        if routings:
            auxiliary["balance"] = each * math.fsum(routing.balance for routing in routings)
            auxiliary["router_z"] = each * math.fsum(routing.z for routing in routings)
            experts = np.stack([routing.use for routing in routings])

        def backward() -> dict[str, Array]:
            dlogits = nats_back(weight)
            for name, (_, term_back) in further.items():
                dlogits += term_back(weight * terms[name])
            return model_back(dlogits)

        return Losses(weight * math.fsum(nats), auxiliary, experts), backward

    def inspect(self, batch: Batch, names: Iterable[str]) -> dict[str, Array]:
        names = list(names)
        require_known(names, self.config.model, self.rows)
        look = Look(names)
        with self._one_blas_thread():
            _, backward = self.forward(
                batch, 1 / max(1, int((batch.targets >= 0).sum())), look=look
            )
            if any(name.startswith(GRADIENT) for name in names):
                gradients = Weights(self._trained, self.dtype)
                for name, gradient in backward().items():
                    gradients[name][...] = gradient
                look.found |= {
                    GRADIENT + name: gradient for name, gradient in gradients.rows.items()
                }
        return {name: look.found[name] for name in names}

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
        self._fresh = True
        flat = self._gradients.flat
        squares = self._spread(
            lambda part: float(np.vdot(flat[part], flat[part])), chunks(flat.size, CHUNK)
        )
        norm = math.sqrt(sum(squares))
        finite = math.isfinite(norm)
        if not finite or norm > skip_above:
            return Update(norm, finite, applied=False)
        clip = self.config.optimizer.grad_clip
        scale = min(1.0, clip / norm) if clip and norm else 1.0
        self.updates += 1
        for _ in self._spread(lambda step: step(), self._steps(self._gradients, lr, scale)):
            pass
        if self.average:
            average, now = self.average.flat, self.weights.flat
            share = 1 - decay_of_average(self.config.optimizer.ema, self.updates)
            for part in chunks(now.size, CHUNK):
                optimizer.move_average(average[part], now[part], share)
        return Update(norm, finite, applied=True)

    def _steps(self, gradients: Weights, lr: float, scale: float) -> Iterator[Callable[[], None]]:
        """The pieces of an update, independent of each other: Muon's matrices first, which take longest."""
        c = self.config.optimizer
        for name in sorted(self._trained, key=lambda name: -self.rows[name].size):
            if self._kinds[name] == "muon":
                p, g, m = self.weights[name], gradients[name], self._moment("muon.m")[name]
                decay = c.weight_decay if self.rows[name].decay else 0.0
                yield partial(
                    optimizer.muon, p, g, m, lr=lr, decay=decay, momentum=c.momentum, scale=scale
                )
        for kind, decays in itertools.product(("adamw", "sgd"), (False, True)):
            names = [
                name
                for name, row in self._trained.items()
                if self._kinds[name] == kind and row.decay == decays
            ]
            if not names:
                continue
            decay = c.weight_decay if decays else 0.0
            run = [
                held.run(names)
                for held in (self.weights, gradients, *map(self._moment, MOMENTS[kind]))
            ]
            for part in chunks(run[0].size, CHUNK):
                arrays = [array[part] for array in run]
                if kind == "adamw":
                    step = partial(optimizer.adamw, t=self.updates, betas=c.betas)
                else:
                    step = partial(optimizer.sgd, momentum=c.momentum)
                yield partial(step, *arrays, lr=lr, decay=decay, scale=scale)

    def _moment(self, which: str) -> Weights:
        if which not in self._moments:
            kind = which.partition(".")[0]
            rows = {name: row for name, row in self._trained.items() if self._kinds[name] == kind}
            self._moments[which] = Weights(rows, self.dtype)
        return self._moments[which]

    def losses(self, tokens: Array, targets: Array) -> Array:
        def one(part: slice) -> Array:
            logits, _, _ = self.used.forward(tokens[part], self._memory)
            nats, _ = ops.cross_entropy(logits, targets[part].reshape(-1), self._memory)
            return nats.reshape(targets[part].shape)

        return np.concatenate(list(self._spread(one, chunks(len(tokens), self.micro_batch_size))))

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(self.config.model, rows, capacity, self.dtype)

    def logits(
        self, tokens: Array, cache: KeyValueCache, counts: Array, every: bool = False
    ) -> Array:
        counts = np.asarray(counts, np.int64)
        if len(tokens) <= ROWS_READ:  # mostly a single one, where every call counts
            with self._one_blas_thread():
                return read(self.used, tokens, cache, counts, every)

        def one(part: slice) -> Array:
            return read(self.used, tokens[part], cache.part(part), counts[part], every)

        return np.concatenate(list(self._spread(one, chunks(len(tokens), ROWS_READ))))

    def state(self) -> Iterator[tuple[str, Array]]:
        for name in self._trained:
            yield name, self.weights[name]
        for name, kind in self._kinds.items():
            for which in MOMENTS[kind]:
                yield f"{which}/{name}", self._moment(which)[name]
            if self.average:
                yield f"{AVERAGE}/{name}", self.average[name]

    def load(self, state: State, updates: int = 0, loss_scale: float = 1.0) -> None:
        weights, moments, averages = read_state(state, self.rows, self.config.optimizer)
        self._moments = {}
        for key, array in moments.items():
            which, _, name = key.rpartition("/")
            self._moment(which)[name][...] = array
        for name, array in weights.items():
            self.weights[name][...] = array
        if self.average:
            for name, array in (weights | averages).items():
                self.average[name][...] = array
        self.updates = updates

    def _spread(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """function(item) for each item, computed on all threads, given out in the order of the items."""
        with self._one_blas_thread():
            yield from self._pool.map(function, items) if self._pool else map(function, items)

    @contextmanager
    def _one_blas_thread(self) -> Iterator[None]:
        """BLAS computes on the calling thread alone: as threadpool_limits does, at a tenth of its price a token."""
        before = [
            (library, threads) for library in self._blas if (threads := library.num_threads) != 1
        ]
        for library, _ in before:
            library.set_num_threads(1)
        try:
            yield
        finally:
            for library, threads in before:
                library.set_num_threads(threads)


def chunks(size: int, chunk: int) -> list[slice]:
    """Cuts `size` rows or numbers at fixed places, whatever the number of threads."""
    return [slice(start, start + chunk) for start in range(0, size, chunk)]
