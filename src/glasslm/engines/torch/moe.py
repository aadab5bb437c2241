"""Mixture of experts in PyTorch: the routing of the other engine's moe.py, with autograd for the way back.

Letters: B rows, T positions, N = B T tokens, D width, E experts, k of them for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glasslm.config.schema import ModelConfig
from glasslm.engines.torch.layers import Linear, widened


class Routing(NamedTuple):
    """What a layer's router did in one pass, beside its output."""

    balance: Tensor  # (), summed over the sequences: E sum_e f_e P_e, with share f of the choices, mean probability P
    z: Tensor  # (), summed over the sequences: the mean over the tokens of logsumexp(logits)²
    use: Tensor  # (E,) how many choices fell on each expert


class Mixture(nn.Module):
    """`make_expert()` is a feed-forward, (n, D) -> (n, D)."""

    def __init__(self, c: ModelConfig, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.k = c.experts_per_token
        self.router = Linear(c.d_model, c.n_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(c.n_experts))
        self.shared = make_expert() if c.shared_expert else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x (B, T, D) -> (B, T, D), the sum of k experts' outputs by their gates, and of the shared one's."""
        gates, chosen, routing = self._route(self.router(widened(x)))
        y = self._dispatch(
            x.flatten(0, 1), gates.flatten(0, 1).to(x.dtype), chosen.flatten(0, 1), routing.use
        )
        y = y.view(x.shape)
        return y if self.shared is None else y + self.shared(x), routing

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """logits (B, T, E) -> gates (B, T, k), the chosen experts (B, T, k): of equally probable ones the first."""
        E = logits.shape[-1]
        p = logits.softmax(-1)
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[
            ..., : self.k
        ]  # topk leaves ties open
        gates = p.gather(-1, chosen)
        if (
            self.k > 1
        ):  # arXiv:2401.04088; a single one by itself would be 1 and teach nothing: arXiv:2101.03961
            gates = gates / gates.sum(-1, keepdim=True)
        counts = (chosen[..., None] == torch.arange(E, device=chosen.device)).sum((1, 2))  # (B, E)
        share = counts.to(p.dtype) / chosen[0].numel()
        balance = E * (share * p.mean(1)).sum()
        z = logits.logsumexp(-1).square().mean(1).sum()
        return gates, chosen, Routing(balance, z, counts.sum(0))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _dispatch(self, x: Tensor, gates: Tensor, chosen: Tensor, use: Tensor) -> Tensor:
        """x (N, D), gates and chosen (N, k), use (E,) -> (N, D). Sizes depend on the data, so it is not compiled.

        In training every expert runs, also with no tokens, because DDP waits for the gradient of each weight.
        """
        k = chosen.shape[1]
        order = chosen.flatten().argsort(
            stable=True
        )  # the choices, those of an expert side by side
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)  # where each choice went
        sent = permuted(x.repeat_interleave(k, 0), order, place)
        groups = torch.split(sent, use.tolist())
        all_run = torch.is_grad_enabled()
        work = [
            expert(group) for expert, group in zip(self.experts, groups) if all_run or len(group)
        ]
        outputs = torch.cat(work)
        return (gates[:, None] @ permuted(outputs, place, order).view(*gates.shape, -1)).squeeze(1)


class Permuted(torch.autograd.Function):
    """Rows in another order. As each row is taken once, the way back is again a mere copy, where autograd would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """x (M, D), `back` the inverse of the permutation `order` -> x[order]."""
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return dy.index_select(0, back), None, None


def permuted(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    return Permuted.apply(x, order, back)  # type: ignore[no-untyped-call]
