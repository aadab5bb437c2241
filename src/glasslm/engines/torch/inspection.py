"""Recording and editing activations of a PyTorch model with hooks.

The names are those of engines/inspection.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glasslm.engines.inspection import REPLACED_ATTENTION, Edit, feedforward_names
from glasslm.engines.torch.attention import Attention, AttentionContext, scores_and_weights
from glasslm.engines.torch.model import Transformer
from glasslm.engines.torch.moe import Routing
from glasslm.errors import InputError


class ActivationRecorder:
    """Records what the model computes under `names` while the context is active.

    `edits` overwrite activations before they are recorded and used. `activations` are detached
    copies by name. `streams` are the residual stream after the embedding and after each block,
    (B, T, D) each, with their graph, so that autograd can differentiate them.
    """

    def __init__(
        self, model: Transformer, names: Iterable[str], edits: Sequence[Edit] = ()
    ) -> None:
        self.model, self.names, self.edits = model, frozenset(names), edits
        self.activations: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def forward(self, tokens: Tensor, keys: Tensor | None) -> tuple[Tensor, list[Routing]]:
        """Transformer.forward, with the logits recorded: tokens (B, T) -> logits (B, T, V)."""
        logits, routings = self.model(tokens, keys)
        self._record("logits", logits)
        return logits, routings

    def __enter__(self) -> ActivationRecorder:
        c, modules = self.model.config, dict(self.model.named_modules())
        for i in range(c.n_layers):
            self._record_output(modules[f"blocks.{i}"], f"blocks.{i}", stream=True)
            for sublayer in (f"blocks.{i}.attention", f"blocks.{i}.feedforward"):
                self._record_output(modules[sublayer], sublayer)
            attention = modules[f"blocks.{i}.attention"]
            hook = self._attention_hook(f"blocks.{i}.attention")
            self._hooks.append(attention.register_forward_pre_hook(hook))
            heads = (c.n_heads, c.head_size)
            self._record_input(
                modules[f"blocks.{i}.attention.o"], f"blocks.{i}.attention.heads", heads
            )
            for mlp in feedforward_names(c, i):
                projection = modules[f"{mlp}.{'gate' if c.is_gated else 'up'}"]
                self._record_output(projection, f"{mlp}.preactivation")
                self._record_input(modules[f"{mlp}.down"], f"{mlp}.activation")
        if c.has_final_norm:
            self._record_output(modules["norm"], "norm")
        self._hooks.append(modules["blocks.0"].register_forward_pre_hook(self._embedding_hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, name: str, x: Tensor) -> Tensor:
        """Record x (any shape), edited; returns the edited tensor."""
        for edit in self.edits:
            if edit.name == name:
                x = x.clone()
                x[edit.index] = torch.as_tensor(edit.value, dtype=x.dtype, device=x.device)
        if name in self.names:
            self.activations[name] = x.detach().clone()
        return x

    def _record_output(self, module: nn.Module, name: str, stream: bool = False) -> None:
        """Record the output of a module whenever it is called."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output  # without a Routing
            x = self._record(name, x)
            if stream:
                self.streams[name] = x
            return (x, *output[1:]) if isinstance(output, tuple) else x

        self._hooks.append(module.register_forward_hook(hook))

    def _record_input(self, module: nn.Module, name: str, last_axes: tuple[int, ...] = ()) -> None:
        """Record the input of a module whenever it is called; its last axis as `last_axes`."""

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = inputs[0]
            shape = (*x.shape[:-1], *(last_axes or x.shape[-1:]))
            x = self._record(name, x.view(shape)).view(x.shape)
            return (x, *inputs[1:])

        self._hooks.append(module.register_forward_pre_hook(hook))

    def _embedding_hook(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = self._record("embedding", inputs[0])
        if not x.requires_grad:  # embeddings are frozen when adapters are trained
            x = x.detach().requires_grad_()
        self.streams["embedding"] = x
        return (x, *inputs[1:])

    def _attention_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.names.isdisjoint((f"{name}.scores", f"{name}.weights")):
                return
            assert isinstance(module, Attention)
            x, context = inputs[0], inputs[1]
            assert isinstance(context, AttentionContext)
            if "attention" in module.operations:
                raise InputError(REPLACED_ATTENTION)
            q, k, _ = module.project_heads(x, context)
            context = context._replace(softcap=module.softcap)
            tensors = scores_and_weights(q, k, context, module.operations.get("softmax"))
            for part, tensor in zip(("scores", "weights"), tensors):
                self._record(f"{name}.{part}", tensor)

        return hook
