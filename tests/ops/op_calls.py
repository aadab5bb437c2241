"""A call of every function of glasslm.ops that has a gradient, on random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from glasslm import ops
from glasslm.config.schema import ModelConfig

Array = np.ndarray[Any, Any]
Inputs = dict[str, Array]
T, S, H, K, Q, R, D, F, V = 3, 4, 4, 2, 4, 3, 8, 5, 7
CONFIG = ModelConfig(d_model=D, n_heads=2, n_kv_heads=1, n_layers=2, d_ff=F, block_size=T)
TOKENS = np.array([3, 0, 3, 6, 1, 3, 2, 2])
MASK = np.array([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]], bool)


@dataclass(frozen=True)
class Call:
    """A function of glasslm.ops, the shapes of its float inputs after the leading axes, and a call.

    `shapes` come after the leading axes where the name ends with "...". `function` takes the inputs
    in their order.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    function: Callable[..., tuple[Array, Callable[[Array], Any]]]

    @property
    def has_leading_axes(self) -> bool:
        """Whether an input may have more axes."""
        return any(key.endswith("...") for key in self.shapes)

    def draw(self, lead: tuple[int, ...], dtype: Any = np.float64, seed: int = 0) -> Inputs:
        """Random inputs by name."""
        rng = np.random.default_rng(seed)
        return {
            key.removesuffix("..."): rng.standard_normal(
                (*lead, *shape) if key.endswith("...") else shape
            ).astype(dtype)
            for key, shape in self.shapes.items()
        }

    def run(self, inputs: Inputs) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
        """The output, and a backward function that returns the gradients by name."""
        y, backward = self.function(*inputs.values())

        def by_name(dy: Array) -> dict[str, Array]:
            gradients = backward(dy)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            return dict(zip(inputs, gradients, strict=True))

        return y, by_name


def tokens_like(lead: tuple[int, ...]) -> Array:
    """Tokens with this shape."""
    return np.resize(TOKENS, lead)


def _embed(table: Array) -> Any:
    return ops.embedding(TOKENS.reshape(2, 4), table)


def _cross_entropy(logits: Array) -> Any:
    return ops.cross_entropy(logits, tokens_like(logits.shape[:-1]))


def _rope(interleaved: bool) -> Any:
    def call(x: Array) -> Any:
        tables = ops.rope_tables(np.arange(2, 2 + T), Q, dtype=x.dtype)
        return ops.rope(x, *tables, interleaved=interleaved)

    return call


def _attend(**options: Any) -> Any:
    return lambda q, k, v: ops.attention(
        q,
        k,
        v,
        **{
            key: value.astype(q.dtype) if key == "bias" else value for key, value in options.items()
        },
    )


def _scaled(**options: Any) -> Any:
    return lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, **options)


def _block(names: list[str]) -> Any:
    def call(x: Array, *arrays: Array) -> Any:
        y, backward = ops.block(x, dict(zip(names, arrays, strict=True)), CONFIG)

        def split(dy: Array) -> Any:
            dx, gradients = backward(dy)
            return dx, *(gradients[name] for name in names)

        return y, split

    return call


def _transformer(*arrays: Array) -> Any:
    logits, backward = ops.transformer(
        tokens_like((2, T)), dict(zip(WEIGHTS, arrays, strict=True)), CONFIG
    )

    def split(dy: Array) -> Any:
        gradients = backward(dy)
        return tuple(gradients[name] for name in WEIGHTS)

    return logits, split


WEIGHTS = {name: array.shape for name, array in ops.initial_weights(CONFIG, V).items()}
BLOCK = {
    name.removeprefix("blocks.0."): shape
    for name, shape in WEIGHTS.items()
    if name.startswith("blocks.0.")
}
HEADS = {"q...": (T, H, Q), "k...": (T, K, Q), "v...": (T, K, Q)}
CROSS = {"q...": (T, H, Q), "k...": (S, K, Q), "v...": (S, K, Q)}
PAIRS = {"q...": (T, Q), "k...": (S, Q), "v...": (S, R)}
GATED = {"x...": (D,), "w_gate": (F, D), "w_up": (F, D), "w_down": (D, F)}
NORM = {"x...": (D,), "gain": (D,)}
ALIBI = ops.alibi_bias(H, T, np.float64)

CALLS = [
    Call("softmax", {"x...": (D,)}, ops.softmax),
    Call("softmax along an axis", {"x...": (S, D)}, lambda x: ops.softmax(x, -2)),
    *(Call(name, {"x...": ()}, getattr(ops, name)) for name in ("silu", "gelu", "relu", "relu2")),
    Call("linear", {"x...": (D,), "w": (F, D)}, ops.linear),
    Call("embedding", {"table": (V, D)}, _embed),
    Call("rms_norm", NORM, ops.rms_norm),
    Call("layer_norm", NORM | {"bias": (D,)}, ops.layer_norm),
    Call("swiglu", GATED, ops.swiglu),
    Call("geglu", GATED, ops.geglu),
    Call("dropout", {"x...": (D,)}, lambda x: ops.dropout(x, 0.3, seed=3)),
    Call("cross_entropy", {"logits...": (V,)}, _cross_entropy),
    Call("rope", {"x...": (T, H, Q)}, _rope(False)),
    Call("rope, interleaved", {"x...": (T, H, Q)}, _rope(True)),
    Call("attention", HEADS, ops.attention),
    Call("attention with a mask", CROSS, _attend(mask=MASK)),
    Call("attention with a bias", HEADS, _attend(bias=ALIBI)),
    Call("scaled_dot_product_attention", PAIRS, ops.scaled_dot_product_attention),
    Call("scaled_dot_product_attention with a mask", PAIRS, _scaled(mask=MASK)),
    Call("block", {"x...": (T, D), **BLOCK}, _block([*BLOCK])),
    Call("transformer", WEIGHTS, _transformer),
]
LEADS = [(), (3,), (2, 3), (2, 1, 2)]


def upstream(y: Array) -> Array:
    """A gradient of y: fixed numbers of its shape and type."""
    return np.sin(1 + np.arange(y.size)).reshape(y.shape).astype(y.dtype)


def loss(y: Array) -> float:
    """The number whose gradient by y is `upstream(y)`."""
    return math.fsum((y * upstream(y)).reshape(-1).tolist())
