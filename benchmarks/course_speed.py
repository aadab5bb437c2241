"""Training tokens/s at a course's small setting: 795,392 parameters, 4 x 64 tokens, AdamW.

    python benchmarks/course_speed.py [--pairs 7 --seconds 4 --threads 2]

The peer is a plain float64 NumPy program of the kind that the course teaches: layers that store
what their backward pass needs, no buffer reuse, gradients accumulated into parameters, BLAS on all
threads. It was written for this benchmark; the course's own code is not included. Before timing,
both compute the loss of the same weights and batch, and must agree. Each measurement runs in a
process of its own, because idle BLAS threads spin for a while and slow down the other side.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from glasslm.config.presets import tiny
from glasslm.config.schema import ModelConfig
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.model.parameters import initial_weights

V, B, T = 65, 4, 64
MODEL = ModelConfig(position="none", d_ff=341, block_size=T)


class Parameter:
    """A float64 weight with its gradient and AdamW moments, all of the same shape."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data.astype(np.float64)
        self.grad = np.zeros_like(self.data)
        self.m, self.v = np.zeros_like(self.data), np.zeros_like(self.data)


class PlainTransformer:
    """RMSNorm, causal attention without positions, SwiGLU, tied embeddings; float64."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.p = {name: Parameter(array) for name, array in weights.items()}
        self.t = 0

    def linear(
        self, x: np.ndarray, name: str
    ) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """(B, T, in) -> (B, T, out), and the backward pass."""
        w = self.p[f"{name}.weight"]

        def backward(dy: np.ndarray) -> np.ndarray:
            w.grad += dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            return dy @ w.data

        return x @ w.data.T, backward

    def norm(
        self, x: np.ndarray, name: str
    ) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """RMSNorm, (B, T, D) -> (B, T, D), and the backward pass."""
        w = self.p[f"{name}.weight"]
        r = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
        unit = x * r

        def backward(dy: np.ndarray) -> np.ndarray:
            w.grad += np.sum(dy * unit, axis=(0, 1))
            du = dy * w.data
            return r * (du - unit * np.mean(du * unit, axis=-1, keepdims=True))

        return unit * w.data, backward

    def attention(
        self, x: np.ndarray, name: str
    ) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """Causal attention, (B, T, D) -> (B, T, D), and the backward pass."""
        H = MODEL.n_heads

        def split(a: np.ndarray) -> np.ndarray:
            return a.reshape(*a.shape[:2], H, -1).transpose(0, 2, 1, 3)

        def merge(a: np.ndarray) -> np.ndarray:
            return a.transpose(0, 2, 1, 3).reshape(a.shape[0], a.shape[2], -1)

        (q, q_back), (k, k_back), (v, v_back) = (self.linear(x, f"{name}.{n}") for n in "qkv")
        q, k, v = split(q), split(k), split(v)
        scale = 1 / np.sqrt(q.shape[-1])
        scores = q @ k.swapaxes(-1, -2) * scale
        scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -1e9)
        e = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = e / e.sum(axis=-1, keepdims=True)
        y, o_back = self.linear(merge(p @ v), f"{name}.o")

        def backward(dy: np.ndarray) -> np.ndarray:
            da = split(o_back(dy))
            dp = da @ v.swapaxes(-1, -2)
            ds = p * (dp - np.sum(dp * p, axis=-1, keepdims=True)) * scale
            return (
                q_back(merge(ds @ k))
                + k_back(merge(ds.swapaxes(-1, -2) @ q))
                + v_back(merge(p.swapaxes(-1, -2) @ da))
            )

        return y, backward

    def feedforward(
        self, x: np.ndarray, name: str
    ) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """SwiGLU, (B, T, D) -> (B, T, D), and the backward pass."""
        (g, g_back), (u, u_back) = self.linear(x, f"{name}.gate"), self.linear(x, f"{name}.up")
        s = 1 / (1 + np.exp(-g))
        y, down_back = self.linear(g * s * u, f"{name}.down")

        def backward(dy: np.ndarray) -> np.ndarray:
            dh = down_back(dy)
            return g_back(dh * u * (s + g * s * (1 - s))) + u_back(dh * g * s)

        return y, backward

    def step(self, tokens: np.ndarray, targets: np.ndarray, lr: float) -> float:
        """Train one step on tokens and targets (B, T); returns the mean loss before the update."""
        embedding = self.p["embedding.weight"]
        for parameter in self.p.values():
            parameter.grad[...] = 0
        x, backward_passes = embedding.data[tokens], []
        for i in range(MODEL.n_layers):
            for sublayer, name in (
                (self.attention, "attention"),
                (self.feedforward, "feedforward"),
            ):
                h, norm_back = self.norm(x, f"blocks.{i}.{name}_norm")
                h, inner_back = sublayer(h, f"blocks.{i}.{name}")
                x = x + h
                backward_passes.append((norm_back, inner_back))
        h, norm_back = self.norm(x, "norm")
        logits = h @ embedding.data.T
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p = e / e.sum(axis=-1, keepdims=True)
        target_probabilities = np.take_along_axis(p, targets[..., None], axis=-1)
        d = p.copy()
        np.put_along_axis(d, targets[..., None], target_probabilities - 1, axis=-1)
        d /= targets.size
        embedding.grad += d.reshape(-1, V).T @ h.reshape(-1, h.shape[-1])
        dx = norm_back(d @ embedding.data)
        for norm_back, inner_back in reversed(backward_passes):
            dx = dx + norm_back(inner_back(dx))
        np.add.at(embedding.grad, tokens, dx)
        self.adamw(lr)
        return float(-np.log(target_probabilities).mean())

    def adamw(self, lr: float, b1: float = 0.9, b2: float = 0.95, decay: float = 0.01) -> None:
        """Clip the gradients to norm 1 and update all parameters."""
        self.t += 1
        norm = np.sqrt(sum(np.sum(p.grad**2) for p in self.p.values()))
        for p in self.p.values():
            g = p.grad * min(1.0, 1.0 / (norm + 1e-6))
            p.m = b1 * p.m + (1 - b1) * g
            p.v = b2 * p.v + (1 - b2) * g**2
            p.data -= lr * (
                p.m / (1 - b1**self.t) / (np.sqrt(p.v / (1 - b2**self.t)) + 1e-8) + decay * p.data
            )


def measure(side: str, seconds: float, threads: int) -> None:
    """Print one side's loss at the first step and its median tokens/s over the steps."""
    base = tiny()
    config = dataclasses.replace(
        base,
        model=MODEL,
        optimizer=dataclasses.replace(
            base.optimizer, optimizer="adamw", lr=3e-4, weight_decay=0.01
        ),
        train=dataclasses.replace(base.train, batch_size=B),
    ).resolve()
    engine = NumpyEngine(config, V, threads)
    weights = dict(initial_weights(engine.table, 0))
    engine.load(weights.items())
    assert sum(array.size for array in weights.values()) == 795_392
    plain = PlainTransformer(weights)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T))
    batch = Batch(tokens, targets, 0, np.arange(B))

    def ours() -> float:
        loss = engine.accumulate(batch, 1 / (B * T)).cross_entropy
        engine.update(3e-4)
        return loss

    step = ours if side == "glasslm" else lambda: plain.step(tokens, targets, 3e-4)
    loss, times = step(), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(loss, B * T / statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--side", choices=("glasslm", "plain"), help="measure one side in this process"
    )
    args = parser.parse_args()
    if args.side:
        measure(args.side, args.seconds, args.threads)
        return
    rates: dict[str, list[float]] = {"glasslm": [], "plain": []}
    for _ in range(args.pairs):
        losses = []
        for side in rates:
            command = [sys.executable, __file__, "--side", side, "--seconds", str(args.seconds)]
            # glasslm's command line sets one BLAS thread; the engine has threads of its own.
            blas = "1" if side == "glasslm" else str(args.threads)
            environment = os.environ | {"OPENBLAS_NUM_THREADS": blas}
            command += ["--threads", str(args.threads)]
            output = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout
            loss, rate = map(float, output.split())
            losses.append(loss)
            rates[side].append(rate)
        assert abs(losses[0] - losses[1]) < 1e-4, losses
    ratio = statistics.median(a / b for a, b in zip(*rates.values()))
    print(
        f"{datetime.date.today()}  numpy {np.__version__}, {args.threads} threads, "
        f"{args.pairs} pairs of processes"
    )
    for name, side_rates in rates.items():
        print(f"{name:10} {statistics.median(side_rates):9,.0f} tokens/s")
    print(f"ratio      {ratio:9.2f} (median of pairs)")


if __name__ == "__main__":
    main()
