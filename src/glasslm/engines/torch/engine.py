"""The PyTorch engine: the methods of engines/protocol.py with the model in model.py and autograd.

On several ranks every method is called on all of them at once with the same arguments, by
distributed.py, and each rank computes every size-th row.
Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasslm.config.schema import DeviceName, EngineName, Precision, RunConfig
from glasslm.engines.choice import resolve_micro_batch_size
from glasslm.engines.dropout import row_keys, site_number
from glasslm.engines.inspection import GRADIENT_PREFIX, Edit, require_edits, require_known_names
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.engines.objective import coefficients
from glasslm.engines.operation_call import call_site
from glasslm.engines.protocol import Batch, Losses, State, Update
from glasslm.engines.state import AVERAGE, average_decay, read_state
from glasslm.engines.token_ids import require_token_ids
from glasslm.engines.torch.errors import compiler_errors, memory_errors
from glasslm.engines.torch.hardware import flush_denormals, start_threads
from glasslm.engines.torch.inference import CPU_ROW_TILE, read_tokens
from glasslm.engines.torch.inspection import ActivationRecorder
from glasslm.engines.torch.kv_cache import KVCache
from glasslm.engines.torch.layers import to_numpy, upcast
from glasslm.engines.torch.model import Transformer
from glasslm.engines.torch.moe import Routing
from glasslm.engines.torch.objective import cross_entropy, loss_terms
from glasslm.engines.torch.operations import make_operations, require_gradients
from glasslm.engines.torch.optimizer import Optimizer, gather_shards, shard_like
from glasslm.engines.torch.precision import (
    TORCH_DTYPES,
    initial_loss_scale,
    master_dtype,
    muon_dtype,
    next_loss_scale,
)
from glasslm.engines.torch.ranks import RankGroup
from glasslm.model.parameters import parameter_table

Array = NDArray[Any]


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
        ranks: RankGroup | None = None,
        training: bool = True,
    ) -> None:
        """With `training` False, matrices are stored in the type of the activations."""
        start_threads(threads)
        self.config, self.precision, self.ranks, self.compiled = config, precision, ranks, compiled
        self.torch_device = torch.device(ranks.device_name(device) if ranks else device)
        self.device, self.vocab_size, self.updates = device, vocab_size, 0
        self.loss_scale = initial_loss_scale(precision)
        self.table = parameter_table(config.model, vocab_size)
        self.master_dtype = master_dtype(precision)
        self.operations = make_operations(config)
        self.stores_matrices_as = None if training else TORCH_DTYPES[precision]
        self.model = self._new_model()
        self._zero_weights()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.table[name].trained)
        if compiled:
            for block in self.model.blocks:
                block.compile()  # in place, so that names stay; equal blocks share one compilation
        self.average: Transformer | None = None  # the model with the moving average of the weights
        if config.optimizer.ema:
            self.average = self._new_model()
            self.average.requires_grad_(False)
        self.eval_model = self.average or self.model  # for everything except training
        self.coefficients = coefficients(config)
        self.forward: Callable[..., Any] = (
            ranks.wrap_model(self.model, self.torch_device) if ranks else self.model
        )
        self.micro_batch_size = resolve_micro_batch_size(config, "torch")
        self.rows_at_once = self.micro_batch_size * (ranks.size if ranks else 1)
        self.row_tile = CPU_ROW_TILE if device == "cpu" else 1

    def _new_model(self) -> Transformer:
        dtype = TORCH_DTYPES[self.precision]
        model = Transformer(self.config.model, self.vocab_size, dtype, self.operations)
        model.to(self.torch_device, self.master_dtype)
        for name, parameter in model.named_parameters():
            if self.stores_matrices_as is not None and self._is_narrow(name):
                parameter.data = parameter.data.to(self.stores_matrices_as)
        return model

    def _is_narrow(self, name: str) -> bool:
        """Whether a model that answers stores a weight in the type of the activations."""
        # The router computes in float32; untied embeddings meet positions or a scale in it.
        c, is_matrix = self.config.model, self.table.is_multiplied(name) and ".router." not in name
        is_changed = c.scale_embeddings or c.position in ("learned", "sinusoidal")
        return is_matrix or (name == "embedding.weight" and not is_changed)

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All weights by the table's names."""
        parameters = dict(self.model.named_parameters())
        assert set(parameters) == set(self.table), "the modules are not named as the table is"
        return parameters

    @cached_property
    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The weights that training changes, by name."""
        return {
            name: parameter
            for name, parameter in self.parameters.items()
            if self.table[name].trained
        }

    @cached_property
    @memory_errors()
    def optimizer(self) -> Optimizer:
        """Created when training starts, because inference needs no moments."""
        config, dtype = self.config.optimizer, muon_dtype(self.precision)
        parameters, table = self.trained_parameters, self.table
        return Optimizer(parameters, table, config, dtype, self.operations, self.updates)

    @torch.no_grad()
    def _zero_weights(self) -> None:
        for parameter in self.model.parameters():
            parameter.zero_()

    @compiler_errors()
    @memory_errors()
    @flush_denormals()
    def accumulate(self, batch: Batch, weight: float) -> Losses:
        """Engine.accumulate, of tokens and targets (B, T)."""
        require_token_ids(self.vocab_size, batch.tokens, batch.targets)
        indices = self._rank_indices(len(batch.tokens))
        # DDP and FSDP average the gradients of the ranks; here they are parts of one sum.
        scale = weight * self.loss_scale * (self.ranks.size if self.ranks else 1)
        sum_dtype = torch.float64 if self.torch_device.type != "mps" else torch.float32
        sums = [
            torch.zeros((), dtype=sum_dtype, device=self.torch_device)
            for _ in range(1 + len(self.coefficients))
        ]
        c = self.config.model
        expert_use = torch.zeros(c.n_layers, c.n_experts, device=self.torch_device)
        for start in range(0, len(indices), self.micro_batch_size):
            part = indices[start : start + self.micro_batch_size]
            last = start + self.micro_batch_size >= len(indices)
            sync = self.ranks.gradient_sync(self.forward, last) if self.ranks else nullcontext()
            with sync, call_site(f"step {batch.step + 1}"):
                tokens, targets, keys = self._inputs(batch, part)
                weights = self._target_weights(batch, part)
                terms, routings = self._loss_terms(tokens, targets, weights, keys, self.forward)
                (self._objective(terms) * scale).backward()  # type: ignore[no-untyped-call]
            for total, term in zip(sums, terms):
                total += term.detach()
            for layer, routing in enumerate(routings):
                expert_use[layer] += routing.use
        if self.ranks:
            for total in (*sums, expert_use):
                self.ranks.sum_(total)
        if self.operations:
            require_gradients(self.trained_parameters, self.config.operations.ops)
        means = [weight * float(total) for total in sums]
        auxiliary = dict(zip(self.coefficients, means[1:]))
        return Losses(means[0], auxiliary, to_numpy(expert_use) if c.n_experts else None)

    def _objective(self, terms: list[Tensor]) -> Tensor:
        return terms[0] + sum(
            coefficient * term for coefficient, term in zip(self.coefficients.values(), terms[1:])
        )

    def _loss_terms(
        self,
        tokens: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        keys: Tensor | None,
        forward: Callable[..., Any],
    ) -> tuple[list[Tensor], list[Routing]]:
        """The terms of the objective, summed over rows (B, T), and the routings."""
        logits, routings = forward(tokens, keys)
        terms = loss_terms(logits, targets, routings, self.coefficients, self.operations, weights)
        return terms, routings

    def _target_weights(self, batch: Batch, part: Array) -> Tensor | None:
        """The weights (B, T) of the targets in rows `part` (B,) of a batch that has some."""
        if batch.weights is None:
            return None
        # Cast here, because not every device has float64.
        dtype = np.float64 if self.precision == "fp64" else np.float32
        return self._to_device(batch.weights[part].astype(dtype))

    def _inputs(self, batch: Batch, part: Array) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens and targets (B, T) of rows `part` (B,) of a batch, and dropout keys (sites, B)."""
        c, keys = self.config, None
        if c.model.dropout or c.model.attention_dropout:
            rows, sites = batch.rows[part], range(site_number(c.model.n_layers, 0) + 1)
            by_site = [row_keys(c.train.seed, batch.step, rows, site) for site in sites]
            keys = self._to_device(np.stack(by_site).view(np.int32))
        return self._to_device(batch.tokens[part]), self._to_device(batch.targets[part]), keys

    def _rank_indices(self, rows: int) -> Array:
        """The indices of this rank's rows among `rows`."""
        return np.arange(rows)[self.ranks.row_slice if self.ranks else slice(None)]

    @memory_errors()
    @flush_denormals()
    @torch.no_grad()
    def update(self, lr: float, skip_above: float = math.inf) -> Update:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        assert gradients, "update before accumulate"
        norm = float(gather_shards(torch.nn.utils.get_total_norm(gradients))) / self.loss_scale
        finite = math.isfinite(norm)
        applied = finite and norm <= skip_above
        if applied:
            clip = self.config.optimizer.grad_clip
            factor = (min(1.0, clip / norm) if clip and norm else 1.0) / self.loss_scale
            if factor != 1:
                torch._foreach_mul_(gradients, factor)
            with call_site(f"update {self.updates + 1}"):
                self.optimizer.step(lr, self.updates + 1)
            self.updates += 1
            if self.average is not None:
                share = 1 - average_decay(self.config.optimizer.ema, self.updates)
                torch._foreach_lerp_(
                    list(self.average.parameters()), list(self.parameters.values()), share
                )
        scale = self.loss_scale
        self.loss_scale = next_loss_scale(scale, self.precision, self.updates, finite, applied)
        for parameter in self.parameters.values():
            parameter.grad = None
        return Update(norm, finite or self.loss_scale < scale, applied)

    def gradients(self, batch: Batch, weight: float) -> dict[str, Array]:
        """The gradient that `accumulate` computes, by name, in the shapes of the table.

        It discards gradients accumulated before, and its own.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        self.accumulate(batch, weight)
        gradients = {}
        for name, parameter in self.trained_parameters.items():
            assert parameter.grad is not None
            gradients[name] = to_numpy(gather_shards(parameter.grad)) / self.loss_scale
            parameter.grad = None
        return gradients

    @memory_errors()
    @torch.no_grad()
    def losses(self, tokens: Array, targets: Array) -> Array:
        """Engine.losses: tokens and targets (B, T) -> nats (B, T)."""
        require_token_ids(self.vocab_size, tokens, targets)
        indices = self._rank_indices(len(tokens))
        result = torch.zeros(tokens.shape, dtype=self.master_dtype, device=self.torch_device)
        # FSDP needs as many forward passes on every rank, so a rank without rows computes row 0.
        passes = math.ceil(len(tokens) / self.rows_at_once)
        for index in range(passes):
            part = indices[index * self.micro_batch_size : (index + 1) * self.micro_batch_size]
            input_rows = part if len(part) else np.zeros(1, np.int64)
            with self._without_compiling():
                logits, _ = self.eval_model(self._to_device(tokens[input_rows]))
            if len(part):
                flat_targets = self._to_device(targets[part]).flatten()
                flat_logits = upcast(logits).flatten(0, 1)
                nats = cross_entropy(flat_logits, flat_targets, self.operations)
                result[self._to_device(part)] = nats.view(len(part), -1).to(self.master_dtype)
        if self.ranks:
            self.ranks.sum_(result)
            self.ranks.reshard(self.model)
        return to_numpy(result)

    @memory_errors()
    @flush_denormals()
    def inspect(
        self, batch: Batch, names: Iterable[str], edits: Sequence[Edit] = ()
    ) -> dict[str, Array]:
        """Engine.inspect; engines/inspection.py lists names and shapes."""
        names = list(names)
        require_known_names(names, self.config.model, self.table)
        require_edits(edits, names, self.config.model)
        require_token_ids(self.vocab_size, batch.tokens, batch.targets)
        model = self.gather_weights(self.model)
        scale = self.loss_scale / max(1, int((batch.targets >= 0).sum()))
        tokens, targets = self._to_device(batch.tokens), self._to_device(batch.targets)
        with self._without_compiling(), ActivationRecorder(model, names, edits) as recorder:
            weights = self._target_weights(batch, np.arange(len(batch.tokens)))
            terms, _ = self._loss_terms(tokens, targets, weights, None, recorder.forward)
            arrays = recorder.activations
            gradient_names = [name for name in names if name.startswith(GRADIENT_PREFIX)]
            if gradient_names:
                tensors = recorder.streams | dict(model.named_parameters())
                inputs = [tensors[name.removeprefix(GRADIENT_PREFIX)] for name in gradient_names]
                gradients = torch.autograd.grad(self._objective(terms) * scale, inputs)
                for name, gradient in zip(gradient_names, gradients):
                    arrays[name] = upcast(gradient) / self.loss_scale
        return {name: to_numpy(upcast(arrays[name])) for name in names}

    @memory_errors()
    @torch.no_grad()
    def readout(self, stream: Array) -> Array:
        """Engine.readout: (N, D) -> (N, V)."""
        model = self.gather_weights(self.model)
        logits = model.readout(self._to_device(stream).to(model.dtype))
        return to_numpy(upcast(logits))

    @memory_errors()
    def new_cache(self, rows: int, capacity: int) -> KVCache:
        model = self.gather_weights(self.eval_model)
        device = model.embedding.weight.device
        keeps_queries = "attention" in self.operations
        return KVCache(model, model.config, rows, capacity, device, model.dtype, keeps_queries)

    @torch.no_grad()
    def gather_weights(self, model: Transformer) -> Transformer:
        """`model` with full weights on rank 0: a copy, if it is sharded. All ranks call it."""
        if not (self.ranks and self.ranks.kind == "fsdp"):
            return model
        if self.ranks.rank > 0:  # it takes part in the communication and stores nothing
            for name in self.table:
                gather_shards(self.parameters[name])
            return self.model
        model = self._new_model()
        weights = dict(model.named_parameters())
        for name in self.table:
            weights[name].copy_(gather_shards(self.parameters[name]))
        return model

    @memory_errors()
    @torch.inference_mode()
    def logits(self, tokens: Array, cache: KVCache, counts: Array, every: bool = False) -> Array:
        """Engine.logits: tokens (B, T), counts (B,) -> (B, V), or (B, T, V) with `every`."""
        require_token_ids(self.vocab_size, tokens)
        with self._without_compiling():
            return read_tokens(tokens, cache, np.asarray(counts, np.int64), every)

    def state(self) -> Iterator[tuple[str, Array]]:
        """Engine.state: arrays in the shapes of the table."""
        for name, parameter in self.trained_parameters.items():
            yield name, to_numpy(upcast(gather_shards(parameter.detach())))
        for name, moment in self.optimizer.moments.items():
            yield name, to_numpy(gather_shards(moment))
        if self.average is not None:
            for name, parameter in self.average.named_parameters():
                if name in self.trained_parameters:
                    yield f"{AVERAGE}/{name}", to_numpy(parameter)

    @memory_errors()
    @torch.no_grad()
    def load(self, state: State | LazyArrays, updates: int = 0, loss_scale: float = 1.0) -> None:
        """Engine.load, of arrays in the shapes of the table."""
        weights, moments, averages = read_state(state, self.table, self.config.optimizer)
        for name, parameter in self.parameters.items():
            self._copy(parameter, weights[name])
        if self.average is not None:
            for name, parameter in self.average.named_parameters():
                self._copy(parameter, averages.get(name, weights[name]))
        self.updates = updates
        self.loss_scale = initial_loss_scale(self.precision, loss_scale)
        if not moments and "optimizer" not in self.__dict__:
            return
        for name, moment in self.optimizer.moments.items():
            if name in moments:
                self._copy(moment, moments[name])
            else:
                moment.zero_()
        self.optimizer.resume(updates)

    def _copy(self, tensor: Tensor, array: Array) -> None:
        """Copy a full array into a tensor of its shape, or into this rank's shard of it."""
        # Converted on the CPU, because not every device has float64.
        source = torch.from_numpy(np.ascontiguousarray(array)).to(self.master_dtype)
        tensor.copy_(shard_like(tensor, source.to(self.torch_device)))

    def _without_compiling(self) -> AbstractContextManager[Any]:
        """A context for calls whose shapes differ: compiling would take longer than it saves."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _to_device(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self.torch_device, non_blocking=True)
