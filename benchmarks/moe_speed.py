"""Training tokens/s of a mixture of experts against a dense model with equal FLOPs per token.

    python benchmarks/moe_speed.py [--engine numpy --compile off --optimizer muon adamw]
        [--n-experts 8 --experts-per-token 2 --d-model 128 --batch-size 16 --threads 2 --seconds 30]

Both models have four layers and use the same total feed-forward width for each token: one
feed-forward of width F, or k of E experts of width F / k. So both compute the same matrix products.
The extra time of the mixture goes to the router, to sorting and moving tokens, to smaller products,
and to E / k times as many feed-forward weights in the gradients and the optimizer. `gradient` is
accumulate alone, `step` also updates. The goal is a step in at most 1.5 times the dense time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import initial_weights, parameter_table
from paired import heading, print_speeds, ratio, take_turns

V = 65
WARMUP_CALLS = 5  # steps before timing


def training_calls(
    name: str, config: RunConfig, compute: ComputeConfig
) -> dict[str, Callable[[], object]]:
    """Calls that compute the gradient of a random batch, and a whole training step."""
    B, T = config.train.batch_size, config.model.block_size
    rng = np.random.default_rng(0)
    batch = Batch(rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T)), 0, np.arange(B))
    engine = make_engine(config, V, compute, training=True)
    engine.load(initial_weights(parameter_table(config.model, V), 0))

    def gradient() -> None:
        engine.accumulate(batch, 1 / batch.targets.size)

    def step() -> None:
        gradient()
        engine.update(1e-4)

    for _ in range(WARMUP_CALLS):
        step()
    return {f"{name}, gradient": gradient, f"{name}, step": step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", default="numpy", choices=("numpy", "torch"))
    parser.add_argument("--compile", default="off", choices=("off", "on"))
    parser.add_argument("--optimizer", nargs="+", default=["muon", "adamw"])
    parser.add_argument("--n-experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()

    k = args.experts_per_token
    compute = ComputeConfig(
        engine=args.engine,
        device="cpu",
        precision="fp32",
        compile=args.compile,
        threads=args.threads,
    )
    print(heading(args.engine, threads=args.threads))
    for optimizer in args.optimizer:
        flags = {"d_model": args.d_model, "batch_size": args.batch_size, "optimizer": optimizer}
        dense = with_flags(PRESETS["tiny"](), flags).resolve()
        experts = {
            "d_ff": dense.model.d_ff // k,
            "n_experts": args.n_experts,
            "experts_per_token": k,
        }
        mixture = with_flags(dense, experts).resolve()
        tokens = args.batch_size * dense.model.block_size
        times = take_turns(
            training_calls("dense", dense, compute) | training_calls("mixture", mixture, compute),
            args.seconds,
            turn=0.5,
            rounds=5,
        )
        print(f"\n{args.engine}, {optimizer}, {args.batch_size} x {dense.model.block_size} tokens")
        for name, config in (("dense", dense), ("mixture", mixture)):
            sizes = parameter_table(config.model, V).counts()
            print(
                f"{name}: {sizes['total']:,} parameters, {sizes['active']:,} active, "
                f"{flops_per_token(config.model, V) / 1e6:.2f} MFLOPs per token"
            )
        print_speeds(times, tokens, ("dense, gradient", "dense, step"))
        gradient, step = (
            ratio(times, f"dense, {call}", f"mixture, {call}") for call in ("gradient", "step")
        )
        print(
            f"the mixture takes {gradient:.2f} times as long as the dense model for the gradient, "
            f"{step:.2f} times as long for the step"
        )


if __name__ == "__main__":
    main()
