"""Recording activations of a PyTorch model, by the names of engines/inspection.py, with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glasslm.engines.inspection import REPLACED_ATTENTION, feedforward_names
from glasslm.engines.torch.attention import Attention, AttentionContext, scores_and_weights
from glasslm.engines.torch.model import Transformer
from glasslm.engines.torch.moe import Routing
from glasslm.errors import InputError


class ActivationRecorder:
    """Records what the model computes under `names` while the context is active.

    `activations` are detached copies by name. `streams` are the residual stream after the embedding
    and after each block, (B, T, D) each, with their graph, so that autograd can differentiate them.
    """

    def __init__(self, model: Transformer, names: Iterable[str]) -> None:
        self.model, self.names = model, frozenset(names)
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
            for mlp in feedforward_names(c, i):
                projection = modules[f"{mlp}.{'gate' if c.is_gated else 'up'}"]
                self._record_output(projection, f"{mlp}.preactivation")
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

    def _record(self, name: str, x: Tensor) -> None:
        if name in self.names:
            self.activations[name] = x.detach().clone()

    def _record_output(self, module: nn.Module, name: str, stream: bool = False) -> None:
        """Record the output of a module whenever it is called."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output  # without a Routing
            self._record(name, x)
            if stream:
                self.streams[name] = x

        self._hooks.append(module.register_forward_hook(hook))

    def _embedding_hook(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        self._record("embedding", x)
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
            tensors = scores_and_weights(q, k, context, module.operations.get("softmax"))
            for part, tensor in zip(("scores", "weights"), tensors):
                self._record(f"{name}.{part}", tensor)

        return hook
