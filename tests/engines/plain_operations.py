"""Every operation in plain NumPy, as a learner writes it."""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return p, lambda dy: p * (dy - (dy * p).sum(-1, keepdims=True))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    s = _sigmoid(x)
    return x * s, lambda dy: dy * (s + x * s * (1 - s))


def gelu(x):
    k = math.sqrt(2 / math.pi)
    t = np.tanh(k * (x + 0.044715 * x * x * x))
    return 0.5 * x * (
        1 + t
    ), lambda dy: dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x))


def relu(x):
    return np.maximum(x, 0), lambda dy: dy * (x > 0)


def relu2(x):
    p = np.maximum(x, 0)
    return p * p, lambda dy: dy * 2 * p


def linear(x, w):
    return x @ w.T, lambda dy: (dy @ w, dy.T @ x)


def embedding(tokens, table):
    def backward(dy):
        dtable = np.zeros_like(table)
        np.add.at(dtable, tokens, dy)
        return dtable

    return table[tokens], backward


def rms_norm(x, gain, eps=1e-5):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    u = x * r

    def backward(dy):
        du = dy * gain
        return r * (du - u * (du * u).mean(-1, keepdims=True)), (dy * u).sum(0)

    return u * gain, backward


def layer_norm(x, gain, bias, eps=1e-5):
    c = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + eps)
    u = c * r

    def backward(dy):
        du = dy * gain
        dx = r * (du - du.mean(-1, keepdims=True) - u * (du * u).mean(-1, keepdims=True))
        return dx, (dy * u).sum(0), dy.sum(0)

    return u * gain + bias, backward


def cross_entropy(logits, targets):
    p, _ = softmax(logits)
    rows = np.arange(len(targets))
    m = logits.max(-1, keepdims=True)
    nats = np.log(np.exp(logits - m).sum(-1)) + m[:, 0] - logits[rows, targets]

    def backward(weight):
        d = p.copy()
        d[rows, targets] -= 1
        return d * weight

    return nats, backward


def rope(x, cos, sin):
    c, s = cos[:, None, :], sin[:, None, :]

    def rotate(x, s):
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * c - b * s, a * s + b * c], -1)

    return rotate(x, s), lambda dy: rotate(dy, -s)


def attention(q, k, v):
    B, T, H, Q = q.shape
    K = k.shape[2]
    k2, v2 = (np.repeat(z, H // K, 2) for z in (k, v))
    scale = 1 / math.sqrt(Q)
    s = np.einsum("bthq,bshq->bhts", q, k2) * scale
    s[:, :, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    p, back = softmax(s)

    def backward(dy):
        dp = np.einsum("bthq,bshq->bhts", dy, v2)
        ds = back(dp) * scale
        dk = np.einsum("bhts,bthq->bshq", ds, q).reshape(B, T, K, H // K, Q).sum(3)
        dv = np.einsum("bhts,bthq->bshq", p, dy).reshape(B, T, K, H // K, Q).sum(3)
        return np.einsum("bhts,bshq->bthq", ds, k2), dk, dv

    return np.einsum("bhts,bshq->bthq", p, v2), backward


def adamw(p, g, m, v, *, t, lr, decay, betas, eps):
    m[...] = betas[0] * m + (1 - betas[0]) * g
    v[...] = betas[1] * v + (1 - betas[1]) * g * g
    p -= lr * decay * p
    p -= lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def sgd(p, g, m, *, lr, decay, momentum):
    m[...] = momentum * m + g
    p -= lr * decay * p
    p -= lr * m


def muon(p, g, m, *, lr, decay, momentum):
    m[...] = momentum * m + g
    x = m * momentum + g
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    p -= lr * decay * p
    p -= 0.2 * lr * math.sqrt(max(p.shape)) * x
