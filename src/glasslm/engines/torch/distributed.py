"""Many processes, one run: rank 0 leads, the others follow.

Only rank 0 runs the loop, reads text and writes files. Each verb that it calls on its engine is told to the others,
which do the same with theirs, so that nothing above the seam knows of ranks, and only the first machine needs the text.
torchrun starts the processes; what they tell each other is JSON and arrays, never a pickle.
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
from glasslm.engines.choice import ranks, require_divisible, thread_count
from glasslm.engines.protocol import Array, Batch, Losses, State, Update
from glasslm.engines.torch.engine import TorchEngine, make
from glasslm.engines.torch.kv_cache import KeyValueCache
from glasslm.engines.torch.ranks import Ranks
from glasslm.errors import GroupError, InputError

PATIENCE_S = 1800.0  # before a rank gives the others up; GLASSLM_GROUP_TIMEOUT says otherwise


class Leader:
    """The engine of rank 0: what is asked of it, it tells the others first."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.compiled, self.micro_batch_size = engine.compiled, engine.micro_batch_size
        self.rows_at_once = engine.rows_at_once

    @property
    def updates(self) -> int:
        return self._engine.updates

    @property
    def loss_scale(self) -> float:
        return self._engine.loss_scale

    def accumulate(self, batch: Batch, weight: float) -> Losses:
        with in_words():
            arrays = [batch.tokens, batch.targets, batch.rows]
            tell({"verb": "accumulate", "step": batch.step, "weight": weight}, arrays)
            return self._engine.accumulate(batch, weight)

    def update(self, lr: float, skip_above: float = math.inf) -> Update:
        with in_words():
            tell({"verb": "update", "lr": lr, "skip_above": skip_above})
            return self._engine.update(lr, skip_above)

    def losses(self, tokens: Array, targets: Array) -> Array:
        with in_words():
            tell({"verb": "losses"}, [tokens, targets])
            return self._engine.losses(tokens, targets)

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        """Text is written by this rank alone, from all weights, which it gathers for the while."""
        with in_words():
            tell({"verb": "weights"})
            return self._engine.new_cache(rows, capacity)

    def inspect(self, batch: Batch, names: Iterable[str]) -> dict[str, Array]:
        """Likewise."""
        with in_words():
            tell({"verb": "weights"})
            return self._engine.inspect(batch, names)

    def logits(
        self, tokens: Array, cache: KeyValueCache, counts: Array, every: bool = False
    ) -> Array:
        return self._engine.logits(tokens, cache, counts, every)

    def state(self) -> Iterator[tuple[str, Array]]:
        with in_words():
            tell({"verb": "state"})
            yield from self._engine.state()

    def load(self, state: State, updates: int = 0, loss_scale: float = 1.0) -> None:
        entries = dict(state)
        with in_words():
            numbers = {"updates": updates, "loss_scale": loss_scale}
            tell({"verb": "load", "names": list(entries), **numbers}, list(entries.values()))
            self._engine.load(entries.items(), updates, loss_scale)


def lead(config: RunConfig, vocab_size: int, compute: ComputeConfig) -> Leader:
    """Rank 0's engine, once every rank has made its own. Raises InputError where the ranks cannot share the batch."""
    require_divisible(config.train.batch_size, ranks())
    if config.optimizer.ema and compute.parallel == "fsdp":
        raise InputError(
            "--ema keeps a second copy of the weights, which fsdp does not cut: use --parallel ddp"
        )
    with in_words():
        _join()
        what = {"config": to_dict(config), "vocab_size": vocab_size, "compute": to_dict(compute)}
        tell({"verb": "engine", **what})
        return Leader(make(config, vocab_size, compute, Ranks(compute.parallel)))


def follow() -> int:
    """Do what rank 0 does until it is done, and return the exit code."""
    with in_words():
        _join()
    # Whoever interrupts a run interrupts rank 0, too, which saves with the help of all and then lets them go.
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)
    engine: Any = None
    while True:
        with in_words():
            told, arrays = hear()
            match told["verb"]:
                case "engine":
                    engine = None  # before there is another
                    compute = from_dict(ComputeConfig, told["compute"])
                    engine = make(
                        from_dict(RunConfig, told["config"]),
                        told["vocab_size"],
                        compute,
                        Ranks(compute.parallel),
                    )
                case "accumulate":
                    tokens, targets, rows = arrays
                    engine.accumulate(Batch(tokens, targets, told["step"], rows), told["weight"])
                case "update":
                    engine.update(told["lr"], told["skip_above"])
                case "losses":
                    engine.losses(*arrays)
                case "weights":
                    engine.gathered(engine.model)
                case "state":
                    for _ in engine.state():
                        pass
                case "load":
                    engine.load(zip(told["names"], arrays), told["updates"], told["loss_scale"])
                case "stop":
                    engine = None
                    _leave()
                    return 0


def dismiss() -> None:
    """Let the other ranks go, if there are any and they are still there."""
    if dist.is_initialized():
        tell({"verb": "stop"})
        _leave()


def tell(message: dict[str, Any], arrays: Sequence[Array] = ()) -> None:
    """From rank 0 to all others: a message and arrays."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    message = message | {"arrays": [[array.dtype.name, array.shape] for array in arrays]}
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    dist.broadcast(torch.tensor([text.size]), 0)
    for array in (text, *arrays):
        dist.broadcast(torch.from_numpy(array.copy()), 0)


def hear() -> tuple[dict[str, Any], list[Array]]:
    """What rank 0 tells."""
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0)
    text = torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(text, 0)
    message = json.loads(text.numpy().tobytes())
    arrays = [torch.from_numpy(np.empty(shape, kind)) for kind, shape in message["arrays"]]
    for array in arrays:
        dist.broadcast(array, 0)
    return message, [array.numpy() for array in arrays]


def _join() -> None:
    """Meet the other ranks, once."""
    if dist.is_initialized():
        return
    torch.set_num_threads(thread_count(0))
    patience = datetime.timedelta(
        seconds=float(os.environ.get("GLASSLM_GROUP_TIMEOUT", PATIENCE_S))
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience
    )


def _leave() -> None:
    gc.collect()  # what still holds on to the group when Python ends takes the process down with it
    dist.destroy_process_group()


@contextmanager
def in_words() -> Iterator[None]:
    """A rank that is gone or hangs, in words."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        dist.destroy_process_group()  # or the others, where they hang, would be waited for once more
        raise GroupError(
            f"rank {os.environ['RANK']} has lost the others: one of them has ended or hangs ({_first_line(error)}). "
            "Start the same processes with `glasslm resume RUN` to go on from the latest checkpoint"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
