"""The gradient check's cases of single operations of the NumPy engine, with random inputs.

Each activation of `ops.ACTIVATIONS` has a case without an edit here. Any other op has a row in OPS.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines import positions
from glasslm.engines.dropout import row_keys
from glasslm.engines.numpy import attention, flash, moe, ops, soft_cap, softmax_terms

Array = NDArray[Any]
# The inputs by name, and a function that applies the op to them and returns its output and backward
# pass.
Case = tuple[dict[str, Array], Callable[[], tuple[Array, Callable[[Array], Any]]]]

MakeCase = Callable[[np.random.Generator], Case]

B, T, V = 2, 5, 7  # rows, positions, vocabulary
N, D, F = B * T, 6, 4  # tokens, width, inner width
H, K, Q = 4, 2, 4  # query heads, key-value heads, head size
R, E = 2, 4  # rank of an adapter, experts
NORM_EPS = 1e-5


def new(shape: tuple[int, ...]) -> Array:
    """An array of this shape full of NaN, as an op's `new`: no op may rely on its contents."""
    return np.full(shape, np.nan)


def _embedding(rng: np.random.Generator) -> Case:
    inputs = {"table": rng.standard_normal((V, D))}
    tokens = rng.integers(0, V - 1, N)  # the last symbol never occurs
    return inputs, lambda: ops.embedding(tokens, inputs["table"], new)


def _linear(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, D)), "w": rng.standard_normal((F, D))}
    return inputs, lambda: ops.linear(inputs["x"], inputs["w"], new)


def _frozen_linear(rng: np.random.Generator) -> Case:
    w, inputs = rng.standard_normal((F, D)), {"x": rng.standard_normal((N, D))}
    return inputs, lambda: ops.frozen_linear(inputs["x"], w, new)


def _adapter(rng: np.random.Generator) -> Case:
    inputs = {
        name: rng.standard_normal(shape)
        for name, shape in (("x", (N, D)), ("a", (R, D)), ("b", (F, R)))
    }
    return inputs, lambda: ops.adapter(inputs["x"], inputs["a"], inputs["b"], 0.7, new)


def _rms_norm(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, D)), "gain": rng.standard_normal(D)}
    return inputs, lambda: ops.rms_norm(inputs["x"], inputs["gain"], new, NORM_EPS)


def _rms_norm_heads(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((B, T, H, Q)), "gain": rng.standard_normal((H, Q))}
    return inputs, lambda: ops.rms_norm(inputs["x"], inputs["gain"], new, NORM_EPS)


def _layer_norm(rng: np.random.Generator) -> Case:
    inputs = {
        "x": rng.standard_normal((N, D)),
        "gain": rng.standard_normal(D),
        "bias": rng.standard_normal(D),
    }
    return inputs, lambda: ops.layer_norm(
        inputs["x"], inputs["gain"], inputs["bias"], new, NORM_EPS
    )


def _activation_case(name: str) -> MakeCase:
    def make(rng: np.random.Generator) -> Case:
        inputs = {"x": rng.standard_normal((N, F))}
        return inputs, lambda: getattr(ops, name)(inputs["x"], new)

    return make


def _gate(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, 2 * F))}
    # One activation is enough: every activation has a case of its own.
    return inputs, lambda: ops.gate(inputs["x"], ops.silu, new)


def _dropout(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, D))}
    keys = row_keys(0, 1, np.arange(B), 2)
    return inputs, lambda: ops.dropout(inputs["x"], 0.3, keys, new)


def _loss_case(module: ModuleType, name: str) -> MakeCase:
    def make(rng: np.random.Generator) -> Case:
        inputs = {"logits": rng.standard_normal((N, V))}
        targets = rng.integers(0, V, N)
        targets[3] = -1

        def run() -> tuple[Array, Callable[[Array], Array]]:
            values, backward = getattr(module, name)(inputs["logits"], targets, new)
            return np.sum(values, keepdims=True), lambda upstream: backward(float(upstream[0]))

        return inputs, run

    return make


def _route(rng: np.random.Generator) -> Case:
    """The gates (N, 2), flattened, followed by the two losses of a router."""
    inputs = {"logits": rng.standard_normal((N, E))}

    def run() -> tuple[Array, Callable[[Array], Array]]:
        gates, _, routing, backward = moe.route(inputs["logits"], 2, B, new)
        y = np.concatenate([gates.reshape(-1), np.array([routing.balance, routing.z], gates.dtype)])
        return y, lambda upstream: backward(
            upstream[:-2].reshape(gates.shape), *upstream[-2:].tolist()
        )

    return inputs, run


def _dispatch(rng: np.random.Generator) -> Case:
    """Experts of one matrix each; no token goes to the last one."""
    matrices, chosen = (
        rng.standard_normal((E, D, D)),
        rng.permuted(np.tile(np.arange(E - 1), (N, 1)), axis=1)[:, :2],
    )
    inputs = {"x": rng.standard_normal((N, D))}

    def expert(w: Array) -> moe.Expert:
        def compute(x: Array) -> tuple[Array, Callable[[Array, dict[str, Array]], Array]]:
            y, backward = ops.frozen_linear(x, w, new)
            return y, lambda dy, gradients: backward(dy)

        return compute

    def run() -> tuple[Array, Callable[[Array], Array]]:
        y, backward = moe.dispatch(inputs["x"], chosen, [expert(w) for w in matrices], new)
        return y, lambda upstream: backward(upstream, {})

    return inputs, run


def _rope(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((B, T, H, Q))}
    cos, sin = positions.rope_cos_sin(np.arange(T), H, Q, np.float64, "none", 1.0)
    return inputs, lambda: attention.rope(inputs["x"].copy(), cos, sin, new)  # overwritten


def _partial_rope(rng: np.random.Generator) -> Case:
    """Half of each head is rotated, with an amplitude as of YaRN."""
    inputs = {"x": rng.standard_normal((B, T, H, Q))}
    band = positions.Band(original=4.0, context=8.0, high=32.0)
    tables = positions.rope_cos_sin(np.arange(T), H, Q // 2, np.float64, "yarn", 2.0, 10.0, band)

    def run() -> tuple[Array, Callable[[Array], Array]]:
        x = inputs["x"].copy()
        _, part_back = attention.rope(x[..., : Q // 2], *tables, new)

        def backward(dy: Array) -> Array:
            part_back(dy[..., : Q // 2])
            return dy

        return x, backward

    return inputs, run


def _soft_cap(rng: np.random.Generator) -> Case:
    inputs = {"x": 2 * rng.standard_normal((N, F))}
    return inputs, lambda: soft_cap.soft_cap(inputs["x"].copy(), 1.5, new)  # overwritten


def _rms_norm_1p(rng: np.random.Generator) -> Case:
    inputs = {"x": rng.standard_normal((N, D)), "weight": rng.standard_normal(D)}
    return inputs, lambda: ops.rms_norm_1p(inputs["x"], inputs["weight"], new, NORM_EPS)


def _flash_case(scale: float, biased: bool, window: int) -> MakeCase:
    def make(rng: np.random.Generator) -> Case:
        def attend(qk: Array, v: Array) -> tuple[Array, Callable[[Array], Array]]:
            slopes = positions.alibi_slopes(H, v.dtype) if biased else None
            return flash.flash_attention(qk, v, slopes, window, new, tile=2)

        return _make_attention_case(scale, rng, attend)

    return make


def _attention_case(scale: float, biased: bool, dropping: bool) -> MakeCase:
    def make(rng: np.random.Generator) -> Case:
        bias = rng.standard_normal((H, T, T)) if biased else None
        drop = (0.3, row_keys(0, 1, np.arange(B), 2)) if dropping else None
        return _make_attention_case(
            scale, rng, lambda qk, v: attention.attention(qk, v, bias, drop, new)
        )

    return make


def _softcap_case(rng: np.random.Generator) -> Case:
    return _make_attention_case(
        2.0, rng, lambda qk, v: attention.attention(qk, v, None, None, new, softcap=1.5)
    )


def _make_attention_case(
    scale: float,
    rng: np.random.Generator,
    attend: Callable[[Array, Array], tuple[Array, Callable[[Array], Array]]],
) -> Case:
    """Attention over random qk (B, T, H + K, Q), which it may overwrite, and v (B, T, K, Q)."""
    inputs = {
        "qk": scale * rng.standard_normal((B, T, H + K, Q)),
        "v": rng.standard_normal((B, T, K, Q)),
    }

    def run() -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        y, backward = attend(inputs["qk"].copy(), inputs["v"])

        def split(upstream: Array) -> tuple[Array, Array]:
            dqkv = backward(upstream)
            return dqkv[:, :, : H + K], dqkv[:, :, H + K :]

        return y, split

    return inputs, run


OPS: dict[str, MakeCase] = {
    "embedding": _embedding,
    "linear": _linear,
    "frozen_linear": _frozen_linear,
    "adapter": _adapter,
    "rms_norm": _rms_norm,
    "rms_norm of heads": _rms_norm_heads,
    "rms_norm_1p": _rms_norm_1p,
    "layer_norm": _layer_norm,
    **{
        function.__name__: _activation_case(function.__name__)
        for function in ops.ACTIVATIONS.values()
    },
    "gate": _gate,
    "dropout": _dropout,
    "cross_entropy": _loss_case(ops, "cross_entropy"),
    "smoothing": _loss_case(softmax_terms, "smoothing"),
    "z_loss": _loss_case(softmax_terms, "z_loss"),
    "route": _route,
    "dispatch": _dispatch,
    "rope": _rope,
    "rope of half a head": _partial_rope,
    "soft_cap": _soft_cap,
    "attention": _attention_case(1.0, biased=False, dropping=False),
    "attention with bias": _attention_case(1.0, biased=True, dropping=False),
    "attention with dropout": _attention_case(1.0, biased=False, dropping=True),
    # Large scores take the branch that subtracts the maximum.
    "attention, large scores": _attention_case(12.0, biased=False, dropping=False),
    "attention with a soft cap": _softcap_case,
    "flash_attention": _flash_case(1.0, biased=False, window=0),
    "flash_attention with slopes and a window": _flash_case(1.0, biased=True, window=3),
    "flash_attention, large scores": _flash_case(12.0, biased=False, window=0),
}
