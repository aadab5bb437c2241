"""Looking inside a model in PyTorch: hooks that copy what engines/inspection.py has names for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glasslm.engines.inspection import feedforwards
from glasslm.engines.torch.attention import Attention, Place, scores_and_weights
from glasslm.engines.torch.model import Transformer
from glasslm.engines.torch.moe import Routing


class Look:
    """While it is entered, what `forward` computes under `names` goes into `found`, and the stream into `streams`."""

    def __init__(self, model: Transformer, names: Iterable[str]) -> None:
        self.model, self.names = model, frozenset(names)
        self.found: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}  # with their graph, so that gradients can be asked for
        self._hooks: list[RemovableHandle] = []

    def forward(self, tokens: Tensor, keys: Tensor | None) -> tuple[Tensor, list[Routing]]:
        logits, routings = self.model(tokens, keys)
        self._see("logits", logits)
        return logits, routings

    def __enter__(self) -> Look:
        c, modules = self.model.config, dict(self.model.named_modules())
        for i in range(c.n_layers):
            self._after(modules[f"blocks.{i}"], f"blocks.{i}", stream=True)
            for sublayer in (f"blocks.{i}.attention", f"blocks.{i}.feedforward"):
                self._after(modules[sublayer], sublayer)
            attention = modules[f"blocks.{i}.attention"]
            self._hooks.append(
                attention.register_forward_pre_hook(self._at_attention(f"blocks.{i}.attention"))
            )
            for mlp in feedforwards(c, i):
                self._after(modules[f"{mlp}.{'gate' if c.gated else 'up'}"], f"{mlp}.preactivation")
        if c.norm_position == "pre":
            self._after(modules["norm"], "norm")
        self._hooks.append(modules["blocks.0"].register_forward_pre_hook(self._before_blocks))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str, x: Tensor) -> None:
        if name in self.names:
            self.found[name] = x.detach().clone()

    def _after(self, module: nn.Module, name: str, stream: bool = False) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output  # beside what a router did
            self._see(name, x)
            if stream:
                self.streams[name] = x

        self._hooks.append(module.register_forward_hook(hook))

    def _before_blocks(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        self._see("embedding", x)
        if not x.requires_grad:  # embeddings are frozen under adapters
            x = x.detach().requires_grad_()
        self.streams["embedding"] = x
        return (x, *inputs[1:])

    def _at_attention(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.names.isdisjoint((f"{name}.scores", f"{name}.weights")):
                return
            assert isinstance(module, Attention)
            x, place = inputs[0], inputs[1]
            assert isinstance(place, Place)
            q, k, _ = module.heads_of(x, place)
            for part, tensor in zip(("scores", "weights"), scores_and_weights(q, k, place)):
                self._see(f"{name}.{part}", tensor)

        return hook
