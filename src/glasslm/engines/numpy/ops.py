"""The operations of the model, each with its backward pass: `output, backward = op(inputs, ...)`.

`backward(d_output)` returns the gradients of the inputs in their order; docs/backward.md derives
every one. An op keeps for its backward pass the arrays that the inner function mentions.
`new(shape)` is np.empty on the memory of a buffer pool. Each docstring says what an op overwrites;
an op without such a sentence overwrites nothing. `linear` and `dropout` must never overwrite the
gradient that they are given: they end a sublayer, and the residual connection reads the same
gradient.

Letters: N rows (tokens of a micro-batch), D width, F inner width, V vocabulary, O and I output and
input of a matrix. Scalars are Python floats: a NumPy float64 scalar would promote float32 arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import FeedForward, Norm
from glasslm.engines.dropout import drop_threshold, mix_bits

HASHES_AT_ONCE = 1 << 15  # of a mask of dropout: few enough for the second-level cache

Array = NDArray[Any]
New = Callable[[tuple[int, ...]], Array]


def embedding(tokens: Array, table: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """tokens (N,), table (V, D) -> the rows of the tokens (N, D)."""
    out = np.take(table, tokens, axis=0, out=new((tokens.size, table.shape[1])), mode="clip")

    def backward(dout: Array) -> Array:
        dtable = new(table.shape)
        dtable[...] = 0
        # Rows of one token are summed as a run of neighbours: np.add.at takes 7 times as long.
        order = np.argsort(tokens, kind="stable")
        ordered = tokens[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        dtable[ordered[starts]] = np.add.reduceat(np.take(dout, order, axis=0), starts, axis=0)
        return dtable

    return out, backward


def linear(x: Array, w: Array, new: New) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """x (N, I), w (O, I) -> x wᵀ (N, O)."""
    y = np.matmul(x, w.T, out=new((x.shape[0], w.shape[0])))

    def backward(dy: Array) -> tuple[Array, Array]:
        dx = np.matmul(dy, w, out=new(x.shape))
        dw = np.matmul(dy.T, x, out=new(w.shape))
        return dx, dw

    return y, backward


def frozen_linear(x: Array, w: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """x (N, I), w (O, I) -> x wᵀ (N, O), with a matrix that is not trained: backward returns dx."""
    N = x.shape[0]
    y = np.matmul(x, w.T, out=new((N, w.shape[0])))
    return y, lambda dy: np.matmul(dy, w, out=new((N, w.shape[1])))  # keeps no x


def adapter(
    x: Array, a: Array, b: Array, scale: float, new: New
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """x (N, I), a (r, I), b (O, r) -> scale (x aᵀ) bᵀ (N, O). arXiv:2106.09685, equation 3."""
    inner = np.matmul(x, a.T, out=new((x.shape[0], a.shape[0])))
    inner *= scale
    y = np.matmul(inner, b.T, out=new((x.shape[0], b.shape[0])))

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        db = np.matmul(dy.T, inner, out=new(b.shape))
        dinner = np.matmul(dy, b, out=new(inner.shape))
        dinner *= scale
        da = np.matmul(dinner.T, x, out=new(a.shape))
        return np.matmul(dinner, a, out=new(x.shape)), da, db

    return y, backward


def rms_norm(
    x: Array, gain: Array, new: New, eps: float
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """x (..., D) -> gain x / rms(x) (..., D). arXiv:1910.07467, equation 4.

    gain has the shape of the last axes of x: (D,), or (heads, D) for the queries and keys of
    several heads. backward overwrites dy.
    """
    D = x.shape[-1]
    rstd = np.vecdot(x, x)[..., None]
    rstd *= 1 / D
    rstd += eps
    np.sqrt(rstd, out=rstd)
    np.reciprocal(rstd, out=rstd)
    unit = np.multiply(x, rstd, out=new(x.shape))
    y = np.multiply(unit, gain, out=new(x.shape))

    def backward(dy: Array) -> tuple[Array, Array]:
        rows = (-1, gain.size)
        dgain = np.einsum("nd,nd->d", dy.reshape(rows), unit.reshape(rows)).reshape(gain.shape)
        dx = np.multiply(dy, gain, out=dy)  # so far the gradient of `unit`
        component = np.vecdot(dx, unit)[..., None]
        component *= 1 / D
        dx -= np.multiply(unit, component, out=new(unit.shape))
        dx *= rstd
        return dx, dgain

    return y, backward


def rms_norm_1p(
    x: Array, w: Array, new: New, eps: float
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """x (..., D) -> (1 + w) x / rms(x) (..., D), as in Gemma. backward overwrites dy."""
    return rms_norm(x, w + 1, new, eps)


def layer_norm(
    x: Array, gain: Array, bias: Array | None, new: New, eps: float
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """x (N, D), gain and bias (D,) -> gain (x - mean) / std + bias (N, D). arXiv:1607.06450.

    backward overwrites dy, and returns the gradient of the bias even if there is none.
    """
    D = x.shape[-1]
    mean = x.mean(-1, keepdims=True)
    unit = np.subtract(x, mean, out=new(x.shape))
    rstd = np.vecdot(unit, unit)[..., None]
    rstd *= 1 / D
    rstd += eps
    np.sqrt(rstd, out=rstd)
    np.reciprocal(rstd, out=rstd)
    unit *= rstd
    y = np.multiply(unit, gain, out=new(x.shape))
    if bias is not None:
        y += bias

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        dbias = dy.sum(0)
        dgain = np.einsum("nd,nd->d", dy, unit)
        dx = np.multiply(dy, gain, out=dy)
        component = np.vecdot(dx, unit)[..., None]
        component *= 1 / D
        dx -= dx.mean(-1, keepdims=True)
        dx -= np.multiply(unit, component, out=new(unit.shape))
        dx *= rstd
        return dx, dgain, dbias

    return y, backward


def _no_norm(x: Array, new: New, eps: float) -> tuple[Array, Callable[[Array], tuple[Array]]]:
    return x, lambda dy: (dy,)


class NormOp(NamedTuple):
    """A norm as the model calls it: `op(x, *parameters, new, eps)` with x (N, D) -> (N, D).

    `parameters` are the last words of the names of its rows in the parameter table. op gets None
    for a row that the table does not have, such as the bias. backward: dy -> dx and the gradients
    of the parameters, in this order.
    """

    op: Callable[..., tuple[Array, Callable[[Array], tuple[Array, ...]]]]
    parameters: tuple[str, ...]


NORMS: dict[Norm, NormOp] = {
    "rmsnorm": NormOp(rms_norm, ("weight",)),
    "layernorm": NormOp(layer_norm, ("weight", "bias")),
    "rmsnorm1p": NormOp(rms_norm_1p, ("weight",)),
    "none": NormOp(_no_norm, ()),
}


def gelu(x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """x (1 + tanh(k (x + c x³))) / 2, any shape: the tanh form of GELU. arXiv:1606.08415."""
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = np.multiply(x, x, out=new(x.shape))
    t *= c * k
    t += k
    t *= x
    np.tanh(t, out=t)
    y = np.add(t, 1, out=new(x.shape))
    y *= x
    y *= 0.5

    def backward(dy: Array) -> Array:
        # dy (1 + t + x (1 - t²) k (1 + 3 c x²)) / 2
        inner = np.multiply(x, x, out=new(x.shape))
        inner *= 3 * c * k
        inner += k
        inner *= x
        slope = np.multiply(t, t, out=new(x.shape))
        np.subtract(1, slope, out=slope)
        inner *= slope
        inner += t
        inner += 1
        inner *= 0.5
        inner *= dy
        return inner

    return y, backward


def gelu_exact(x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """x (1 + erf(x / sqrt(2))) / 2, any shape: x times the normal cdf. arXiv:1606.08415."""
    from scipy.special import erf

    cdf = np.multiply(x, math.sqrt(0.5), out=new(x.shape))
    erf(cdf, out=cdf)
    cdf += 1
    cdf *= 0.5
    y = np.multiply(x, cdf, out=new(x.shape))

    def backward(dy: Array) -> Array:
        # dy (cdf + x pdf), where pdf = exp(-x² / 2) / sqrt(2 pi)
        slope = np.multiply(x, x, out=new(x.shape))
        slope *= -0.5
        np.exp(slope, out=slope)
        slope *= 1 / math.sqrt(2 * math.pi)
        slope *= x
        slope += cdf
        slope *= dy
        return slope

    return y, backward


def silu(x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """x s(x), any shape, with the sigmoid s(x) = (1 + tanh(x / 2)) / 2. arXiv:1702.03118."""
    s = np.multiply(x, 0.5, out=new(x.shape))
    np.tanh(s, out=s)
    s += 1
    s *= 0.5
    y = np.multiply(x, s, out=new(x.shape))

    def backward(dy: Array) -> Array:
        slope = np.subtract(1, s, out=new(s.shape))  # dy (s + y (1 - s))
        slope *= y
        slope += s
        slope *= dy
        return slope

    return y, backward


def relu(x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """max(x, 0), any shape; the slope at 0 is 0."""
    y = np.maximum(x, 0, out=new(x.shape))

    def backward(dy: Array) -> Array:
        return np.multiply(dy, y > 0, out=new(y.shape))

    return y, backward


def relu2(x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """max(x, 0)², any shape. arXiv:2109.08668."""
    positive = np.maximum(x, 0, out=new(x.shape))
    y = np.multiply(positive, positive, out=new(x.shape))

    def backward(dy: Array) -> Array:
        dx = np.multiply(positive, 2, out=new(dy.shape))
        dx *= dy
        return dx

    return y, backward


Unary = Callable[[Array, New], tuple[Array, Callable[[Array], Array]]]
# The activation of each kind of feed-forward. The words, and which of them are gated, are in
# config/model_config.py; the same table for PyTorch is in engines/torch/layers.py.
ACTIVATIONS: dict[FeedForward, Unary] = {
    "swiglu": silu,
    "geglu": gelu,
    "geglu_exact": gelu_exact,
    "gelu": gelu,
    "gelu_exact": gelu_exact,
    "relu": relu,
    "relu2": relu2,
}


def gate(x: Array, activation: Unary, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """x (N, 2F), F gates followed by F values -> activation(gates) values (N, F).

    arXiv:2002.05202. backward overwrites dy.
    """
    F = x.shape[-1] // 2
    gates, values = x[:, :F], x[:, F:]
    activated, activation_back = activation(gates, new)
    y = np.multiply(activated, values, out=new(activated.shape))

    def backward(dy: Array) -> Array:
        dx = new(x.shape)
        np.multiply(dy, activated, out=dx[:, F:])
        dy *= values
        dx[:, :F] = activation_back(dy)
        return dx

    return y, backward


def dropout(
    x: Array, p: float, keys: NDArray[np.uint32], new: New
) -> tuple[Array, Callable[[Array], Array]]:
    """x (any shape of B equal parts), keys (B,) -> x, a share p of it zero, the rest / (1 - p).

    arXiv:1207.0580.
    """
    mask = dropout_mask(x.shape, p, keys, new)
    y = np.multiply(x, mask, out=new(x.shape))

    def backward(dy: Array) -> Array:
        return np.multiply(dy, mask, out=new(dy.shape))

    return y, backward


def dropout_mask(shape: tuple[int, ...], p: float, keys: NDArray[np.uint32], new: New) -> Array:
    """The mask of dropout, of this shape: 0 where an element is dropped, else 1 / (1 - p).

    keys (B,): the shape consists of B equal parts, and the elements of each are numbered from 0.
    """
    mask = new(shape)
    rows = mask.reshape(keys.size, -1)
    element = np.arange(rows.shape[1], dtype=np.uint32)
    width = max(1, HASHES_AT_ONCE // keys.size)
    for first in range(0, element.size, width):
        part = slice(first, first + width)
        hashes = mix_bits(element[part] ^ keys[:, None])
        is_kept = hashes >= np.uint32(drop_threshold(p))
        np.multiply(is_kept, 1 / (1 - p), out=rows[:, part], dtype=mask.dtype)
    return mask


def cross_entropy(
    logits: Array, targets: Array, new: New
) -> tuple[Array, Callable[[float], Array]]:
    """logits (N, V), targets (N,) -> (N,) nats, -log softmax(logits)[target]; 0 for target -1.

    backward(weight) returns the gradient of weight x the sum of the nats, (N, V).
    """
    N = targets.size
    rows = np.arange(N)
    valid = targets >= 0
    columns = np.where(valid, targets, 0)
    p = np.subtract(logits, logits.max(-1, keepdims=True), out=new(logits.shape))
    nats = -p[rows, columns]
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    nats += np.log(total[:, 0])
    nats *= valid

    def backward(weight: float) -> Array:
        factor = (weight * valid[:, None] / total).astype(p.dtype)
        dlogits = np.multiply(p, factor, out=new(p.shape))
        dlogits[rows, columns] -= (weight * valid).astype(p.dtype)
        return dlogits

    return nats, backward
