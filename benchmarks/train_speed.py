"""Training tokens/s of the NumPy engine against PyTorch, eager and compiled, and against JAX.

    python benchmarks/train_speed.py [--preset tiny --block-size 64 --batch-size 32 --threads 2]
        [--seconds 60 --peers eager compiled jax]

All train the same model on the same batch in float32 with AdamW (PyTorch's is fused), in turns.
PyTorch has as many threads as the engine, JAX those of the machine. The output is the medians and
the medians of the ratios within a round. Before timing, all compute the loss of the same weights
and batch, and must agree, and once more after one update (glasslm does not decay gains, the peers
do). Needs torch (no dependency of glasslm) and, for its row, jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from glasslm.config.presets import PRESETS
from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.model.parameters import initial_weights
from paired import heading, print_speeds, take_turns

LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1  # of AdamW, as in the preset


def join_weights(c: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights as the peers have them: one matrix for q, k and v, one for gate and up."""

    def join(i: int, part: str, names: tuple[str, ...]) -> np.ndarray:
        return np.concatenate([weights[f"blocks.{i}.{part}.{name}.weight"] for name in names])

    arrays = {"emb": weights["embedding.weight"], "norm": weights["norm.weight"]}
    for i in range(c.n_layers):
        arrays |= {
            f"n1_{i}": weights[f"blocks.{i}.attention_norm.weight"],
            f"qkv_{i}": join(i, "attention", ("q", "k", "v")),
            f"o_{i}": weights[f"blocks.{i}.attention.o.weight"],
            f"n2_{i}": weights[f"blocks.{i}.feedforward_norm.weight"],
            f"gu_{i}": join(i, "feedforward", ("gate", "up")),
            f"down_{i}": weights[f"blocks.{i}.feedforward.down.weight"],
        }
    return arrays


class TorchPeer(torch.nn.Module):
    """The rmsnorm + rope + swiglu model with tied embeddings, in plain PyTorch."""

    def __init__(self, c: ModelConfig, arrays: dict[str, np.ndarray]) -> None:
        """`arrays`: of `join_weights`."""
        super().__init__()
        self.c = c
        self.p = torch.nn.ParameterDict(
            {k: torch.nn.Parameter(torch.from_numpy(v.copy())) for k, v in arrays.items()}
        )
        angles = torch.arange(c.block_size)[:, None] * 10000.0 ** (
            -torch.arange(0, c.head_size, 2) / c.head_size
        )
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angles.cos()[None, :, None])
        self.register_buffer("sin", angles.sin()[None, :, None])

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys (B, T, H, Q) by their positions."""
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of tokens and targets (B, T)."""
        c, p = self.c, self.p
        B, T = tokens.shape
        x = F.embedding(tokens, p["emb"])
        for i in range(c.n_layers):
            h = F.rms_norm(x, (c.d_model,), p[f"n1_{i}"], 1e-5)
            q, k, v = F.linear(h, p[f"qkv_{i}"]).view(B, T, 3, c.n_heads, c.head_size).unbind(2)
            q, k, v = self.rope(q).transpose(1, 2), self.rope(k).transpose(1, 2), v.transpose(1, 2)
            y = (
                F.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .reshape(B, T, c.d_model)
            )
            x = x + F.linear(y, p[f"o_{i}"])
            gate, up = F.linear(
                F.rms_norm(x, (c.d_model,), p[f"n2_{i}"], 1e-5), p[f"gu_{i}"]
            ).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, p[f"down_{i}"])
        logits = F.linear(F.rms_norm(x, (c.d_model,), p["norm"], 1e-5), p["emb"])
        return F.cross_entropy(logits.view(B * T, -1), targets.view(-1))


def peer_config(args: argparse.Namespace) -> RunConfig:
    """The peer's architecture at a preset's size, with AdamW."""
    config = PRESETS[args.preset]()
    model = ModelConfig(
        d_model=config.model.d_model,
        n_layers=config.model.n_layers,
        n_heads=config.model.n_heads,
        block_size=args.block_size,
    )
    return dataclasses.replace(
        config,
        model=model,
        optimizer=dataclasses.replace(config.optimizer, optimizer="adamw", lr=LR, grad_clip=0.0),
        train=dataclasses.replace(
            config.train, batch_size=args.batch_size, micro_batch_size=args.micro_batch_size
        ),
    ).resolve()


def torch_step(
    config: ModelConfig, arrays: dict[str, np.ndarray], batch: Batch, compiled: bool
) -> Callable[[], float]:
    """A training step of PyTorch that returns the loss before the update."""
    peer: Any = TorchPeer(config, arrays)
    optimizer = torch.optim.AdamW(
        peer.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    x, y = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    forward = torch.compile(peer) if compiled else peer

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(x, y)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    peers = ("eager", "compiled", "jax")
    parser.add_argument("--peers", nargs="+", default=peers, choices=peers)
    args = parser.parse_args()

    config = peer_config(args)
    V, B, T = 65, args.batch_size, args.block_size
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T))
    engine = NumpyEngine(config, V, args.threads)
    weights = dict(initial_weights(engine.table, 0))
    engine.load(weights.items())
    batch = Batch(tokens, targets, 0, np.arange(B))

    def numpy_step() -> float:
        loss = engine.accumulate(batch, 1 / (B * T)).cross_entropy
        engine.update(LR)
        return loss

    torch.set_num_threads(args.threads)
    arrays = join_weights(config.model, weights)
    steps: dict[str, Callable[[], float]] = {"glasslm NumPy": numpy_step}
    libraries = ["numpy", "torch"]
    if "eager" in args.peers:
        steps["PyTorch eager"] = torch_step(config.model, arrays, batch, compiled=False)
    if "compiled" in args.peers:
        steps["PyTorch compiled"] = torch_step(config.model, arrays, batch, compiled=True)
    if "jax" in args.peers and not importlib.util.find_spec("jax"):
        print("no row of JAX: pip install jax")
    elif "jax" in args.peers:
        from jax_peer import JaxPeer

        jax_step = JaxPeer(config.model, arrays, LR, BETAS, WEIGHT_DECAY).step
        steps["JAX"] = partial(jax_step, tokens.astype(np.int32), targets.astype(np.int32))
        libraries.append("jax")
    for limit in (1e-4, 1e-3):  # of the same weights, and of those after one update
        losses = [step() for step in steps.values()]
        assert max(losses) - min(losses) < limit, losses

    print(heading(*libraries, threads=args.threads))
    micro = config.train.micro_batch_size
    size = f"{config.model.n_layers} layers of {config.model.d_model}"
    print(f"{size}, {B} x {T} tokens, micro-batches of {micro}")
    times = take_turns(steps, args.seconds, turn=0.5)
    print_speeds(times, B * T, tuple(steps)[1:])


if __name__ == "__main__":
    main()
