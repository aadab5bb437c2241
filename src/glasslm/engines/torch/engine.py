"""The PyTorch engine: the verbs of engines/__init__.py over the model in model.py and autograd.

On several ranks each verb is called on all of them at once with the same arguments; a rank computes every size-th row
of what it is given. distributed.py sees to the calling.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glasslm.config.schema import ComputeConfig, DeviceName, EngineName, Precision, RunConfig
from glasslm.engines.choice import micro_batch_size
from glasslm.engines.dropout import row_keys, site
from glasslm.engines.inspection import GRADIENT, require_known
from glasslm.engines.objective import coefficients
from glasslm.engines.protocol import Batch, Losses, State, Update
from glasslm.engines.state import AVERAGE, decay_of_average, read_state
from glasslm.engines.torch import hardware
from glasslm.engines.torch.inspection import Look
from glasslm.engines.torch.kv_cache import KeyValueCache
from glasslm.engines.torch.layers import widened
from glasslm.engines.torch.model import Transformer
from glasslm.engines.torch.moe import Routing
from glasslm.engines.torch.optimizer import Optimizer, cut_like, whole
from glasslm.engines.torch.ranks import Ranks
from glasslm.errors import InputError
from glasslm.model.parameters import parameter_table
from glasslm.text import one_line

Array = NDArray[Any]

COMPUTE: dict[str, torch.dtype] = {
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
GROWTH_INTERVAL = 2000  # updates between attempts at a larger scale of float16's losses
LARGEST_SCALE, SMALLEST_SCALE = 2.0**16, 2.0  # 1 is for the other precisions


@contextmanager
def no_denormals() -> Iterator[None]:
    """Gradients of text learnt by heart underflow, and a CPU takes 30 times as long for numbers that small.

    It holds for the calling thread and for threads that begin meanwhile: PyTorch's own begin with the first large sum.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # it holds for all of this thread, which is not ours alone


@contextmanager
def memory_errors() -> Iterator[None]:
    """What PyTorch says when memory is full, on whatever device, as Python's MemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError from None
    except RuntimeError as error:  # the allocator of CPUs has words of its own on each system
        if "DefaultCPUAllocator" in str(error) or "out of memory" in str(error):
            raise MemoryError from None
        raise


@contextmanager
def compiler_errors() -> Iterator[None]:
    """A compiler that is there and does not work is told in one line."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        lines = [
            line
            for line in str(error).splitlines()
            if line.strip() and not line.endswith("raised:")
        ]
        why = one_line(lines[0]) if lines else type(error).__name__
        raise InputError(
            f"torch.compile does not work here ({why}): use --compile off, or see to it"
        ) from error


class TorchEngine:
    """`config` must be resolved. Weights are zero until `load`."""

    name: EngineName = "torch"

    @memory_errors()
    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        *,
        device: DeviceName,
        precision: Precision,
        threads: int = 0,
        compiled: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        with no_denormals():
            if threads:
                torch.set_num_threads(threads)
            torch.zeros(1 << 20).sum()  # so that all threads begin without denormals
        self.config, self.precision, self.ranks, self.compiled = config, precision, ranks, compiled
        self.device, self.place = device, torch.device(ranks.place(device) if ranks else device)
        self.vocab_size, self.updates = vocab_size, 0
        self.loss_scale = LARGEST_SCALE if precision == "fp16" else 1.0
        self.rows = parameter_table(config.model, vocab_size)
        self.exact = (
            torch.float64 if precision == "fp64" else torch.float32
        )  # of weights, gradients and moments
        self.model = Transformer(config.model, vocab_size, COMPUTE[precision]).to(
            self.place, self.exact
        )
        self._zero()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.rows[name].trained)
        if compiled:
            for block in self.model.blocks:
                block.compile()  # in place, so that no name changes; they are alike, and one compilation serves all
        self.average: Transformer | None = None  # of the weights as they were
        if config.optimizer.ema:
            self.average = Transformer(config.model, vocab_size, COMPUTE[precision]).to(
                self.place, self.exact
            )
            self.average.requires_grad_(False)
        self.used = self.average or self.model  # by all but training
        self.coefficients = coefficients(config)
        self.forward: Callable[..., Any] = (
            ranks.spread(self.model, self.place) if ranks else self.model
        )
        self.micro_batch_size = micro_batch_size(config, "torch")
        self.rows_at_once = self.micro_batch_size * (ranks.size if ranks else 1)

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """By the table's names."""
        found = dict(self.model.named_parameters())
        assert set(found) == set(self.rows), "the modules are not named as the table is"
        return found

    @cached_property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Those that training changes."""
        return {
            name: parameter
            for name, parameter in self.parameters.items()
            if self.rows[name].trained
        }

    @cached_property
    @memory_errors()
    def optimizer(self) -> Optimizer:
        """Made when training starts; inference needs none."""
        return Optimizer(self.trained, self.rows, self.config.optimizer)

    @torch.no_grad()
    def _zero(self) -> None:
        for parameter in self.model.parameters():
            parameter.zero_()

    @compiler_errors()
    @memory_errors()
    @no_denormals()
    def accumulate(self, batch: Batch, weight: float) -> Losses:
        mine = np.arange(len(batch.tokens))[self.ranks.mine if self.ranks else slice(None)]
        # DDP and FSDP give the mean of the ranks' gradients: here each rank's is a part of one sum.
        scale = weight * self.loss_scale * (self.ranks.size if self.ranks else 1)
        exact = torch.float64 if self.place.type != "mps" else torch.float32
        sums = [
            torch.zeros((), dtype=exact, device=self.place)
            for _ in range(1 + len(self.coefficients))
        ]
        use = torch.zeros(
            self.config.model.n_layers, self.config.model.n_experts, device=self.place
        )
        for start in range(0, len(mine), self.micro_batch_size):
            part = mine[start : start + self.micro_batch_size]
            last = start + self.micro_batch_size >= len(mine)
            with self.ranks.synchronising(self.forward, last) if self.ranks else nullcontext():
                terms, routings = self._terms(*self._inputs(batch, part))
                (self._objective(terms) * scale).backward()  # type: ignore[no-untyped-call]
            for total, term in zip(sums, terms):
                total += term.detach()
            for layer, routing in enumerate(routings):
                use[layer] += routing.use
        if self.ranks:
            for total in (*sums, use):
                self.ranks.sum_(total)
        means = [weight * float(total) for total in sums]
        auxiliary = dict(zip(self.coefficients, means[1:]))
        return Losses(means[0], auxiliary, to_numpy(use) if self.config.model.n_experts else None)

    def _objective(self, terms: list[Tensor]) -> Tensor:
        return terms[0] + sum(
            times * term for times, term in zip(self.coefficients.values(), terms[1:])
        )

    def _terms(
        self,
        tokens: Tensor,
        targets: Tensor,
        keys: Tensor | None,
        forward: Callable[..., Any] | None = None,
    ) -> tuple[list[Tensor], list[Routing]]:
        """The sums over these rows (B, T) of what is minimised: the nats, then the terms in `coefficients`."""
        c, found = self.config.model, {}
        logits, routings = (forward or self.forward)(tokens, keys)
        logits, targets = widened(logits).flatten(0, 1), targets.flatten()
        valid = targets >= 0
        nats = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        if "smoothing" in self.coefficients:
            hit = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            found["smoothing"] = ((hit - logits.mean(-1)) * valid).sum()
        if "z" in self.coefficients:
            found["z"] = (torch.logsumexp(logits, -1).square() * valid).sum()
        if routings:
            each = (
                tokens.shape[1] / c.n_layers
            )  # a sequence counts as its targets do, and a layer as a part of all
            found["balance"] = each * torch.stack([routing.balance for routing in routings]).sum()
            found["router_z"] = each * torch.stack([routing.z for routing in routings]).sum()
        return [nats, *(found[name] for name in self.coefficients)], routings

    def _inputs(self, batch: Batch, part: Array) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens and targets (B, T) of some rows of the batch, and the dropout keys of all sites (sites, B)."""
        c, keys = self.config, None
        if c.model.dropout or c.model.attention_dropout:
            rows, sites = batch.rows[part], range(site(c.model.n_layers, 0) + 1)
            by_site = [row_keys(c.train.seed, batch.step, rows, place) for place in sites]
            keys = self._to_device(np.stack(by_site).view(np.int32))
        return self._to_device(batch.tokens[part]), self._to_device(batch.targets[part]), keys

    @memory_errors()
    @no_denormals()
    @torch.no_grad()
    def update(self, lr: float, skip_above: float = math.inf) -> Update:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        assert gradients, "update before accumulate"
        norm = float(whole(torch.nn.utils.get_total_norm(gradients))) / self.loss_scale
        finite = math.isfinite(norm)
        applied = finite and norm <= skip_above
        if applied:
            clip = self.config.optimizer.grad_clip
            factor = (min(1.0, clip / norm) if clip and norm else 1.0) / self.loss_scale
            if factor != 1:
                torch._foreach_mul_(gradients, factor)
            self.optimizer.step(lr)
            self.updates += 1
            if self.average is not None:
                share = 1 - decay_of_average(self.config.optimizer.ema, self.updates)
                torch._foreach_lerp_(
                    list(self.average.parameters()), list(self.parameters.values()), share
                )
        overflow = not finite and self.loss_scale > SMALLEST_SCALE
        if overflow:
            self.loss_scale /= 2
        elif self.precision == "fp16" and applied and self.updates % GROWTH_INTERVAL == 0:
            self.loss_scale = min(2 * self.loss_scale, LARGEST_SCALE)
        for parameter in self.parameters.values():
            parameter.grad = None
        return Update(norm, finite or overflow, applied)

    def gradients(self, batch: Batch, weight: float) -> dict[str, Array]:
        """The gradient that `accumulate` makes of a batch, by name; it is forgotten again."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.accumulate(batch, weight)
        found = {}
        for name, parameter in self.trained.items():
            assert parameter.grad is not None
            found[name] = to_numpy(whole(parameter.grad)) / self.loss_scale
            parameter.grad = None
        return found

    @memory_errors()
    @torch.no_grad()
    def losses(self, tokens: Array, targets: Array) -> Array:
        mine = np.arange(len(tokens))[self.ranks.mine if self.ranks else slice(None)]
        found = torch.zeros(tokens.shape, dtype=self.exact, device=self.place)
        rounds = math.ceil(
            len(tokens) / self.rows_at_once
        )  # the same on every rank, as FSDP's forward passes must be
        for index in range(rounds):
            part = mine[index * self.micro_batch_size : (index + 1) * self.micro_batch_size]
            some = part if len(part) else np.zeros(1, np.int64)
            with self._eagerly():
                logits, _ = self.used(self._to_device(tokens[some]))
            if len(part):
                hit = self._to_device(targets[part]).flatten()
                nats = F.cross_entropy(
                    widened(logits).flatten(0, 1), hit, ignore_index=-1, reduction="none"
                )
                found[torch.from_numpy(part).to(self.place)] = nats.view(len(part), -1).to(
                    self.exact
                )
        if self.ranks:
            self.ranks.sum_(found)
            self.ranks.reshard(self.model)
        return to_numpy(found)

    @memory_errors()
    @no_denormals()
    def inspect(self, batch: Batch, names: Iterable[str]) -> dict[str, Array]:
        names = list(names)
        require_known(names, self.config.model, self.rows)
        model = self.gathered(self.model)
        scale = self.loss_scale / max(1, int((batch.targets >= 0).sum()))
        tokens, targets = self._to_device(batch.tokens), self._to_device(batch.targets)
        with self._eagerly(), Look(model, names) as look:
            terms, _ = self._terms(tokens, targets, None, look.forward)
            wanted = [name for name in names if name.startswith(GRADIENT)]
            if wanted:
                places = look.streams | dict(model.named_parameters())
                of = [places[name.removeprefix(GRADIENT)] for name in wanted]
                found = torch.autograd.grad(self._objective(terms) * scale, of)
                look.found |= {name: widened(g) / self.loss_scale for name, g in zip(wanted, found)}
        return {name: to_numpy(widened(look.found[name])) for name in names}

    @memory_errors()
    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        model = self.gathered(self.used)
        return KeyValueCache(
            model, model.config, rows, capacity, model.embedding.weight.device, model.dtype
        )

    @torch.no_grad()
    def gathered(self, model: Transformer) -> Transformer:
        """`model` with all its weights on this rank: a copy, where it is cut over ranks. Every rank must ask."""
        if not (self.ranks and self.ranks.kind == "fsdp"):
            return model
        if self.ranks.rank > 0:  # it helps rank 0 and keeps nothing
            for name in self.rows:
                whole(self.parameters[name])
            return self.model
        model = Transformer(self.config.model, self.vocab_size, self.model.dtype).to(
            self.place, self.exact
        )
        weights = dict(model.named_parameters())
        for name in self.rows:
            weights[name].copy_(whole(self.parameters[name]))
        return model

    @memory_errors()
    @torch.inference_mode()
    def logits(
        self, tokens: Array, cache: KeyValueCache, counts: Array, every: bool = False
    ) -> Array:
        counts, model = np.asarray(counts, np.int64), cache.model
        assert isinstance(model, Transformer)
        reading = cache.reading(counts, tokens.shape[1])
        with self._eagerly():
            x, _ = model.hidden(self._to_device(tokens), reading=reading)
        if not every:
            last = self._to_device(np.maximum(counts - 1, 0))
            x = x[torch.arange(len(x), device=self.place), last]
        return to_numpy(widened(model.logits(x)))

    def state(self) -> Iterator[tuple[str, Array]]:
        for name, parameter in self.trained.items():
            yield name, to_numpy(whole(parameter.detach()))
        for name, moment in self.optimizer.moments.items():
            yield name, to_numpy(whole(moment))
        if self.average is not None:
            for name, parameter in self.average.named_parameters():
                if name in self.trained:
                    yield f"{AVERAGE}/{name}", to_numpy(parameter)

    @memory_errors()
    @torch.no_grad()
    def load(self, state: State, updates: int = 0, loss_scale: float = 1.0) -> None:
        weights, moments, averages = read_state(state, self.rows, self.config.optimizer)
        for name, parameter in self.parameters.items():
            self._fill(parameter, weights[name])
        if self.average is not None:
            for name, parameter in self.average.named_parameters():
                self._fill(parameter, averages.get(name, weights[name]))
        self.updates = updates
        if self.precision == "fp16":
            self.loss_scale = (
                loss_scale if loss_scale > 1 else LARGEST_SCALE
            )  # another precision came before
        if not moments and "optimizer" not in self.__dict__:
            return
        for name, moment in self.optimizer.moments.items():
            if name in moments:
                self._fill(moment, moments[name])
            else:
                moment.zero_()
        self.optimizer.resume(updates)

    def _fill(self, tensor: Tensor, array: Array) -> None:
        """All of `tensor`, or this rank's part, from the whole array."""
        exact = torch.from_numpy(np.ascontiguousarray(array)).to(
            self.exact
        )  # here: not every device knows float64
        tensor.copy_(cut_like(tensor, exact.to(self.place)))

    def _eagerly(self) -> AbstractContextManager[Any]:
        """Where shapes change from call to call, compiling would take longer than it saves."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _to_device(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self.place, non_blocking=True)


def make(
    config: RunConfig, vocab_size: int, compute: ComputeConfig, ranks: Ranks | None = None
) -> TorchEngine:
    """The engine that `compute`, with nothing left to choose, describes."""
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if compute.compile == "on" and (missing := hardware.compiler_missing(compute.device)):
        raise InputError(f"--compile on: {missing}: install it, or use --compile off")
    return TorchEngine(
        config,
        vocab_size,
        device=compute.device,
        precision=compute.precision,
        threads=compute.threads,
        compiled=compute.compile == "on",
        ranks=ranks,
    )


def to_numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()
