"""Mixture of experts in PyTorch: the routing of engines/numpy/moe.py, with autograd.

Letters: B rows, T positions, N = B T tokens, D width, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasslm.config.schema import ModelConfig
from glasslm.engines.torch.layers import Linear, upcast


class Routing(NamedTuple):
    """The auxiliary losses of a layer's router, and how often it chose each expert."""

    # (), summed over the sequences: E sum_e f_e P_e, with e's share f of the choices and mean
    # probability P
    balance: Tensor
    z: Tensor  # (), summed over the sequences: the mean over the tokens of logsumexp(logits)²
    use: Tensor  # (E,) the number of choices of each expert


class MixtureOfExperts(nn.Module):
    """A router and its experts. `make_expert()` is a feed-forward, (n, D) -> (n, D)."""

    def __init__(self, c: ModelConfig, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.k = c.experts_per_token
        self.router = Linear(c.d_model, c.n_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(c.n_experts))
        self.shared = make_expert() if c.shared_expert else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x (B, T, D) -> (B, T, D), and the routing.

        The output is the sum of k experts' outputs times their gates, and of the shared expert's.
        """
        gates, experts, routing = self._route(self.router(upcast(x)))
        # With single tokens on a CPU, how many an expert gets depends on other rows of the cache.
        # It computes B rows in any case, so that this number does not change the rounding.
        B, T, _ = x.shape
        rows = B if T == 1 and x.device.type == "cpu" and not torch.is_grad_enabled() else 0
        y = self._dispatch(
            x.flatten(0, 1), gates.flatten(0, 1).to(x.dtype), experts.flatten(0, 1), routing.use,
            rows,
        )  # fmt: skip
        y = y.view(x.shape)
        return y if self.shared is None else y + self.shared(x), routing

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """logits (B, T, E) -> gates and indices of the k most probable experts, (B, T, k) each.

        Of equally probable ones, those with the lower index, which topk does not guarantee.
        """
        E = logits.shape[-1]
        p = logits.softmax(-1)
        ranking = logits.sort(dim=-1, descending=True, stable=True).indices
        experts = ranking[..., : self.k]
        gates = p.gather(-1, experts)
        # arXiv:2401.04088. A single gate stays a probability, or it would be 1: arXiv:2101.03961.
        if self.k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        counts = (experts[..., None] == torch.arange(E, device=experts.device)).sum(
            (1, 2)
        )  # (B, E)
        share = counts.to(p.dtype) / experts[0].numel()
        balance = E * (share * p.mean(1)).sum()
        z = logits.logsumexp(-1).square().mean(1).sum()
        return gates, experts, Routing(balance, z, counts.sum(0))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _dispatch(
        self, x: Tensor, gates: Tensor, experts: Tensor, use: Tensor, rows: int
    ) -> Tensor:
        """x (N, D), gates and experts (N, k), use (E,) -> (N, D). An expert gets `rows` or more.

        It is not compiled, because sizes depend on the data. In training every expert runs, with no
        tokens if need be: DDP waits for the gradient of each weight.
        """
        k = experts.shape[1]
        # The choices in the order of their experts, and the inverse of that order, (N k,) each.
        order = experts.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        inputs = permute_rows(x.repeat_interleave(k, 0), order, inverse)
        groups = torch.split(inputs, use.tolist())
        run_all = torch.is_grad_enabled()
        outputs = torch.cat(
            [
                expert(F.pad(group, (0, 0, 0, max(0, rows - len(group)))))[: len(group)]
                for expert, group in zip(self.experts, groups)
                if run_all or len(group)
            ]
        )
        by_token = permute_rows(outputs, inverse, order).view(*gates.shape, -1)  # (N, k, D)
        return (gates[:, None] @ by_token).squeeze(1)


class PermuteRows(torch.autograd.Function):
    """Rows in another order. Its gradient is a copy too, where autograd's own would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """x (M, D), order and its inverse permutation (M,) -> x[order], (M, D)."""
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy.index_select(0, inverse), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x (M, D), order and its inverse permutation (M,) -> x[order], (M, D)."""
    return PermuteRows.apply(x, order, inverse)  # type: ignore[no-untyped-call]
