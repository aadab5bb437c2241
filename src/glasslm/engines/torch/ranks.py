"""This process among the others, and how they share the work."""

from __future__ import annotations

import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from glasslm.engines.torch.model import Transformer


class Ranks:
    """This process among the others, and how they share the work: "ddp", or "fsdp"."""

    def __init__(self, kind: str) -> None:
        self.kind, self.rank, self.size = kind, dist.get_rank(), dist.get_world_size()
        self.mine = slice(self.rank, None, self.size)  # of the rows of a batch

    def place(self, device: str) -> str:
        """The device of this rank."""
        if device != "cuda":
            return device
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{os.environ['LOCAL_RANK']}"

    def spread(self, model: Transformer, place: torch.device) -> Any:
        """What to call in place of `model`, so that gradients are averaged over the ranks."""
        if self.kind == "fsdp":
            for block in model.blocks:
                fully_shard(block)
            return fully_shard(model)
        ids = [place] if place.type == "cuda" else None
        # The buffers are the same tables everywhere, never to be sent; PyTorch is renaming the word for that.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, **no_buffers
        )

    def synchronising(self, forward: Any, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: gradients cross the network with the last one only."""
        if isinstance(forward, FSDPModule):
            forward.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else forward.no_sync()

    def reshard(self, model: Transformer) -> None:
        """Let go of weights that a forward pass gathered and no backward pass has dropped: they would go stale."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def sum_(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place of each one's."""
        dist.all_reduce(tensor)
