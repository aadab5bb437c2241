"""Training tokens/s of the PyTorch engine on a CPU against nanoGPT, at a preset's size.

    python benchmarks/torch_speed.py --nanogpt PATH/TO/nanoGPT
        [--preset nanogpt --batch-size 16 --threads 2 --seconds 90]

nanoGPT trains in two steps: as its README describes for a CPU (float32, eager, its own AdamW), and
with bfloat16 autocast and fused AdamW added. glasslm trains through its engine's methods,
`accumulate` and `update`. All steps clip gradients and return the loss as a Python number. Dropout
is off. Before timing, both must give the same loss and gradient in float32 (nanoGPT with the tanh
form of GELU during this check), and every loss in bfloat16 must be close to it.

FLOPs per token are 6 for each weight in a matrix product and 12 L H Q T for attention
(arXiv:2204.02311, appendix B), although the engine skips part of the masked half.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import nanogpt
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch, Engine
from glasslm.engines.torch.engine import TorchEngine
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import initial_weights, parameter_table
from matmul import DTYPES, products
from paired import Times, heading, print_speeds, ratio, take_turns

V = 65
README, TUNED = "nanoGPT, README", "nanoGPT, bf16 fused"


def nanogpt_config(preset: str, batch_size: int) -> RunConfig:
    """nanoGPT's architecture and optimizer, without dropout, at a preset's size."""
    sizes, base = PRESETS[preset]().model, PRESETS["nanogpt"]()
    model = ModelConfig(
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        n_heads=sizes.n_heads,
        block_size=sizes.block_size,
        norm=base.model.norm,
        feedforward=base.model.feedforward,
        position=base.model.position,
    )
    train = dataclasses.replace(base.train, batch_size=batch_size)
    return dataclasses.replace(base, model=model, train=train).resolve()


def random_batch(config: RunConfig, vocab_size: int) -> Batch:
    """A batch of random tokens and targets (B, T)."""
    B, T = config.train.batch_size, config.model.block_size
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(0, vocab_size, (B, T)), rng.integers(0, vocab_size, (B, T)), 0, np.arange(B)
    )


def enlarge_matrices(weights: nanogpt.Weights) -> nanogpt.Weights:
    """Weights with matrices 4 times as large: initial weights predict all tokens about equally."""
    return {name: array * (4 if array.ndim == 2 else 1) for name, array in weights.items()}


def training_step(engine: Engine, batch: Batch) -> Callable[[], float]:
    """A step that trains an engine on this batch and returns the loss before the update."""
    weight = 1 / batch.targets.size

    def step() -> float:
        loss = engine.accumulate(batch, weight).cross_entropy
        engine.update(1e-3)
        return loss

    return step


def check_agreement(
    checkout: Path, config: RunConfig, vocab_size: int, batch: Batch, weights: nanogpt.Weights
) -> float:
    """The loss in float32.

    Asserts that nanoGPT has the same loss, and the same gradient of the first layer's queries.
    """
    engine = TorchEngine(config, vocab_size, device="cpu", precision="fp32")
    engine.load(weights.items())
    weight = 1 / batch.targets.size
    our_loss = float(engine.losses(batch.tokens, batch.targets).sum() * weight)
    gradient = engine.gradients(batch, weight)["blocks.0.attention.q.weight"]
    peer = nanogpt.load_model(checkout, config.model, vocab_size, weights)
    with nanogpt.tanh_gelu(peer):
        _, loss = peer(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets))
        loss.backward()
    their_gradient = peer.transformer.h[0].attn.c_attn.weight.grad[: len(gradient)].numpy()
    assert abs(our_loss - loss.item()) < 1e-5 * our_loss, (our_loss, loss.item())
    error = np.abs(gradient - their_gradient).max() / np.abs(gradient).max()
    assert error < 1e-4, error
    return our_loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--preset", default="nanogpt", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=90)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    config = nanogpt_config(args.preset, args.batch_size)
    batch = random_batch(config, V)
    weights = enlarge_matrices(dict(initial_weights(parameter_table(config.model, V), 0)))
    expected = check_agreement(args.nanogpt, config, V, batch, weights)

    def glasslm_step(compiled: bool) -> Callable[[], float]:
        compile: Literal["on", "off"] = "on" if compiled else "off"
        compute = ComputeConfig(
            engine="torch", device="cpu", precision="bf16", compile=compile, threads=args.threads
        )
        engine = make_engine(config, V, compute, training=True)
        engine.load(weights.items())
        return training_step(engine, batch)

    def nanogpt_step(**options: bool) -> Callable[[], float]:
        model = nanogpt.load_model(args.nanogpt, config.model, V, weights)
        return nanogpt.make_training_step(
            model, torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets), **options
        )

    steps = {
        README: nanogpt_step(),
        TUNED: nanogpt_step(bf16=True, fused=True),
        "glasslm, bf16": glasslm_step(compiled=False),
        "glasslm, bf16 compiled": glasslm_step(compiled=True),
    }
    for name, step in steps.items():
        loss = step()
        assert abs(loss - expected) < 0.01 * expected, (name, loss, expected)
    tokens = batch.tokens.size
    ceilings = {name: products(config.model, tokens, dtype) for name, dtype in DTYPES.items()}
    times = take_turns(
        steps | {name: multiply for name, (_, multiply) in ceilings.items()}, args.seconds
    )

    print(heading("torch", threads=args.threads))
    parameters = parameter_table(config.model, V).total
    B, T = batch.tokens.shape
    print(
        f"preset {args.preset} without dropout, {parameters / 1e6:.1f}M parameters, "
        f"{B} x {T} tokens"
    )
    print_speeds({name: times[name] for name in steps}, tokens, (README, TUNED))
    flops = flops_per_token(config.model, V) * tokens
    print_flops(times, tuple(steps), flops, tokens, {name: f for name, (f, _) in ceilings.items()})


def print_flops(
    times: Times, steps: Sequence[str], flops: float, tokens: int, ceilings: dict[str, float]
) -> None:
    """Print FLOP/s, and their share of the speed of matrix products alone.

    A step has `flops` FLOPs; the products of `ceilings` have theirs, by the name of the type.
    """
    print(
        f"{flops / tokens / 1e6:.1f} MFLOPs per token; matrix products of these shapes alone: ",
        end="",
    )
    print(
        ", ".join(
            f"{name} {f / statistics.median(times[name]) / 1e9:,.0f} GFLOP/s"
            for name, f in ceilings.items()
        )
    )
    for name in steps:
        dtype = "float32" if name == README else "bfloat16"
        share = ratio(times, name, dtype) * flops / ceilings[dtype]
        speed = flops / statistics.median(times[name])
        print(f"{name}: {speed / 1e9:,.0f} GFLOP/s, {share:.0%} of the products in {dtype}")


if __name__ == "__main__":
    main()
