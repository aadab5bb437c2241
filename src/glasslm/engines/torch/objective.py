"""The training objective in PyTorch: cross-entropy and the terms of engines/objective.py.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glasslm.engines.protocol import NO_TARGET
from glasslm.engines.torch.layers import upcast
from glasslm.engines.torch.moe import Routing
from glasslm.engines.torch.operations import BUILT_IN, Operations


def cross_entropy(logits: Tensor, targets: Tensor, operations: Operations) -> Tensor:
    """logits (N, V), targets (N,) -> (N,) nats; 0 for target -1."""
    replaced = operations.get("cross_entropy")
    if replaced is None:
        return F.cross_entropy(logits, targets, ignore_index=NO_TARGET, reduction="none")
    valid = targets >= 0
    if bool(valid.all()):
        return replaced(logits, targets)
    nats = torch.zeros(len(targets), dtype=logits.dtype, device=logits.device)
    return nats.masked_scatter(valid, replaced(logits[valid], targets[valid]))


class _ScaledGradient(torch.autograd.Function):
    """logits (N, V) themselves, whose gradient is multiplied by factors (N, 1)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return gradient * factors, None


def loss_terms(
    logits: Tensor,
    targets: Tensor,
    routings: list[Routing],
    names: Collection[str],
    operations: Operations = BUILT_IN,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """The cross-entropy in nats and then the terms `names`, each summed over the rows, () each.

    logits (B, T, V), targets (B, T) with -1 where nothing is predicted, routings of all layers with
    experts. The names are those of objective.coefficients. `weights` (B, T) multiply the gradients
    of the nats, as Batch.weights do.
    """
    T = targets.shape[1]
    logits, targets = upcast(logits).flatten(0, 1), targets.flatten()
    valid = targets >= 0
    scored = logits
    if weights is not None:  # cross_entropy of a file gets one weight, that of all rows
        scored = _ScaledGradient.apply(logits, weights.flatten()[:, None])  # type: ignore[no-untyped-call]
    if "cross_entropy" in operations:
        nats = cross_entropy(scored, targets, operations).sum()
    else:
        nats = F.cross_entropy(scored, targets, ignore_index=NO_TARGET, reduction="sum")
    terms: dict[str, Tensor] = {}
    if "smoothing" in names:
        target_logits = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        terms["smoothing"] = ((target_logits - logits.mean(-1)) * valid).sum()
    if "z" in names:
        terms["z"] = (torch.logsumexp(logits, -1).square() * valid).sum()
    if routings:
        # A sequence counts T, as its targets do, and a layer counts as one part of all layers.
        weight = T / len(routings)
        terms["balance"] = weight * torch.stack([routing.balance for routing in routings]).sum()
        terms["router_z"] = weight * torch.stack([routing.z for routing in routings]).sum()
    return [nats, *(terms[name] for name in names)]
