"""The layers that the sublayers of the NumPy model consist of: products, norms and dropout.

Letters: N rows, D width, I and O input and output of a matrix, H query heads, K key-value heads,
Q head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glasslm.config.schema import ModelConfig
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.forward_context import ForwardContext
from glasslm.engines.numpy.operations import Operations
from glasslm.engines.numpy.ops import Array, New
from glasslm.engines.numpy.weights import Weights

Gradients = dict[str, Array]
# Takes the gradient of the output, adds the gradients of weights by name, and returns the gradient
# of the input.
Backward = Callable[[Array, Gradients], Array]


class Layers:
    """The layers of a model, by the names of their weights."""

    def __init__(self, config: ModelConfig, weights: Weights, operations: Operations) -> None:
        self.config, self.weights, self.operations = config, weights, operations

    def _linear(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        """x (N, I) -> (N, O): a matrix, or a stack of several, with the biases of its parts."""
        if self.config.lora_rank:
            return self._linear_with_adapters(name, x, new)
        linear = self.operations(ops.linear)
        y, linear_back = linear(x, self.weights[f"{name}.weight"], new)
        biases = self._add_biases(name, y)

        def backward(dy: Array, gradients: Gradients) -> Array:
            for bias, columns in biases:
                gradients[bias] = dy[:, columns].sum(0)
            dx, gradients[f"{name}.weight"] = linear_back(dy)
            return dx

        return y, backward

    def _linear_with_adapters(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        """As _linear, with frozen weights plus the adapters of the parts that have one."""
        c, w = self.config, self.weights
        y, linear_back = ops.frozen_linear(x, w[f"{name}.weight"], new)
        self._add_biases(name, y)
        adapters = []
        for part, columns in w.parts(f"{name}.weight"):
            a, b = f"{part}.lora_a", f"{part}.lora_b"
            if a in w.arrays:
                added, adapter_back = ops.adapter(x, w[a], w[b], c.lora_alpha / c.lora_rank, new)
                y[:, columns] += added
                adapters.append((a, b, columns, adapter_back))

        def backward(dy: Array, gradients: Gradients) -> Array:
            dx = linear_back(dy)
            for a, b, columns, adapter_back in adapters:
                dx_adapter, gradients[a], gradients[b] = adapter_back(dy[:, columns])
                dx += dx_adapter
            return dx

        return y, backward

    def _add_biases(self, name: str, y: Array) -> list[tuple[str, slice]]:
        """Add to y (N, O) the biases of the parts of a stack; their names and columns."""
        w = self.weights
        biases = [
            (f"{part}.bias", columns)
            for part, columns in w.parts(f"{name}.weight")
            if f"{part}.bias" in w.arrays
        ]
        for bias, columns in biases:
            y[:, columns] += w[bias]
        return biases

    def _norm(self, name: str, x: Array, new: New) -> tuple[Array, Backward]:
        """x (N, D) -> (N, D): the norm of the config, with the weights `name` of the table."""
        norm = ops.NORMS[self.config.norm]
        keys = [f"{name}.{word}" for word in norm.parameters]
        parameters = [self.weights.arrays.get(key) for key in keys]
        apply_norm = self.operations(norm.op)
        y, norm_back = apply_norm(x, *parameters, new, self.config.norm_eps)

        def backward(dy: Array, gradients: Gradients) -> Array:
            dx, *dparameters = norm_back(dy)
            for key, gradient in zip(keys, dparameters):
                if key in self.weights.arrays:
                    gradients[key] = gradient
            return dx

        return y, backward

    def _dropout(
        self, x: Array, site: int, ctx: ForwardContext
    ) -> tuple[Array, Callable[[Array], Any]]:
        if not (self.config.dropout and ctx.dropout_keys):
            return x, lambda dy: dy
        return ops.dropout(x, self.config.dropout, ctx.dropout_keys(site), ctx.new)

    def qk_gain(self, prefix: str) -> Array:
        """(H + K, Q): the gain of the queries, then that of the keys, repeated for each head."""
        q, k = (self.head_gain(prefix, name) for name in ("q", "k"))
        return np.stack([q] * self.config.n_heads + [k] * self.config.n_kv_heads)

    def head_gain(self, prefix: str, name: str) -> Array:
        """(Q,): the gain of qk-norm for each head of the queries, "q", or the keys, "k"."""
        gain = self.weights[f"{prefix}.{name}_norm.weight"]
        return gain + 1 if self.config.norm == "rmsnorm1p" else gain
