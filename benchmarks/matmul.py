"""The speed limit of training: matrix products of a model's shapes, and no other work.

    python benchmarks/matmul.py [--preset nanogpt --batch-size 16 --threads 2 --seconds 5]

A training step cannot be faster than its matrix products alone. Other benchmarks time `products` in
turn with their training steps and print the share of its speed that each step reaches.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from glasslm.config.presets import PRESETS
from glasslm.config.schema import ModelConfig
from paired import heading, take_turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def products(
    config: ModelConfig, tokens: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[float, Callable[[], None]]:
    """FLOPs of the linear layers of all blocks for so many tokens, and a call that computes them.

    Biases, norms, attention and the unembedding are not included.
    """
    c = config.resolve()
    D, H = c.d_model, c.n_heads * c.head_size
    qkv_width = (c.n_heads + 2 * c.n_kv_heads) * c.head_size  # q, k and v in one product
    shapes = [(D, qkv_width), (H, D), (D, c.d_ff * (1 + c.is_gated)), (c.d_ff, D)]  # in, out
    xs = [torch.randn(tokens, width, device=device, dtype=dtype) for width, _ in shapes]
    ws = [torch.randn(out, width, device=device, dtype=dtype) for width, out in shapes]
    ys = [torch.empty(tokens, out, device=device, dtype=dtype) for _, out in shapes]

    def multiply() -> None:
        for _ in range(c.n_layers):
            for x, w, y in zip(xs, ws, ys):
                torch.mm(x, w.T, out=y)
        if device == "cuda":
            torch.cuda.synchronize()

    multiply()
    return 2.0 * c.n_layers * tokens * sum(w.numel() for w in ws), multiply


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nanogpt", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = PRESETS[args.preset]().model
    tokens = args.batch_size * config.block_size
    workloads = {name: products(config, tokens, dtype) for name, dtype in DTYPES.items()}
    times = take_turns({name: call for name, (_, call) in workloads.items()}, args.seconds)
    print(heading("torch", threads=args.threads))
    for name, (flops, _) in workloads.items():
        speed = flops / statistics.median(times[name])
        print(f"{name}: {speed / 1e9:,.0f} GFLOP/s, matrix products of the preset {args.preset}")


if __name__ == "__main__":
    main()
