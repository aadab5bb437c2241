"""Training on several processes: rank 0 leads, and the others repeat the calls of its engine.

Only rank 0 runs the training loop, reads text and writes files. It broadcasts each call on its
engine, and the other ranks make the same call on theirs. So no module outside this package depends
on ranks, and only the first machine needs the text. torchrun starts the processes. Messages are
JSON and arrays, without pickle.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from glasslm.config.conversion import from_dict, to_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.library_call import run_interruptibly
from glasslm.engines.inspection import Edit
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.engines.operations import admit, find_operations, operations_from_text
from glasslm.engines.protocol import Array, Batch, Losses, State, Update
from glasslm.engines.resources import count_ranks, require_divisible, thread_count
from glasslm.engines.torch.creation import make_torch_engine
from glasslm.engines.torch.engine import TorchEngine
from glasslm.engines.torch.kv_cache import KVCache
from glasslm.engines.torch.ranks import RankGroup
from glasslm.errors import GroupError, InputError

GROUP_TIMEOUT_S = 1800.0  # of a rank that waits for the others, unless GLASSLM_GROUP_TIMEOUT is set
EXTRA_WAIT_S = 2.0  # in which the library says itself why no group forms


class LeaderEngine:
    """The engine of rank 0, which broadcasts each call before it executes it."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.compiled, self.micro_batch_size = engine.compiled, engine.micro_batch_size
        self.rows_at_once = engine.rows_at_once
        self.row_tile = engine.row_tile

    @property
    def updates(self) -> int:
        return self._engine.updates

    @property
    def loss_scale(self) -> float:
        return self._engine.loss_scale

    def accumulate(self, batch: Batch, weight: float) -> Losses:
        with explain_group_failure():
            arrays: list[Array] = [batch.tokens, batch.targets, batch.rows]
            arrays += [] if batch.weights is None else [batch.weights]
            broadcast_call({"method": "accumulate", "step": batch.step, "weight": weight}, arrays)
            return self._engine.accumulate(batch, weight)

    def update(self, lr: float, skip_above: float = math.inf) -> Update:
        with explain_group_failure():
            broadcast_call({"method": "update", "lr": lr, "skip_above": skip_above})
            return self._engine.update(lr, skip_above)

    def losses(self, tokens: Array, targets: Array) -> Array:
        with explain_group_failure():
            broadcast_call({"method": "losses"}, [tokens, targets])
            return self._engine.losses(tokens, targets)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Engine.new_cache: this rank gathers all weights and generates text alone."""
        with explain_group_failure():
            broadcast_call({"method": "weights"})
            return self._engine.new_cache(rows, capacity)

    def inspect(
        self, batch: Batch, names: Iterable[str], edits: Sequence[Edit] = ()
    ) -> dict[str, Array]:
        """Engine.inspect: this rank gathers all weights and computes alone."""
        with explain_group_failure():
            broadcast_call({"method": "weights"})
            return self._engine.inspect(batch, names, edits)

    def readout(self, stream: Array) -> Array:
        """Engine.readout: this rank gathers all weights and computes alone."""
        with explain_group_failure():
            broadcast_call({"method": "weights"})
            return self._engine.readout(stream)

    def logits(self, tokens: Array, cache: KVCache, counts: Array, every: bool = False) -> Array:
        return self._engine.logits(tokens, cache, counts, every)

    def state(self) -> Iterator[tuple[str, Array]]:
        with explain_group_failure():
            broadcast_call({"method": "state"})
            yield from self._engine.state()

    def load(self, state: State | LazyArrays, updates: int = 0, loss_scale: float = 1.0) -> None:
        entries = dict(state.items() if isinstance(state, LazyArrays) else state)
        with explain_group_failure():
            numbers = {"updates": updates, "loss_scale": loss_scale}
            broadcast_call(
                {"method": "load", "names": list(entries), **numbers}, list(entries.values())
            )
            self._engine.load(entries.items(), updates, loss_scale)


def lead_group(config: RunConfig, vocab_size: int, compute: ComputeConfig) -> LeaderEngine:
    """The engine of rank 0, after all ranks have created theirs.

    Raises InputError if the ranks cannot divide the batch, and GroupError if a rank fails.
    """
    require_divisible(config.train.batch_size, count_ranks())
    if config.optimizer.ema and compute.parallel == "fsdp":
        raise InputError(
            "--ema needs a second copy of the weights, which fsdp does not shard: "
            "use --parallel ddp"
        )
    _require_whole_weights(config, compute)
    with explain_group_failure():
        _join_group()
        arguments = {"config": to_dict(config), "vocab_size": vocab_size, "operations": None}
        if operations := find_operations(config):
            file = operations.file
            arguments["operations"] = [file.text, file.name, file.sha256]
        broadcast_call({"method": "engine", **arguments, "compute": to_dict(compute)})
        ranks = RankGroup(compute.parallel)
        return LeaderEngine(make_torch_engine(config, vocab_size, compute, ranks))


def _require_whole_weights(config: RunConfig, compute: ComputeConfig) -> None:
    """Raise InputError where operations of a file would get shards of weights."""
    if config.operations.ops and compute.parallel == "fsdp":
        raise InputError(
            "--ops does not go with --parallel fsdp, which shards the weights that its functions "
            "get: use --parallel ddp"
        )


def follow_leader() -> int:
    """Repeat the calls of rank 0 until it releases this rank; returns the exit code.

    Raises GroupError if another rank fails.
    """
    with explain_group_failure():
        _join_group()
    # An interrupt reaches rank 0 too, which saves with the help of all ranks and releases them.
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupt, signal.SIG_IGN)
    engine: Any = None
    while True:
        with explain_group_failure():
            call, arrays = receive_call()
            match call["method"]:
                case "engine":
                    engine = None  # frees its memory before the next engine needs it
                    compute = from_dict(ComputeConfig, call["compute"])
                    if call["operations"] is not None:  # the leader has let them in
                        admit(operations_from_text(*call["operations"]))
                    engine = make_torch_engine(
                        from_dict(RunConfig, call["config"]),
                        call["vocab_size"],
                        compute,
                        RankGroup(compute.parallel),
                    )
                case "accumulate":
                    tokens, targets, rows, *weights = arrays
                    batch = Batch(tokens, targets, call["step"], rows, *weights)
                    engine.accumulate(batch, call["weight"])
                case "update":
                    engine.update(call["lr"], call["skip_above"])
                case "losses":
                    engine.losses(*arrays)
                case "weights":
                    engine.gather_weights(engine.model)
                case "state":
                    for _ in engine.state():
                        pass
                case "load":
                    engine.load(zip(call["names"], arrays), call["updates"], call["loss_scale"])
                case "stop":
                    engine = None
                    _leave_group()
                    return 0


def release_workers() -> None:
    """End the other ranks' `follow_leader`, if the group still exists."""
    if dist.is_initialized():
        broadcast_call({"method": "stop"})
        _leave_group()


def broadcast_call(message: dict[str, Any], arrays: Sequence[Array] = ()) -> None:
    """Send a call, as JSON, and its arrays (any shapes) from rank 0 to all other ranks."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    message = message | {"arrays": [[array.dtype.name, array.shape] for array in arrays]}
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    dist.broadcast(torch.tensor([text.size]), 0)
    for array in (text, *arrays):
        dist.broadcast(torch.from_numpy(array.copy()), 0)


def receive_call() -> tuple[dict[str, Any], list[Array]]:
    """The next call that rank 0 broadcasts, and its arrays in their shapes."""
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0)
    text = torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(text, 0)
    message = json.loads(text.numpy().tobytes())
    arrays = [torch.from_numpy(np.empty(shape, kind)) for kind, shape in message["arrays"]]
    for array in arrays:
        dist.broadcast(array, 0)
    return message, [array.numpy() for array in arrays]


def _join_group() -> None:
    """Create the process group, unless it exists; waits for the other ranks."""
    if dist.is_initialized():
        return
    torch.set_num_threads(thread_count(0))
    timeout_s = float(os.environ.get("GLASSLM_GROUP_TIMEOUT", GROUP_TIMEOUT_S))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        # In a thread: the library obeys no signal, and waits for ever for a program that accepts
        # the connection and says nothing.
        run_interruptibly(
            lambda: dist.init_process_group(backend, timeout=timeout), timeout_s + EXTRA_WAIT_S
        )
    except (RuntimeError, ValueError, TimeoutError) as error:  # DistError is a RuntimeError
        cause = _first_line(error) or "the program there does not answer"
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise GroupError(
            f"rank {os.environ.get('RANK')} of {count_ranks()} could not join its group at "
            f"{address} in {timeout_s:g} s ({cause}). Start all ranks, with torchrun, "
            "on a port that no other program uses"
        ) from None


def _leave_group() -> None:
    gc.collect()  # an object that refers to the group when Python ends would crash the process
    dist.destroy_process_group()


@contextmanager
def explain_group_failure() -> Iterator[None]:
    """A context that raises GroupError, naming this rank, if another rank has ended or hangs."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        dist.destroy_process_group()  # otherwise ranks that hang are waited for again
        raise GroupError(
            f"rank {os.environ['RANK']} has lost the others: one of them has ended or hangs "
            f"({_first_line(error)}). Start the same processes with `glasslm resume RUN` to "
            "continue from the latest checkpoint"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
