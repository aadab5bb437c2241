"""From which size on PyTorch, bfloat16 and torch.compile are worth it on a CPU: tokens/s over a ladder of models.

    python benchmarks/crossing.py [--sizes tiny small nanogpt --batch-size 16 --threads 2 --seconds 10 --no-compile]

Each size is a preset, with its dropout and optimizer, or a preset at another width; all train on batches of the same
number of rows. The NumPy engine is in tokens/s, the others as multiples of it, medians of paired ratios; `compiling` is
what the first step with a compiled model takes longer than the second, with an empty cache. The second table is one
text of 64 tokens, the first of them a newline. Before timing, all ways of a size must give the same loss, within what
bfloat16 rounds off.

The results fix TRAIN_WITH_TORCH and USE_TORCH (engines/choice.py), BF16_FROM (engines/torch/hardware.py) and
COMPILING_REPAID (pace.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np
import torch

from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, Precision, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.model.parameters import initial_weights, parameter_table
from paired import clocked, heading, ratio, take_turns
from torch_speed import larger, random_batch, training

V = 65
WIDTHS = {"tiny-192": ("tiny", 192, 6), "small-320": ("small", 320, 10)}  # preset, d_model, n_heads
SIZES = ("tiny", "tiny-192", "small", "small-320", "nanogpt", "capstone")
Ways = dict[str, Callable[[], object]]


def sized(name: str, batch_size: int) -> RunConfig:
    preset, d_model, n_heads = WIDTHS.get(name, (name, 0, 0))
    base = PRESETS[preset]()
    model = (
        dataclasses.replace(base.model, d_model=d_model, n_heads=n_heads) if d_model else base.model
    )
    train = dataclasses.replace(base.train, batch_size=batch_size)
    return dataclasses.replace(base, model=model, train=train).resolved()


def computes(threads: int, compiled: bool) -> dict[str, ComputeConfig]:
    """Every way to train one size."""
    ways = {"numpy": ComputeConfig(engine="numpy", threads=threads)}
    compiling: tuple[Literal["off", "on"], ...] = ("off", "on") if compiled else ("off",)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for compile, precision in itertools.product(compiling, precisions):
        name = f"{precision}{', compiled' if compile == 'on' else ''}"
        ways[name] = ComputeConfig(
            engine="torch", device="cpu", precision=precision, compile=compile, threads=threads
        )
    return ways


def training_ways(
    config: RunConfig, ways: dict[str, ComputeConfig]
) -> tuple[Ways, dict[str, float]]:
    """A step of each way, warmed up and checked, and the seconds that compiling took."""
    torch.compiler.reset()  # or the shapes of another size make those of this one dynamic
    batch = random_batch(config, V)
    weights = larger(dict(initial_weights(parameter_table(config.model, V), 0)))
    steps: Ways = {}
    compiling, losses = {}, {}
    for name, compute in ways.items():
        engine = make_engine(config, V, compute, training=True)
        engine.load(weights.items())
        steps[name] = step = training(engine, batch)
        begin = time.perf_counter()
        losses[name] = step()
        compiling[name] = time.perf_counter() - begin - clocked(step)
    assert all(abs(loss - losses["numpy"]) < 0.02 * losses["numpy"] for loss in losses.values()), (
        losses
    )
    return steps, compiling


def reading_ways(config: RunConfig, ways: dict[str, ComputeConfig], tokens: int) -> Ways:
    """One text read token by token into the cache, as in generation."""
    weights = larger(dict(initial_weights(parameter_table(config.model, V), 0)))
    text = np.random.default_rng(0).integers(0, V, tokens)
    readings: Ways = {}
    for name, compute in ways.items():
        engine = make_engine(config, V, compute)
        engine.load(weights.items())

        def read(engine: Engine = engine) -> None:
            cache = engine.new_cache(1, tokens)
            for token in text:
                engine.logits(np.array([[token]]), cache, np.array([1]))

        read()
        readings[name] = read
    return readings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=10, help="for a size; three rounds at least"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    print(heading("numpy", "torch", threads=args.threads))

    def row(name: str, config: RunConfig, ways: Ways, tokens: int, turn: float) -> str:
        times = take_turns(ways, args.seconds, turn)
        parameters = parameter_table(config.model, V).total
        ratios = [
            f"{ratio(times, way, 'numpy'):{max(6, len(way))}.2f}" for way in ways if way != "numpy"
        ]
        speed = tokens / statistics.median(times["numpy"])
        return "  ".join([f"{name:10}  {parameters / 1e6:9.1f}M  {speed:14,.0f}", *ratios])

    def header(ways: dict[str, ComputeConfig]) -> str:
        return "  ".join(
            [f"{'':10}  parameters  numpy tokens/s", *(f"{way:>6}" for way in list(ways)[1:])]
        )

    all_ways = computes(args.threads, args.compile)
    print(f"training, batches of {args.batch_size} rows")
    print(header(all_ways), " compiling" if args.compile else "")
    for name in args.sizes:
        config = sized(name, args.batch_size)
        ways, compiling = training_ways(config, all_ways)
        line = row(name, config, ways, config.train.batch_size * config.model.block_size, turn=0.3)
        print(
            line,
            " ",
            ", ".join(f"{compiling[way]:.0f} s" for way in ways if "compiled" in way),
            flush=True,
        )
    eager = computes(args.threads, compiled=False)
    print("reading one text of 64 tokens, one by one")
    print(header(eager))
    for name in args.sizes:
        config = sized(name, args.batch_size)
        print(row(name, config, reading_ways(config, eager, 64), 64, turn=0.3), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what was compiled before would be quick
        main()
