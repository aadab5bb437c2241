"""The optimizers in PyTorch: its own fused AdamW, SGD with momentum, and a hand-written Muon.

PyTorch's Muon always computes in bfloat16. This one does so at precision bf16 only. Otherwise it
computes in the type of the weights, with the coefficients and the size of updates of the NumPy
engine, so that both engines take the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from glasslm.config.schema import OptimizerConfig
from glasslm.engines.state import MOMENTS, moment_kind
from glasslm.engines.torch.operations import BUILT_IN, Operations
from glasslm.model.parameters import ParameterTable

ADAM_EPS = 1e-8


class Optimizer:
    """Updates parameters by name, with the optimizer of each in the table; owns the moments."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        table: ParameterTable,
        config: OptimizerConfig,
        muon_dtype: torch.dtype,
        operations: Operations = BUILT_IN,
        updates: int = 0,
    ) -> None:
        """`muon_dtype` is the type of the factors in Muon's products; moments keep their own.

        `updates` were made before, by an optimizer whose moments are loaded next or were zero.
        """
        self.muon_dtype = muon_dtype
        self.config, self.parameters, self.operations = config, parameters, operations
        self.decay = {
            name: config.weight_decay if spec.decay else 0.0 for name, spec in table.items()
        }
        self.kinds = {name: moment_kind(table[name], config.optimizer) for name in parameters}
        unknown = set(self.kinds.values()) - {"adamw", "muon", "sgd"}
        assert not unknown, f"the PyTorch engine does not know the optimizer {unknown}"
        self.moments = {
            f"{moment}/{name}": torch.zeros_like(parameters[name], requires_grad=False)
            for name, kind in self.kinds.items()
            for moment in MOMENTS[kind]
        }
        adamw_names = [] if "adamw" in operations else self._names("adamw")
        groups = [
            {"params": [parameters[name] for name in names], "weight_decay": decay}
            for decay in sorted(set(self.decay.values()))
            if (names := [name for name in adamw_names if self.decay[name] == decay])
        ]
        self.adamw = (
            torch.optim.AdamW(groups, betas=config.betas, eps=ADAM_EPS, fused=True)
            if adamw_names
            else None
        )
        self.resume(updates)

    def resume(self, updates: int) -> None:
        """Continue after that many updates, with the present moments."""
        if self.adamw is None:
            return
        for name in self._names("adamw"):
            p = self.parameters[name]
            self.adamw.state[p] = {
                "step": torch.tensor(float(updates), device=p.device),
                "exp_avg": self.moments[f"adamw.m/{name}"],
                "exp_avg_sq": self.moments[f"adamw.v/{name}"],
            }

    @torch.no_grad()
    def step(self, lr: float, t: int) -> None:
        """Make update number t = 1, 2, ... of the parameters from their gradients.

        Overwrites parameters and moments.
        """
        replaced = [kind for kind in MOMENTS if kind in self.operations]
        for kind in replaced:
            self._step_of_file(kind, lr, t)
        built_in = [kind for kind in ("muon", "sgd") if kind not in replaced]
        for name in (name for kind in built_in for name in self._names(kind)):
            if self.decay[name]:
                self.parameters[name].mul_(1 - lr * self.decay[name])
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        for name in self._names("sgd") if "sgd" in built_in else ():
            m = self.moments[f"sgd.m/{name}"].mul_(self.config.momentum).add_(self._gradient(name))
            self.parameters[name].sub_(m, alpha=lr)
        for names in self._names_by_shape("muon") if "muon" in built_in else ():
            self._muon(names, lr)

    def _step_of_file(self, kind: str, lr: float, t: int) -> None:
        """Update the parameters of one optimizer by the function of a file, one by one."""
        update, c = self.operations.update(kind), self.config
        assert update is not None
        settings: dict[str, Any] = (
            {"t": t, "betas": c.betas, "eps": ADAM_EPS}
            if kind == "adamw"
            else {"momentum": c.momentum}
        )
        for name in self._names(kind):
            moments = [self.moments[f"{moment}/{name}"] for moment in MOMENTS[kind]]
            arrays = (self.parameters[name].data, self._gradient(name), *moments)
            update(*arrays, lr=lr, decay=self.decay[name], **settings)

    def _muon(self, names: list[str], lr: float) -> None:
        """One Muon update, of root mean square 0.2 lr, of matrices of one shape (O, I).

        A matrix that is sharded over ranks is gathered on each of them for its product with itself.
        """
        momentum, updates = self.config.momentum, []
        for name in names:
            g = self._gradient(name)
            m = self.moments[f"muon.m/{name}"].mul_(momentum).add_(g)
            updates.append(gather_shards(m * momentum + g))
        stack = torch.stack(updates)
        update = orthogonalize(stack.to(self.muon_dtype)).to(stack.dtype)
        update *= 0.2 * lr * math.sqrt(max(update.shape[1:]))
        for name, change in zip(names, update):
            self.parameters[name].sub_(shard_like(self.parameters[name], change))

    def _gradient(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None, "a step without gradients"
        return gradient

    def _names(self, kind: str) -> list[str]:
        """The parameters that an optimizer updates."""
        return [name for name, optimizer in self.kinds.items() if optimizer == kind]

    def _names_by_shape(self, kind: str) -> Iterator[list[str]]:
        """The parameters that an optimizer updates, one list for each shape."""
        names = self._names(kind)
        for shape in dict.fromkeys(self.parameters[name].shape for name in names):
            yield [name for name in names if self.parameters[name].shape == shape]


def orthogonalize(g: Tensor) -> Tensor:
    """About U Vᵀ (n, O, I) for each g = U S Vᵀ of a stack (n, O, I), in the type of g.

    The iteration is explained in engines/numpy/optimizer.py. In bfloat16 the singular values come
    into the same range, but singular vectors with values near zero are those of rounding errors.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def gather_shards(tensor: Tensor) -> Tensor:
    """The full tensor, of which this rank may hold a shard. All ranks call it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This rank's shard of a full tensor, if `parameter` is sharded; without communication."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
