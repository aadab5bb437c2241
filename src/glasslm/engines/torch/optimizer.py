"""How gradients move weights in PyTorch: its own fused AdamW, SGD with momentum, and Muon, which is ours.

PyTorch's Muon computes in bfloat16; this one in the precision of the weights, with the coefficients and the size of
updates of the NumPy engine, so that the two engines take the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from glasslm.config.schema import OptimizerConfig
from glasslm.engines.state import MOMENTS, moment_kind
from glasslm.model.parameters import ParameterTable

ADAM_EPS = 1e-8


class Optimizer:
    """Moves parameters, by name, by what the table assigns to them, AdamW, Muon or SGD; owns their moments."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], rows: ParameterTable, config: OptimizerConfig
    ) -> None:
        self.config, self.parameters = config, parameters
        self.decay = {name: config.weight_decay if row.decay else 0.0 for name, row in rows.items()}
        self.kinds = {name: moment_kind(rows[name], config.optimizer) for name in parameters}
        self.moments = {
            f"{which}/{name}": torch.zeros_like(parameters[name], requires_grad=False)
            for name, kind in self.kinds.items()
            for which in MOMENTS[kind]
        }
        adamw = self._of("adamw")
        groups = [
            {"params": [parameters[name] for name in names], "weight_decay": decay}
            for decay in sorted(set(self.decay.values()))
            if (names := [name for name in adamw if self.decay[name] == decay])
        ]
        self.adamw = (
            torch.optim.AdamW(groups, betas=config.betas, eps=ADAM_EPS, fused=True)
            if adamw
            else None
        )
        self.resume(0)

    def resume(self, updates: int) -> None:
        """Go on after that many updates, with the moments as they are."""
        if self.adamw is None:
            return
        for name in self._of("adamw"):
            p = self.parameters[name]
            self.adamw.state[p] = {
                "step": torch.tensor(float(updates), device=p.device),
                "exp_avg": self.moments[f"adamw.m/{name}"],
                "exp_avg_sq": self.moments[f"adamw.v/{name}"],
            }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the parameters' gradients."""
        for name in [*self._of("muon"), *self._of("sgd")]:
            if self.decay[name]:
                self.parameters[name].mul_(1 - lr * self.decay[name])
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        for name in self._of("sgd"):
            m = self.moments[f"sgd.m/{name}"].mul_(self.config.momentum).add_(self._gradient(name))
            self.parameters[name].sub_(m, alpha=lr)
        for names in self._alike("muon"):
            self._muon(names, lr)

    def _muon(self, names: list[str], lr: float) -> None:
        """Matrices of one shape, (O, I): Nesterov momentum made orthogonal, of root mean square 0.2 lr.

        A matrix that is cut over ranks is gathered on each of them for its product with itself.
        """
        momentum, updates = self.config.momentum, []
        for name in names:
            g = self._gradient(name)
            m = self.moments[f"muon.m/{name}"].mul_(momentum).add_(g)
            updates.append(whole(m * momentum + g))
        update = orthogonalised(torch.stack(updates))
        update *= 0.2 * lr * math.sqrt(max(update.shape[1:]))
        for name, change in zip(names, update):
            self.parameters[name].sub_(cut_like(self.parameters[name], change))

    def _gradient(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None, "a step without gradients"
        return gradient

    def _of(self, kind: str) -> list[str]:
        return [name for name, of in self.kinds.items() if of == kind]

    def _alike(self, kind: str) -> Iterator[list[str]]:
        """The names of each shape."""
        names = self._of(kind)
        for shape in dict.fromkeys(self.parameters[name].shape for name in names):
            yield [name for name in names if self.parameters[name].shape == shape]


def orthogonalised(g: Tensor) -> Tensor:
    """About U Vᵀ for each g = U S Vᵀ of a stack (n, O, I): engines/numpy/optimizer.py has the source."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a part. Every rank must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where `parameter` is cut; no communication."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
