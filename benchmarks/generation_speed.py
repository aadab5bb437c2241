"""Tokens/s of one stream with a KV cache: the NumPy engine against PyTorch eager, same weights.

    python benchmarks/generation_speed.py [--preset tiny --threads 1 --seconds 40]

The peer writes into a preallocated cache, as a careful PyTorch program does. Both read the same
tokens and must give the same logits. The two take turns. The output is the medians and the median
of the paired ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np
import torch
import torch.nn.functional as F

from glasslm.config.presets import PRESETS
from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.model.parameters import initial_weights
from train_speed import TorchPeer, join_weights


class CachedPeer(TorchPeer):
    """TorchPeer for inference: one token at a time, with a KV cache."""

    def reset(self) -> None:
        """Allocate an empty cache of keys and values (layers, 1, H, T, Q)."""
        c = self.c
        self.keys = torch.zeros(c.n_layers, 1, c.n_heads, c.block_size, c.head_size)
        self.values = torch.zeros_like(self.keys)

    @torch.inference_mode()
    def read(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (1, V) after a token (1,); writes its key and value into the cache."""
        c, p = self.c, self.p
        x = F.embedding(token, p["emb"])  # (1, D)
        cos, sin = self.cos[0, position], self.sin[0, position]
        for i in range(c.n_layers):
            h = F.rms_norm(x, (c.d_model,), p[f"n1_{i}"], 1e-5)
            qkv = F.linear(h, p[f"qkv_{i}"]).view(3, c.n_heads, c.head_size)
            a, b = qkv[:2].chunk(2, -1)
            qk = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
            self.keys[i, 0, :, position] = qk[1]
            self.values[i, 0, :, position] = qkv[2]
            keys, values = self.keys[i, :, :, : position + 1], self.values[i, :, :, : position + 1]
            y = F.scaled_dot_product_attention(
                qk[0].view(1, c.n_heads, 1, c.head_size), keys, values
            )
            x = x + F.linear(y.reshape(1, c.d_model), p[f"o_{i}"])
            gate, up = F.linear(
                F.rms_norm(x, (c.d_model,), p[f"n2_{i}"], 1e-5), p[f"gu_{i}"]
            ).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, p[f"down_{i}"])
        return F.linear(F.rms_norm(x, (c.d_model,), p["norm"], 1e-5), p["emb"])


def peer_config(preset: str) -> RunConfig:
    """The peer's architecture at a preset's size."""
    base = PRESETS[preset]()
    model = ModelConfig(
        d_model=base.model.d_model,
        n_layers=base.model.n_layers,
        n_heads=base.model.n_heads,
        block_size=base.model.block_size,
    )
    return dataclasses.replace(base, model=model).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of PyTorch; the NumPy engine uses one"
    )
    parser.add_argument("--seconds", type=float, default=40)
    args = parser.parse_args()

    config = peer_config(args.preset)
    V, T = 65, config.model.block_size
    engine = NumpyEngine(config, V, threads=1)
    weights = {
        name: array * (4 if array.ndim == 2 else 1)
        for name, array in initial_weights(engine.table, 0)
    }
    engine.load(weights.items())
    torch.set_num_threads(args.threads)
    peer = CachedPeer(config.model, join_weights(config.model, weights)).eval()
    tokens = np.random.default_rng(0).integers(0, V, T)
    arrays, tensors = [np.array([[t]]) for t in tokens], [torch.tensor([t]) for t in tokens]

    def read_with_numpy() -> np.ndarray:
        cache = engine.new_cache(1, T)
        for token in arrays:
            logits = engine.logits(token, cache, np.array([1]))
        return logits[0]

    def read_with_torch() -> np.ndarray:
        peer.reset()
        for position, token in enumerate(tensors):
            logits = peer.read(token, position)
        return logits[0].numpy()

    difference = np.abs(read_with_numpy() - read_with_torch()).max()
    assert difference < 1e-3, difference

    readers = {"glasslm NumPy": read_with_numpy, "PyTorch eager": read_with_torch}
    times: dict[str, list[float]] = {name: [] for name in readers}
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end:
        for name, read_tokens in readers.items():
            start = time.perf_counter()
            read_tokens()
            times[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(*times.values()))
    print(
        f"{datetime.date.today()}  numpy {np.__version__}, "
        f"torch {torch.__version__} with {args.threads} thread(s)"
    )
    print(f"preset {args.preset}, {T} tokens, one stream, {len(times['PyTorch eager'])} pairs")
    for name, seconds in times.items():
        print(f"{name:15} {T / statistics.median(seconds):9,.0f} tokens/s")
    print(f"ratio           {ratio:9.2f} (median of pairs)")


if __name__ == "__main__":
    main()
