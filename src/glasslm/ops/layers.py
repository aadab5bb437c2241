"""The operations of a layer: matrices, tables, norms, activations, feed-forwards and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from glasslm.engines.dropout import row_keys
from glasslm.engines.numpy import ops
from glasslm.engines.numpy.ops import Array, New, Unary
from glasslm.engines.protocol import NO_TARGET
from glasslm.errors import InputError
from glasslm.ops.arguments import (
    as_array,
    read_arrays,
    read_gradient,
    read_ids,
    read_new,
    require_number,
    require_seed,
)

UnaryBackward = Callable[[Array], Array]


def softmax(x: Any, axis: int = -1, *, new: New | None = None) -> tuple[Array, UnaryBackward]:
    """Softmax along one axis: exp(x) / sum(exp(x)).

    The maximum is subtracted first, so that large x do not overflow.

    Args:
        x: (...), at least one axis.
        axis: The axis whose entries sum to 1.
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        y of the shape of x, and backward(dy) -> dx, both of the shape of x.

    Raises:
        InputError: x is not float32 or float64, has no such axis, or is -inf along the whole axis.

    >>> y, backward = softmax([[0.0, 0.0], [0.0, -np.inf]])
    >>> float(y[0, 0]), float(y[1, 0])
    (0.5, 1.0)
    """
    (x,) = read_arrays(x=(x, "..."))
    if (
        type(axis) is bool
        or not isinstance(axis, (int, np.integer))
        or not -x.ndim <= axis < x.ndim
    ):
        raise InputError(f"axis is {axis}: x has the shape {x.shape}, with {x.ndim} axes")
    top = x.max(axis, keepdims=True)
    if (top == -np.inf).any():
        raise InputError(
            f"x, with the shape {x.shape}, is -inf all along axis {axis}: softmax of it is not "
            "defined; leave one finite value"
        )
    y = np.subtract(x, top, out=read_new(new, x.dtype)(x.shape))
    np.exp(y, out=y)
    y /= y.sum(axis, keepdims=True)

    def backward(dy: Array) -> Array:
        dx = read_gradient(dy, y)
        dx -= (dx * y).sum(axis, keepdims=True)
        dx *= y
        return dx

    return y.copy(), backward


def silu(x: Any, *, new: New | None = None) -> tuple[Array, UnaryBackward]:
    """SiLU: x sigmoid(x). arXiv:1702.03118.

    x (...) -> y (...), and backward(dy) -> dx (...). Raises InputError unless x is float32 or
    float64.
    """
    return _activate(ops.silu, x, new)


def gelu(x: Any, *, new: New | None = None) -> tuple[Array, UnaryBackward]:
    """GELU in its tanh form. arXiv:1606.08415.

    x (...) -> y (...), and backward(dy) -> dx (...). Raises InputError unless x is float32 or
    float64.
    """
    return _activate(ops.gelu, x, new)


def relu(x: Any, *, new: New | None = None) -> tuple[Array, UnaryBackward]:
    """ReLU: max(x, 0), with the slope 0 at 0.

    x (...) -> y (...), and backward(dy) -> dx (...). Raises InputError unless x is float32 or
    float64.
    """
    return _activate(ops.relu, x, new)


def relu2(x: Any, *, new: New | None = None) -> tuple[Array, UnaryBackward]:
    """The square of ReLU: max(x, 0)². arXiv:2109.08668.

    x (...) -> y (...), and backward(dy) -> dx (...). Raises InputError unless x is float32 or
    float64.
    """
    return _activate(ops.relu2, x, new)


def _activate(op: Unary, x: Any, new: New | None) -> tuple[Array, UnaryBackward]:
    (x,) = read_arrays(x=(x, "..."))
    y, op_back = op(x.reshape(-1), read_new(new, x.dtype))
    y = y.reshape(x.shape)

    def backward(dy: Array) -> Array:
        return op_back(read_gradient(dy, x).reshape(-1)).reshape(x.shape)

    return y.copy(), backward


def linear(
    x: Any, w: Any, *, new: New | None = None
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """The product x wᵀ of a matrix that is stored (out, in).

    Args:
        x: (..., I).
        w: (O, I).
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        y (..., O), and backward(dy (..., O)) -> dx (..., I), dw (O, I).

    Raises:
        InputError: A shape does not fit, or an array is not float32 or float64.

    >>> y, backward = linear(np.ones((2, 3, 4)), np.ones((5, 4)))
    >>> y.shape
    (2, 3, 5)
    """
    x, w = read_arrays(x=(x, "... I"), w=(w, "O I"))
    y, op_back = ops.linear(x.reshape(-1, x.shape[-1]), w, read_new(new, x.dtype))
    y = y.reshape(*x.shape[:-1], len(w))

    def backward(dy: Array) -> tuple[Array, Array]:
        dx, dw = op_back(read_gradient(dy, y).reshape(-1, len(w)))
        return dx.reshape(x.shape), dw

    return y, backward


def embedding(tokens: Any, table: Any, *, new: New | None = None) -> tuple[Array, UnaryBackward]:
    """The rows of a table that belong to tokens.

    Args:
        tokens: (...), integers from 0 to V - 1.
        table: (V, D).
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        y (..., D), and backward(dy (..., D)) -> dtable (V, D): a row is the sum over its tokens.

    Raises:
        InputError: A token is outside the vocabulary, or table is not float32 or float64.
    """
    (table,) = read_arrays(table=(table, "V D"))
    tokens = read_ids("tokens", tokens, len(table))
    y, op_back = ops.embedding(tokens.reshape(-1), table, read_new(new, table.dtype))
    y = y.reshape(*tokens.shape, table.shape[1])
    return y, lambda dy: op_back(read_gradient(dy, y).reshape(-1, table.shape[1]))


def rms_norm(
    x: Any, gain: Any, eps: float = 1e-5, *, new: New | None = None
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """RMSNorm: gain x / sqrt(mean(x²) + eps), over the last axis. arXiv:1910.07467.

    x (..., D), gain (D,) -> y (..., D), and backward(dy) -> dx (..., D), dgain (D,). Raises
    InputError for shapes that do not fit, and types other than float32 and float64.
    """
    x, gain = read_arrays(x=(x, "... D"), gain=(gain, "D"))
    _require_eps(eps)
    rows = x.reshape(-1, len(gain))
    y, op_back = ops.rms_norm(rows, gain, read_new(new, x.dtype), float(eps))

    def backward(dy: Array) -> tuple[Array, Array]:
        dx, dgain = op_back(read_gradient(dy, x).reshape(rows.shape))
        return dx.reshape(x.shape), dgain

    return y.reshape(x.shape), backward


def layer_norm(
    x: Any, gain: Any, bias: Any, eps: float = 1e-5, *, new: New | None = None
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """LayerNorm: gain (x - mean) / sqrt(var + eps) + bias, over the last axis. arXiv:1607.06450.

    x (..., D), gain and bias (D,) -> y (..., D), and backward(dy) -> dx (..., D), dgain (D,),
    dbias (D,). Raises InputError for shapes that do not fit, and types other than float32 and
    float64.
    """
    x, gain, bias = read_arrays(x=(x, "... D"), gain=(gain, "D"), bias=(bias, "D"))
    _require_eps(eps)
    rows = x.reshape(-1, len(gain))
    y, op_back = ops.layer_norm(rows, gain, bias, read_new(new, x.dtype), float(eps))

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        dx, dgain, dbias = op_back(read_gradient(dy, x).reshape(rows.shape))
        return dx.reshape(x.shape), dgain, dbias

    return y.reshape(x.shape), backward


def _require_eps(eps: float) -> None:
    require_number("eps", eps, lambda x: 0 <= x < 1, "at least 0 and below 1, such as 1e-5")


FeedForwardBackward = Callable[[Array], tuple[Array, Array, Array, Array]]


def swiglu(
    x: Any, w_gate: Any, w_up: Any, w_down: Any, *, new: New | None = None
) -> tuple[Array, FeedForwardBackward]:
    """The SwiGLU feed-forward: w_down (silu(w_gate x) w_up x). arXiv:2002.05202.

    x (..., D), w_gate and w_up (F, D), w_down (D, F) -> y (..., D), and backward(dy) -> dx,
    dw_gate, dw_up, dw_down in the shapes of the inputs. Raises InputError for shapes that do not
    fit, and types other than float32 and float64.
    """
    return _gated_feedforward(ops.silu, x, w_gate, w_up, w_down, new)


def geglu(
    x: Any, w_gate: Any, w_up: Any, w_down: Any, *, new: New | None = None
) -> tuple[Array, FeedForwardBackward]:
    """The GEGLU feed-forward: w_down (gelu(w_gate x) w_up x). arXiv:2002.05202.

    x (..., D), w_gate and w_up (F, D), w_down (D, F) -> y (..., D), and backward(dy) -> dx,
    dw_gate, dw_up, dw_down in the shapes of the inputs. Raises InputError for shapes that do not
    fit, and types other than float32 and float64.
    """
    return _gated_feedforward(ops.gelu, x, w_gate, w_up, w_down, new)


def _gated_feedforward(
    activation: Unary, x: Any, w_gate: Any, w_up: Any, w_down: Any, new: New | None
) -> tuple[Array, FeedForwardBackward]:
    x, w_gate, w_up, w_down = read_arrays(
        x=(x, "... D"), w_gate=(w_gate, "F D"), w_up=(w_up, "F D"), w_down=(w_down, "D F")
    )
    F, D = w_gate.shape
    allocate = read_new(new, x.dtype)
    inner, up_back = ops.linear(x.reshape(-1, D), np.concatenate([w_gate, w_up]), allocate)
    h, gate_back = ops.gate(inner, activation, allocate)
    y, down_back = ops.linear(h, w_down, allocate)

    def backward(dy: Array) -> tuple[Array, Array, Array, Array]:
        dh, dw_down = down_back(read_gradient(dy, x).reshape(-1, D))
        dx, dw_gate_up = up_back(gate_back(dh))
        return dx.reshape(x.shape), dw_gate_up[:F].copy(), dw_gate_up[F:].copy(), dw_down

    return y.reshape(x.shape), backward


def dropout(x: Any, p: float, seed: int, *, new: New | None = None) -> tuple[Array, UnaryBackward]:
    """Set a share p of the elements to zero, and divide the others by 1 - p. arXiv:1207.0580.

    x (...) -> y (...), and backward(dy) -> dx (...). The same seed drops the same elements. Raises
    InputError unless 0 <= p < 1, 0 <= seed < 2**64, and x is float32 or float64.
    """
    (x,) = read_arrays(x=(x, "..."))
    require_number("p", p, lambda x: 0 <= x < 1, "at least 0 and below 1")
    require_seed(seed)
    keys = row_keys(int(seed), 0, np.zeros(1, np.int64), 0)
    y, op_back = ops.dropout(x.reshape(-1), float(p), keys, read_new(new, x.dtype))
    return y.reshape(x.shape), lambda dy: op_back(read_gradient(dy, x).reshape(-1)).reshape(x.shape)


def cross_entropy(
    logits: Any, targets: Any, *, new: New | None = None
) -> tuple[Array, Callable[..., Array]]:
    """The cross-entropy in nats of each target: -log softmax(logits)[target].

    The mean loss of a batch is `nats.mean()`, and its gradient `backward(1 / nats.size)`.

    Args:
        logits: (..., V).
        targets: (...), integers from 0 to V - 1; -1 is ignored: its nats are 0.
        new: Allocates arrays, `new(shape)`; np.empty by default.

    Returns:
        nats (...), and backward(weight) -> dlogits (..., V), the gradient of the sum of weight x
        nats. weight is a finite number, or one for each target (...).

    Raises:
        InputError: A target is outside the vocabulary, a shape does not fit, or logits are not
            float32 or float64.

    >>> nats, backward = cross_entropy(np.zeros((2, 3, 4)), np.zeros((2, 3), int))
    >>> dlogits = backward(1 / nats.size)
    >>> dlogits.shape
    (2, 3, 4)
    """
    (logits,) = read_arrays(logits=(logits, "... V"))
    V = logits.shape[-1]
    targets = read_ids("targets", targets, V, logits.shape[:-1], lowest=NO_TARGET)
    nats, op_back = ops.cross_entropy(
        logits.reshape(-1, V), targets.reshape(-1), read_new(new, logits.dtype)
    )
    nats = nats.reshape(targets.shape)

    def backward(weight: Any) -> Array:
        weights = as_array("weight", weight)
        if weights.ndim == 0:
            number = weights[()]
            expected = "finite, or an array of one for each target"
            require_number("weight", number, math.isfinite, expected)
            return op_back(float(number)).reshape(logits.shape)
        weights = read_gradient(weight, nats, "weight")
        return op_back(1.0).reshape(logits.shape) * weights[..., None]

    return nats.copy(), backward
