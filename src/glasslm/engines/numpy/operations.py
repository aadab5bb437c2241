"""The operations that the NumPy model computes with: its own, or those of a file in their place.

Each adapter below gives a function of a file (engines/operations.py) the signature of the engine's
operation: other shapes, the allocator `new`, and what the engine expects to be overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import RunConfig
from glasslm.engines.numpy.attention import split_heads, visible_keys
from glasslm.engines.numpy.ops import Array, New, dropout_mask
from glasslm.engines.operation_call import ArrayOperation, file_operations
from glasslm.engines.operations import OperationsFile, find_operations

Op = TypeVar("Op", bound=Callable[..., Any])


class Operations:
    """The operations of a model: `operations(ops.silu)` is ops.silu, or what replaces it."""

    def __init__(
        self,
        replaced: Mapping[str, Callable[..., Any]] | None = None,
        softmax: Callable[[Array], Array] | None = None,
    ) -> None:
        """`replaced`: operations with the signatures of the engine, by name.

        `softmax`: that of attention over the last axis, where it is replaced.
        """
        self.replaced = dict(replaced or {})
        self.softmax = softmax

    def __call__(self, op: Op) -> Op:
        """The operation in the place of `op`, with the same signature."""
        return self.replaced.get(op.__name__, op)  # type: ignore[return-value]

    @property
    def replaces_attention(self) -> bool:
        """Whether attention is replaced as a whole, and not its softmax alone."""
        return "attention" in self.replaced and self.softmax is None

    def __contains__(self, name: str) -> bool:
        """Whether the operation of this name is replaced."""
        return name in self.replaced


BUILT_IN = Operations()


def make_operations(config: RunConfig) -> Operations:
    """The operations of a config; InputError where its file is unknown or cannot be used here."""
    operations = find_operations(config)
    return _adapt(operations) if operations else BUILT_IN


def array_operations(operations: OperationsFile) -> Mapping[str, ArrayOperation]:
    """The operations of a file as functions of arrays, also where it takes tensors."""
    if not operations.uses_torch:
        return file_operations(operations)
    from glasslm.engines.torch.operations import as_array_operations

    return as_array_operations(operations)


def _adapt(operations: OperationsFile) -> Operations:
    """The operations of a file with the engine's signatures."""
    calls = array_operations(operations)
    adapted = {name: partial(ADAPTERS.get(name, _unary), call) for name, call in calls.items()}
    softmax = calls.get("softmax")
    if softmax is None or "attention" in adapted:
        return Operations(adapted)
    adapted["attention"] = partial(_attention_with_softmax, softmax)
    return Operations(adapted, lambda x: softmax(x)[0])


def _unary(op: ArrayOperation, x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    y, back = op(x, new=new)
    return y, lambda dy: back(dy)[0]


def _embedding(
    op: ArrayOperation, tokens: Array, table: Array, new: New
) -> tuple[Array, Callable[[Array], Array]]:
    y, back = op(tokens, table, new=new)
    return y, lambda dy: back(dy)[0]


def _linear(op: ArrayOperation, x: Array, w: Array, new: New) -> Any:
    return op(x, w, new=new)


def _rms_norm(op: ArrayOperation, x: Array, gain: Array, new: New, eps: float) -> Any:
    """With a gain (heads, Q), each head of x (B, T, heads, Q) is normalized by itself."""
    if gain.ndim == 1:
        return op(x, gain, new=new, eps=eps)
    heads, Q = gain.shape
    y, backs = new(x.shape), []
    for head in range(heads):
        part, back = op(x[..., head, :].reshape(-1, Q), gain[head], new=new, eps=eps)
        y[..., head, :] = part.reshape(*x.shape[:-2], Q)
        backs.append(back)

    def backward(dy: Array) -> tuple[Array, Array]:
        dx, dgain = new(x.shape), new(gain.shape)
        for head, back in enumerate(backs):
            part, dgain[head] = back(dy[..., head, :].reshape(-1, Q))
            dx[..., head, :] = part.reshape(*x.shape[:-2], Q)
        return dx, dgain

    return y, backward


def _layer_norm(
    op: ArrayOperation, x: Array, gain: Array, bias: Array | None, new: New, eps: float
) -> Any:
    return op(x, gain, np.zeros_like(gain) if bias is None else bias, new=new, eps=eps)


def _cross_entropy(
    op: ArrayOperation, logits: Array, targets: Array, new: New
) -> tuple[Array, Callable[[float], Array]]:
    """Rows with target -1 have no loss and never reach the operation."""
    valid = targets >= 0
    if valid.all():
        nats, back = op(logits, targets, new=new)
        return nats, lambda weight: back(weight)[0]
    some_nats, some_back = op(logits[valid], targets[valid], new=new)
    nats = np.zeros(targets.shape, logits.dtype)
    nats[valid] = some_nats

    def backward(weight: float) -> Array:
        dlogits = np.zeros_like(logits)
        dlogits[valid] = some_back(weight)[0]
        return dlogits

    return nats, backward


def _rope(
    op: ArrayOperation, x: Array, cos: Array, sin: Array, new: New
) -> tuple[Array, Callable[[Array], Array]]:
    """The engine's cos and sin are repeated for each head and half; backward overwrites dx."""
    half = x.shape[-1] // 2
    y, back = op(x, cos[:, 0, half:], sin[:, 0, half:], new=new)

    def backward(dx: Array) -> Array:
        (dx[...],) = back(dx)
        return dx

    return y, backward


def _attention(
    op: ArrayOperation,
    qk: Array,
    v: Array,
    bias: Array | None,
    drop: tuple[float, NDArray[np.uint32]] | None,
    new: New,
    window: int = 0,
    starts: NDArray[np.int64] | None = None,
) -> tuple[Array, Callable[[Array], Array]]:
    is_plain = bias is None and drop is None and starts is None and not window
    assert is_plain, "require_support lets this model through"
    H = qk.shape[2] - v.shape[2]
    out, back = op(qk[:, :, :H], qk[:, :, H:], v, new=new)
    return out, lambda dout: np.concatenate(back(dout), axis=2)


def _attention_with_softmax(
    op: ArrayOperation,
    qk: Array,
    v: Array,
    bias: Array | None,
    drop: tuple[float, NDArray[np.uint32]] | None,
    new: New,
    window: int = 0,
    starts: NDArray[np.int64] | None = None,
) -> tuple[Array, Callable[[Array], Array]]:
    """`attention` of attention.py from its definition; the softmax gets -inf for hidden keys."""
    B, T, K, Q = v.shape
    H = qk.shape[2] - K
    scale = 1 / math.sqrt(Q)
    q, k, values = (split_heads(x, K) for x in (qk[:, :, :H], qk[:, :, H:], v))
    scores = np.matmul(q, k.swapaxes(-1, -2)) * scale  # (B, K, G, T, T)
    if bias is not None:
        scores += bias.reshape(K, H // K, T, T)
    visible = visible_keys(T, scores.dtype, window, starts)
    scores[np.broadcast_to(visible == 0, scores.shape)] = -np.inf
    p, softmax_back = op(scores, new=new)
    mask = 1.0 if drop is None else dropout_mask(p.shape, *drop, new)
    out = new((B, T, H, Q))
    np.matmul(p * mask, values, out=split_heads(out, K))

    def backward(dout: Array) -> Array:
        dqkv = new((B, T, H + 2 * K, Q))
        douth = split_heads(dout, K)
        dv = np.matmul((p * mask).swapaxes(-1, -2), douth)
        (ds,) = softmax_back(np.matmul(douth, values.swapaxes(-1, -2)) * mask)
        ds *= scale
        split_heads(dqkv[:, :, :H], K)[...] = np.matmul(ds, k)
        dk = np.matmul(ds.swapaxes(-1, -2), q)
        for part, gradient in ((dqkv[:, :, H : H + K], dk), (dqkv[:, :, H + K :], dv)):
            split_heads(part, K)[...] = gradient.sum(2, keepdims=True)
        return dqkv

    return out, backward


def _optimizer(op: ArrayOperation, p: Array, g: Array, *moments: Array, **settings: Any) -> None:
    g *= settings.pop("scale")
    op.update(p, g, *moments, **settings)


ADAPTERS: dict[str, Callable[..., Any]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "cross_entropy": _cross_entropy,
    "rope": _rope,
    "attention": _attention,
    "adamw": _optimizer,
    "muon": _optimizer,
    "sgd": _optimizer,
}
