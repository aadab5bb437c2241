"""The operations of the model, each with its backward pass: `output, backward = op(inputs, ...)`.

`backward(d_output)` returns the gradients of the inputs in their order; docs/backward.md derives every one. What an op
keeps for its backward pass is what the inner function mentions. `new(shape)` is np.empty on an arena's memory. A
norm or an activation may write into the gradient it was given; `linear` and `dropout`, which end a sublayer, do not,
because the residual connection needs the same gradient.

Letters: N rows (tokens of a micro-batch), D width, F inner width, V vocabulary, O and I a matrix's output and input.
Scalars are Python floats throughout: a NumPy float64 scalar would turn float32 arrays into float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.dropout import mix, threshold

Array = NDArray[Any]
New = Callable[[tuple[int, ...]], Array]

EPS = 1e-5


def embedding(tokens: Array, table: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """tokens (N,), table (V, D) -> (N, D)."""
    out = np.take(table, tokens, axis=0, out=new((tokens.size, table.shape[1])), mode="clip")

    def backward(dout: Array) -> Array:
        dtable = new(table.shape)
        dtable[...] = 0
        # Rows of one token are summed as a run of neighbours; np.add.at takes seven times as long.
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
    """`linear` with a matrix that is not trained: backward gives dx alone."""
    N = x.shape[0]
    y = np.matmul(x, w.T, out=new((N, w.shape[0])))
    return y, lambda dy: np.matmul(dy, w, out=new((N, w.shape[1])))  # which keeps no x


def adapter(
    x: Array, a: Array, b: Array, scale: float, new: New
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """x (N, I), a (r, I), b (O, r) -> scale (x aᵀ) bᵀ (N, O). LoRA, arXiv:2106.09685, equation 3."""
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
    x: Array, gain: Array, new: New, eps: float = EPS
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """x (..., D) -> gain x / rms(x). Root mean square norm, arXiv:1910.07467, equation 4.

    gain has the shape of the last axes of x, (D,), or (heads, D) for the queries and keys of several heads.
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
        dgain = np.einsum(
            "nd,nd->d", dy.reshape(-1, gain.size), unit.reshape(-1, gain.size)
        ).reshape(gain.shape)
        dx = np.multiply(dy, gain, out=dy)  # so far the gradient of `unit`
        along = np.vecdot(dx, unit)[..., None]
        along *= 1 / D
        dx -= np.multiply(unit, along, out=new(unit.shape))
        dx *= rstd
        return dx, dgain

    return y, backward


def layer_norm(
    x: Array, gain: Array, bias: Array | None, new: New, eps: float = EPS
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """x (N, D), gain and bias (D,) -> gain (x - mean) / std + bias. arXiv:1607.06450."""
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
        along = np.vecdot(dx, unit)[..., None]
        along *= 1 / D
        dx -= dx.mean(-1, keepdims=True)
        dx -= np.multiply(unit, along, out=new(unit.shape))
        dx *= rstd
        return dx, dgain, dbias

    return y, backward


def gelu(x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """Gaussian error linear unit in its tanh form, arXiv:1606.08415: x (1 + tanh(k (x + c x³))) / 2, any shape."""
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


def silu(x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """Sigmoid linear unit: x s(x), with the sigmoid s(x) = (1 + tanh(x / 2)) / 2, any shape."""
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
ACTIVATIONS: dict[str, Unary] = {
    "swiglu": silu,
    "geglu": gelu,
    "gelu": gelu,
    "relu": relu,
    "relu2": relu2,
}


def gate(x: Array, activation: Unary, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """x (N, 2F), gates beside values -> activation(gates) values (N, F). arXiv:2002.05202."""
    F = x.shape[-1] // 2
    gates, values = x[:, :F], x[:, F:]
    opened, activation_back = activation(gates, new)
    y = np.multiply(opened, values, out=new(opened.shape))

    def backward(dy: Array) -> Array:
        dx = new(x.shape)
        np.multiply(dy, opened, out=dx[:, F:])
        dy *= values
        dx[:, :F] = activation_back(dy)
        return dx

    return y, backward


def dropout(
    x: Array, p: float, keys: NDArray[np.uint32], new: New
) -> tuple[Array, Callable[[Array], Array]]:
    """x (B x anything), keys (B,): zero a share p of the elements, and divide the rest by 1 - p. arXiv:1207.0580."""
    kept = dropout_mask(x.shape, p, keys, new)
    y = np.multiply(x, kept, out=new(x.shape))

    def backward(dy: Array) -> Array:
        return np.multiply(dy, kept, out=new(dy.shape))

    return y, backward


def dropout_mask(shape: tuple[int, ...], p: float, keys: NDArray[np.uint32], new: New) -> Array:
    """0 where an element is dropped, else 1 / (1 - p); elements are counted within each of the B rows."""
    mask = new(shape)
    element = np.arange(mask.size // keys.size, dtype=np.uint32)
    kept = mix(element[None] ^ keys[:, None]) >= np.uint32(threshold(p))
    return np.multiply(kept.reshape(shape), 1 / (1 - p), out=mask, dtype=mask.dtype)


def cross_entropy(
    logits: Array, targets: Array, new: New
) -> tuple[Array, Callable[[float], Array]]:
    """logits (N, V), targets (N,) -> (N,) nats, -log softmax(logits)[target], and 0 where the target is -1.

    backward(weight) is the gradient of weight x the sum of the nats.
    """
    N = targets.size
    rows = np.arange(N)
    valid = targets >= 0
    hit = np.where(valid, targets, 0)
    p = np.subtract(logits, logits.max(-1, keepdims=True), out=new(logits.shape))
    nats = -p[rows, hit]
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    nats += np.log(total[:, 0])
    nats *= valid

    def backward(weight: float) -> Array:
        dlogits = np.multiply(
            p, (weight * valid[:, None] / total).astype(p.dtype), out=new(p.shape)
        )
        dlogits[rows, hit] -= (weight * valid).astype(p.dtype)
        return dlogits

    return nats, backward


def smoothing(logits: Array, targets: Array, new: New) -> tuple[Array, Callable[[float], Array]]:
    """logits (N, V), targets (N,) -> (N,) the mean nats of all symbols less those of the target; 0 without a target.

    Label smoothing adds a share of it to the loss (arXiv:1512.00567, section 7). The softmax's sum is in both and
    cancels: what is left is the target's logit less the mean one.
    """
    (N, V), valid = logits.shape, targets >= 0
    rows, hit = np.arange(N), np.where(valid, targets, 0)
    nats = (logits[rows, hit] - logits.mean(-1)) * valid

    def backward(weight: float) -> Array:
        dlogits = new((N, V))
        dlogits[...] = (valid[:, None] * (-weight / V)).astype(dlogits.dtype)
        dlogits[rows, hit] += (weight * valid).astype(dlogits.dtype)
        return dlogits

    return nats, backward


def z_loss(logits: Array, targets: Array, new: New) -> tuple[Array, Callable[[float], Array]]:
    """logits (N, V), targets (N,) -> (N,) log² Z, which keeps softmax's sum Z near 1; 0 where there is no target.

    arXiv:2204.02311, section 5.
    """
    top = logits.max(-1, keepdims=True)
    p = np.subtract(logits, top, out=new(logits.shape))
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    log_z = (np.log(total) + top) * (targets >= 0)[:, None]

    def backward(weight: float) -> Array:
        return np.multiply(p, (2 * weight * log_z / total).astype(p.dtype), out=new(p.shape))

    return (log_z * log_z)[:, 0], backward


SOFTMAX_TERMS = {
    "smoothing": smoothing,
    "z": z_loss,
}  # what may be minimised beside the nats, by name
