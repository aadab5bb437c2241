"""The NumPy engine: the methods of engines/protocol.py over the hand-written model.

A batch is cut into micro-batches of a fixed size. Threads compute them side by side, while BLAS is
limited to one thread each, and their gradients are added in ascending order. So the bits of a
result do not depend on the number of threads.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import ThreadpoolController

from glasslm.config.schema import DeviceName, EngineName, Precision, RunConfig
from glasslm.engines.choice import resolve_micro_batch_size
from glasslm.engines.dropout import row_keys
from glasslm.engines.inspection import GRADIENT_PREFIX, Edit, require_edits, require_known_names
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.engines.numpy import ops, optimizer
from glasslm.engines.numpy.blas_limit import one_blas_thread
from glasslm.engines.numpy.buffer_pool import BufferPool
from glasslm.engines.numpy.column_pieces import MIN_ROWS, ColumnPieces, has_small_products
from glasslm.engines.numpy.forward_context import ActivationRecorder
from glasslm.engines.numpy.inference import read_tokens
from glasslm.engines.numpy.kv_cache import KVCache
from glasslm.engines.numpy.model import Model
from glasslm.engines.numpy.operations import make_operations
from glasslm.engines.numpy.ops import Array
from glasslm.engines.numpy.optimizer import CHUNK_NUMBERS
from glasslm.engines.numpy.softmax_terms import SOFTMAX_TERMS
from glasslm.engines.numpy.weights import Weights
from glasslm.engines.objective import coefficients
from glasslm.engines.operation_call import call_site
from glasslm.engines.protocol import Batch, Losses, State, Update
from glasslm.engines.state import AVERAGE, MOMENTS, average_decay, moment_kind, read_state
from glasslm.engines.token_ids import require_token_ids
from glasslm.model.parameters import parameter_table

# Rows that one thread reads into a cache at once, at most. Each row of a product of 4, 8 or 16 rows
# has the same bits in every place and beside any other rows, with all kernels of OpenBLAS
# (docs/log.md); in products by pieces, of 2 to 16 rows.
CACHE_ROWS_PER_THREAD = 16
READOUT_ROWS = 256  # whose logits a thread computes at once

Item = TypeVar("Item")
Result = TypeVar("Result")


class NumpyEngine:
    """The Engine in NumPy. `config` must be resolved. Weights are zero until `load`."""

    name: EngineName = "numpy"
    device: DeviceName = "cpu"
    compiled = False

    def __init__(
        self, config: RunConfig, vocab_size: int, threads: int, dtype: DTypeLike = np.float32
    ) -> None:
        self.config = config
        self.precision: Precision = "fp64" if np.dtype(dtype) == np.float64 else "fp32"
        self.vocab_size, self.updates, self.loss_scale = vocab_size, 0, 1.0
        self.table = parameter_table(config.model, vocab_size)
        self.dtype = np.dtype(dtype)
        self.weights = Weights(self.table, dtype)
        self.operations = make_operations(config)
        self.model = Model(config.model, self.weights, self.operations)
        self.average = Weights(self.table, dtype) if config.optimizer.ema else None
        # Evaluation and generation use the average of the weights if there is one.
        self.eval_model = (
            Model(config.model, self.average, self.operations) if self.average else self.model
        )
        self.micro_batch_size = resolve_micro_batch_size(config, "numpy")
        self.rows_at_once = threads * self.micro_batch_size
        self._trained_specs = {name: spec for name, spec in self.table.items() if spec.trained}
        self._coefficients = coefficients(config)
        self._gradients: Weights | None = None  # allocated when training starts
        self._has_gradients = False  # else the next gradient replaces the old values
        self._optimizers = {
            name: moment_kind(spec, config.optimizer.optimizer)
            for name, spec in self._trained_specs.items()
        }
        self._moments: dict[str, Weights] = {}  # "adamw.m": first moments of AdamW, ...
        self._buffers = BufferPool(dtype)
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        self._blas = ThreadpoolController().select(user_api="blas").lib_controllers
        # With pieces the bits of a row do not depend on the number of rows, so a tile can be small.
        shapes = [spec.shape for spec in self.table.values()]
        self._has_pieces = has_small_products(self._blas, shapes) and not self.operations.replaced
        self.row_tile = MIN_ROWS if self._has_pieces else CACHE_ROWS_PER_THREAD
        self._pieced_model: Model | None = None  # made when several texts are generated

    def accumulate(self, batch: Batch, weight: float) -> Losses:
        """Engine.accumulate."""
        require_token_ids(self.vocab_size, batch.tokens, batch.targets)
        if self._gradients is None:
            self._gradients = Weights(self._trained_specs, self.dtype)
        parts = chunks(len(batch.tokens), self.micro_batch_size)
        losses = []
        with call_site(f"step {batch.step + 1}"):
            for part_losses, part_gradients in self._map_on_threads(
                lambda part: self._differentiate(batch, part, weight), parts
            ):
                losses.append(part_losses)
                for name, gradient in part_gradients.items():
                    if self._has_gradients:
                        self._gradients[name][...] += gradient
                    else:
                        self._gradients[name][...] = gradient
                self._has_gradients = True
        return functools.reduce(Losses.__add__, losses)

    def _differentiate(
        self, batch: Batch, part: slice, weight: float
    ) -> tuple[Losses, dict[str, Array]]:
        """The losses of some rows of the batch, and the gradients of trained weights by name."""
        losses, backward = self.forward(batch, weight, part)
        return losses, backward()

    def forward(
        self,
        batch: Batch,
        weight: float,
        part: slice = slice(None),
        recorder: ActivationRecorder | None = None,
    ) -> tuple[Losses, Callable[[], dict[str, Array]]]:
        """The losses of some rows of a training batch, and their backward, as in `accumulate`.

        With a recorder there is no dropout, and the pass does not use the buffer pool.
        """
        c, rows, terms = self.config, batch.rows[part], self._coefficients
        new = self._buffers if recorder is None else self.model.empty
        targets = batch.targets[part].reshape(-1)

        def keys(site: int) -> NDArray[np.uint32]:
            return row_keys(c.train.seed, batch.step, rows, site)

        has_dropout = (c.model.dropout or c.model.attention_dropout) and recorder is None
        # The share of one sequence and layer in the mean over all of them.
        share = weight * batch.tokens.shape[1] / c.model.n_layers
        penalties = (share * terms.get("balance", 0.0), share * terms.get("router_z", 0.0))
        logits, routings, model_back = self.model.forward(
            batch.tokens[part], new, keys if has_dropout else None, penalties, recorder
        )
        nats, nats_back = self.operations(ops.cross_entropy)(logits, targets, new)
        softmax_terms = {
            name: op(logits, targets, new) for name, op in SOFTMAX_TERMS.items() if name in terms
        }
        auxiliary = {
            name: weight * math.fsum(values) for name, (values, _) in softmax_terms.items()
        }
        experts = None
        if routings:
            auxiliary["balance"] = share * math.fsum(routing.balance for routing in routings)
            auxiliary["router_z"] = share * math.fsum(routing.z for routing in routings)
            experts = np.stack([routing.use for routing in routings])

        def backward() -> dict[str, Array]:
            dlogits = nats_back(weight)
            if batch.weights is not None:
                dlogits *= batch.weights[part].reshape(-1, 1).astype(self.dtype)
            for name, (_, term_back) in softmax_terms.items():
                dlogits += term_back(weight * terms[name])
            return model_back(dlogits)

        return Losses(weight * math.fsum(nats), auxiliary, experts), backward

    def inspect(
        self, batch: Batch, names: Iterable[str], edits: Sequence[Edit] = ()
    ) -> dict[str, Array]:
        """Engine.inspect."""
        names = list(names)
        require_known_names(names, self.config.model, self.table)
        require_edits(edits, names, self.config.model)
        require_token_ids(self.vocab_size, batch.tokens, batch.targets)
        recorder = ActivationRecorder(names, edits)
        targets = max(1, int((batch.targets >= 0).sum()))
        with one_blas_thread(self._blas):
            _, backward = self.forward(batch, 1 / targets, recorder=recorder)
            if any(name.startswith(GRADIENT_PREFIX) for name in names):
                gradients = Weights(self._trained_specs, self.dtype)
                for name, gradient in backward().items():
                    gradients[name][...] = gradient
                recorder.arrays |= {
                    GRADIENT_PREFIX + name: gradient for name, gradient in gradients.arrays.items()
                }
        return {name: recorder.arrays[name] for name in names}

    def readout(self, stream: Array) -> Array:
        """Engine.readout: (N, D) -> (N, V)."""
        stream = np.asarray(stream, self.dtype)
        parts = chunks(len(stream), READOUT_ROWS)
        return np.concatenate(
            list(self._map_on_threads(lambda part: self.model.readout(stream[part].copy()), parts))
        )

    def gradients(self, batch: Batch, weight: float) -> dict[str, Array]:
        """The gradients that `accumulate` computes of a batch, by name; then it resets them."""
        self._has_gradients = False
        self.accumulate(batch, weight)
        self._has_gradients = False
        assert self._gradients is not None
        return self._gradients.arrays

    def update(self, lr: float, skip_above: float = math.inf) -> Update:
        """Engine.update."""
        assert self._gradients is not None, "update before accumulate"
        assert self._has_gradients, "update before accumulate"
        self._has_gradients = False
        flat = self._gradients.flat
        squares = self._map_on_threads(
            lambda part: float(np.vdot(flat[part], flat[part])), chunks(flat.size, CHUNK_NUMBERS)
        )
        norm = math.sqrt(sum(squares))
        finite = math.isfinite(norm)
        if not finite or norm > skip_above:
            return Update(norm, finite, applied=False)
        clip = self.config.optimizer.grad_clip
        scale = min(1.0, clip / norm) if clip and norm else 1.0
        self.updates += 1
        self._pieced_model = None
        pieces = self._update_pieces(self._gradients, lr, scale)
        with call_site(f"update {self.updates}"):
            for _ in self._map_on_threads(lambda piece: piece(), pieces):
                pass
        if self.average:
            average, current = self.average.flat, self.weights.flat
            share = 1 - average_decay(self.config.optimizer.ema, self.updates)
            for part in chunks(current.size, CHUNK_NUMBERS):
                optimizer.move_average(average[part], current[part], share)
        return Update(norm, finite, applied=True)

    def _update_pieces(
        self, gradients: Weights, lr: float, scale: float
    ) -> Iterator[Callable[[], None]]:
        """The independent pieces of an update, those that take longest, Muon's matrices, first."""
        c = self.config.optimizer
        unknown = set(self._optimizers.values()) - {"adamw", "muon", "sgd"}
        assert not unknown, f"the NumPy engine does not know the optimizer {unknown}"
        steps: dict[str, Callable[..., None]] = {
            "adamw": partial(
                self.operations(optimizer.adamw),
                t=self.updates,
                betas=c.betas,
                eps=optimizer.ADAM_EPS,
            ),
            "muon": partial(self.operations(optimizer.muon), momentum=c.momentum),
            "sgd": partial(self.operations(optimizer.sgd), momentum=c.momentum),
        }
        for name in sorted(self._trained_specs, key=lambda name: -self.table[name].size):
            kind = self._optimizers[name]
            if kind == "muon" or kind in self.operations:  # a file's gets a weight in its shape
                moments = [self._moment(which) for which in MOMENTS[kind]]
                arrays = [array[name] for array in (self.weights, gradients, *moments)]
                decay = c.weight_decay if self.table[name].decay else 0.0
                yield partial(steps[kind], *arrays, lr=lr, decay=decay, scale=scale)
        for kind, decays in itertools.product(("adamw", "sgd"), (False, True)):
            names = [
                name
                for name, spec in self._trained_specs.items()
                if self._optimizers[name] == kind and spec.decay == decays
            ]
            if not names or kind in self.operations:
                continue
            decay = c.weight_decay if decays else 0.0
            moments = [self._moment(which) for which in MOMENTS[kind]]
            runs = [array.contiguous(names) for array in (self.weights, gradients, *moments)]
            for part in chunks(runs[0].size, CHUNK_NUMBERS):
                arrays = [run[part] for run in runs]
                yield partial(steps[kind], *arrays, lr=lr, decay=decay, scale=scale)

    def _moment(self, which: str) -> Weights:
        """The moments "adamw.m", "muon.m", ... of the weights of that optimizer, zero at first."""
        if which not in self._moments:
            kind = which.partition(".")[0]
            specs = {
                name: spec
                for name, spec in self._trained_specs.items()
                if self._optimizers[name] == kind
            }
            self._moments[which] = Weights(specs, self.dtype)
        return self._moments[which]

    def losses(self, tokens: Array, targets: Array) -> Array:
        """Engine.losses: tokens and targets (B, T) -> (B, T) nats."""
        require_token_ids(self.vocab_size, tokens, targets)

        def compute_part(part: slice) -> Array:
            logits, _, _ = self.eval_model.forward(tokens[part], self._buffers)
            cross_entropy = self.operations(ops.cross_entropy)
            nats, _ = cross_entropy(logits, targets[part].reshape(-1), self._buffers)
            return nats.reshape(targets[part].shape)

        parts = chunks(len(tokens), self.micro_batch_size)
        return np.concatenate(list(self._map_on_threads(compute_part, parts)))

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Engine.new_cache."""
        keeps_queries = self.operations.replaces_attention
        return KVCache(self.config.model, rows, capacity, self.dtype, keeps_queries)

    def logits(self, tokens: Array, cache: KVCache, counts: Array, every: bool = False) -> Array:
        """Engine.logits: tokens (B, T), counts (B,) -> logits (B, V), or with `every` (B, T, V)."""
        require_token_ids(self.vocab_size, tokens)
        counts = np.asarray(counts, np.int64)
        model, tile = self.eval_model, CACHE_ROWS_PER_THREAD
        if self._has_pieces and tokens.shape[1] == 1 and len(tokens) > 1:
            model, tile = self._model_with_pieces(), self.row_tile
        if len(tokens) == 1:  # the usual case, where each call counts
            with one_blas_thread(self._blas):
                return read_tokens(model, tokens, cache, counts, every)

        def compute_part(part: slice) -> Array:
            return read_tokens(model, tokens[part], cache.part(part), counts[part], every)

        logits = np.zeros((len(tokens), *tokens.shape[1:] * every, self.vocab_size), self.dtype)
        parts = active_parts(counts.tolist(), tile, CACHE_ROWS_PER_THREAD)
        for part, part_logits in zip(parts, self._map_on_threads(compute_part, parts)):
            logits[part] = part_logits
        return logits

    def _model_with_pieces(self) -> Model:
        """eval_model, whose matrices are multiplied by pieces until the weights change."""
        if self._pieced_model is None:
            self._pieced_model = copy.copy(self.eval_model)
            self._pieced_model.pieces = ColumnPieces()
        return self._pieced_model

    def state(self) -> Iterator[tuple[str, Array]]:
        """Engine.state."""
        for name in self._trained_specs:
            yield name, self.weights[name]
        for name, kind in self._optimizers.items():
            for which in MOMENTS[kind]:
                yield f"{which}/{name}", self._moment(which)[name]
            if self.average:
                yield f"{AVERAGE}/{name}", self.average[name]

    def load(self, state: State | LazyArrays, updates: int = 0, loss_scale: float = 1.0) -> None:
        """Engine.load."""
        weights, moments, averages = read_state(state, self.table, self.config.optimizer)
        self._moments, self._pieced_model = {}, None
        for key, array in moments.items():
            which, _, name = key.rpartition("/")
            self._moment(which)[name][...] = array
        for name, array in weights.items():
            self.weights[name][...] = array
        if self.average:
            for name, array in weights.items():
                self.average[name][...] = averages.get(name, array)
        self.updates = updates

    def _map_on_threads(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """function(item) of each item, computed on all threads, in the order of the items."""
        items = list(items)
        threads = self._threads if len(items) > 1 else None
        with one_blas_thread(self._blas):
            yield from threads.map(function, items) if threads else map(function, items)


def chunks(size: int, chunk: int) -> list[slice]:
    """Slices of `chunk` rows or numbers that cover `size`; the last one may be shorter."""
    return [slice(start, start + chunk) for start in range(0, size, chunk)]


def active_parts(counts: list[int], tile: int, max_rows: int) -> list[slice]:
    """Slices of up to `max_rows` rows that hold each tile of rows with a count above 0.

    >>> active_parts([1, 0, 0, 0, 1, 1, 0, 1], tile=2, max_rows=16)
    [slice(0, 2, None), slice(4, 8, None)]
    """
    parts: list[slice] = []
    for start in range(0, len(counts), tile):
        stop = min(start + tile, len(counts))
        if not any(counts[start:stop]):
            continue
        if parts and parts[-1].stop == start and stop - parts[-1].start <= max_rows:
            start = parts.pop().start
        parts.append(slice(start, stop))
    return parts
