"""The group of processes that train one model together: this process's share of the work."""

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


class RankGroup:
    """This process and the others. `kind` is "fsdp", which shards the model, or else DDP."""

    def __init__(self, kind: str) -> None:
        self.kind, self.rank, self.size = kind, dist.get_rank(), dist.get_world_size()
        self.row_slice = slice(self.rank, None, self.size)  # this rank's rows of a batch

    def device_name(self, device: str) -> str:
        """The device of this rank, such as "cuda:1" for "cuda"."""
        if device != "cuda":
            return device
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{os.environ['LOCAL_RANK']}"

    def wrap_model(self, model: Transformer, device: torch.device) -> Any:
        """A callable in place of `model` that averages gradients over the ranks."""
        if self.kind == "fsdp":
            for block in model.blocks:
                fully_shard(block)
            return fully_shard(model)
        ids = [device] if device.type == "cuda" else None
        # The buffers are equal on all ranks and are not sent. PyTorch is renaming the argument.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, **no_buffers
        )

    def gradient_sync(self, forward: Any, last: bool) -> AbstractContextManager[Any]:
        """A context for forward and backward of a micro-batch: the last one sends gradients."""
        if isinstance(forward, FSDPModule):
            forward.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else forward.no_sync()

    def reshard(self, model: Transformer) -> None:
        """Free weights that a forward pass gathered and no backward pass freed: they get stale."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor (any shape) by its sum over all ranks. Overwrites it."""
        dist.all_reduce(tensor)
