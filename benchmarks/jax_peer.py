"""The rmsnorm + rope + swiglu model with tied embeddings in JAX, with AdamW, as one jitted step.

It needs jax, which is no dependency of glasslm: pip install jax. It uses the cores as jax does by
default: all of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glasslm.config.schema import ModelConfig

EPS = 1e-8  # of AdamW, as in PyTorch
Weights = dict[str, Any]


class JaxPeer:
    """A training step of the model that TorchPeer describes too."""

    def __init__(
        self,
        c: ModelConfig,
        arrays: dict[str, np.ndarray],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """`arrays`: the weights, named as in TorchPeer."""
        self.c, self.lr, self.betas, self.weight_decay = c, lr, betas, weight_decay
        weights: Weights = {name: jnp.asarray(array) for name, array in arrays.items()}
        m, v = jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, weights)
        self.state = (weights, m, v, jnp.zeros((), jnp.int32))
        angles = np.arange(c.block_size)[:, None] * 10000.0 ** (
            -np.arange(0, c.head_size, 2) / c.head_size
        )
        self.cos = jnp.asarray(np.cos(angles)[None, :, None], jnp.float32)
        self.sin = jnp.asarray(np.sin(angles)[None, :, None], jnp.float32)
        self.jitted = jax.jit(self._step, donate_argnums=0)

    def step(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Update on tokens and targets (B, T); returns the loss before."""
        self.state, loss = self.jitted(self.state, tokens, targets)
        return float(loss)

    def loss(self, p: Weights, tokens: Any, targets: Any) -> Any:
        """The mean cross-entropy of tokens and targets (B, T)."""
        c = self.c
        B, T = tokens.shape
        causal = jnp.tril(jnp.ones((T, T), bool))
        x = p["emb"][tokens]
        for i in range(c.n_layers):
            h = _rms_norm(x, p[f"n1_{i}"])
            qkv = (h @ p[f"qkv_{i}"].T).reshape(B, T, 3, c.n_heads, c.head_size)
            q, k, v = self._rope(qkv[:, :, 0]), self._rope(qkv[:, :, 1]), qkv[:, :, 2]
            scores = jnp.einsum("bthq,bshq->bhts", q, k) / c.head_size**0.5
            shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
            y = jnp.einsum("bhts,bshq->bthq", shares, v).reshape(B, T, c.d_model)
            x = x + y @ p[f"o_{i}"].T
            gate, up = jnp.split(_rms_norm(x, p[f"n2_{i}"]) @ p[f"gu_{i}"].T, 2, axis=-1)
            x = x + (jax.nn.silu(gate) * up) @ p[f"down_{i}"].T
        logits = _rms_norm(x, p["norm"]) @ p["emb"].T
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, targets[..., None], -1).mean()

    def _rope(self, x: Any) -> Any:
        a, b = jnp.split(x, 2, axis=-1)
        cos, sin = self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]]
        return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    def _step(self, state: Any, tokens: Any, targets: Any) -> Any:
        weights, m, v, count = state
        loss, gradient = jax.value_and_grad(self.loss)(weights, tokens, targets)
        count, (beta1, beta2) = count + 1, self.betas
        m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, m, gradient)
        v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, v, gradient)
        m_scale, v_scale = 1 / (1 - beta1**count), 1 / (1 - beta2**count)

        def update(w: Any, m: Any, v: Any) -> Any:
            direction = m * m_scale / (jnp.sqrt(v * v_scale) + EPS)
            return w - self.lr * (direction + self.weight_decay * w)

        return (jax.tree.map(update, weights, m, v), m, v, count), loss


def _rms_norm(x: Any, gain: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * gain
