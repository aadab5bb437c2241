"""The model sizes from which PyTorch, bfloat16 and compiling are faster on a CPU.

    python benchmarks/engine_thresholds.py [--sizes tiny small nanogpt --batch-size 16 --threads 2]
        [--seconds 10 --no-compile]

Each size is a preset, with its dropout and optimizer, or a preset at another width. All train on
batches of the same number of rows. The NumPy engine's column is tokens/s; the other columns are
multiples of it, medians of paired ratios. `compiling` is the time that the first step of a compiled
model takes beyond the second, with an empty cache. The second table generates from one text of 64
tokens. Before timing, all variants of a size must give the same loss within bfloat16's rounding. A
CPU without bfloat16 arithmetic has only the fp32 columns.

The results determine TORCH_TRAINING_MIN_PARAMETERS, COMPILED_TRAINING_MIN_PARAMETERS and
TORCH_INFERENCE_MIN_PARAMETERS (engines/choice.py) and MIN_COMPILED_RUN_S (training/step_timer.py).
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
from glasslm.engines.torch.hardware import has_bf16
from glasslm.model.parameters import initial_weights, parameter_table
from paired import heading, ratio, take_turns, time_call
from torch_speed import enlarge_matrices, random_batch, training_step

V = 65
WIDTHS = {"tiny-192": ("tiny", 192, 6), "small-320": ("small", 320, 10)}  # preset, d_model, n_heads
SIZES = ("tiny", "tiny-192", "small", "small-320", "nanogpt", "capstone")
Variants = dict[str, Callable[[], object]]


def config_of_size(name: str, batch_size: int) -> RunConfig:
    """The configuration of one of SIZES."""
    preset, d_model, n_heads = WIDTHS.get(name, (name, 0, 0))
    base = PRESETS[preset]()
    model = (
        dataclasses.replace(base.model, d_model=d_model, n_heads=n_heads) if d_model else base.model
    )
    train = dataclasses.replace(base.train, batch_size=batch_size)
    return dataclasses.replace(base, model=model, train=train).resolve()


def compute_settings(threads: int, compiled: bool) -> dict[str, ComputeConfig]:
    """The compute settings to compare, by name; `numpy` comes first."""
    settings = {"numpy": ComputeConfig(engine="numpy", threads=threads)}
    compiling: tuple[Literal["off", "on"], ...] = ("off", "on") if compiled else ("off",)
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if has_bf16("cpu") else ("fp32",)
    for compile, precision in itertools.product(compiling, precisions):
        name = f"{precision}{', compiled' if compile == 'on' else ''}"
        settings[name] = ComputeConfig(
            engine="torch", device="cpu", precision=precision, compile=compile, threads=threads
        )
    return settings


def training_variants(
    config: RunConfig, settings: dict[str, ComputeConfig]
) -> tuple[Variants, dict[str, float]]:
    """A warmed-up, checked training step of each variant, and the seconds of compiling."""
    torch.compiler.reset()  # otherwise shapes of another size make this one's dynamic
    batch = random_batch(config, V)
    weights = enlarge_matrices(dict(initial_weights(parameter_table(config.model, V), 0)))
    steps: Variants = {}
    compiling, losses = {}, {}
    for name, compute in settings.items():
        engine = make_engine(config, V, compute, training=True)
        engine.load(weights.items())
        steps[name] = step = training_step(engine, batch)
        begin = time.perf_counter()
        losses[name] = step()
        compiling[name] = time.perf_counter() - begin - time_call(step)
    assert all(abs(loss - losses["numpy"]) < 0.02 * losses["numpy"] for loss in losses.values()), (
        losses
    )
    return steps, compiling


def decoding_variants(
    config: RunConfig, settings: dict[str, ComputeConfig], tokens: int
) -> Variants:
    """Calls that compute one text token by token into a KV cache, as generation does."""
    weights = enlarge_matrices(dict(initial_weights(parameter_table(config.model, V), 0)))
    text = np.random.default_rng(0).integers(0, V, tokens)
    calls: Variants = {}
    for name, compute in settings.items():
        engine = make_engine(config, V, compute)
        engine.load(weights.items())

        def decode(engine: Engine = engine) -> None:
            cache = engine.new_cache(1, tokens)
            for token in text:
                engine.logits(np.array([[token]]), cache, np.array([1]))

        decode()
        calls[name] = decode
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=10, help="seconds for each size (at least three rounds)"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    print(heading("numpy", "torch", threads=args.threads))

    def row(name: str, config: RunConfig, variants: Variants, tokens: int, turn: float) -> str:
        times = take_turns(variants, args.seconds, turn)
        parameters = parameter_table(config.model, V).total
        ratios = [
            f"{ratio(times, variant, 'numpy'):{max(6, len(variant))}.2f}"
            for variant in variants
            if variant != "numpy"
        ]
        speed = tokens / statistics.median(times["numpy"])
        return "  ".join([f"{name:10}  {parameters / 1e6:9.1f}M  {speed:14,.0f}", *ratios])

    def header(variants: dict[str, ComputeConfig]) -> str:
        return "  ".join(
            [
                f"{'':10}  parameters  numpy tokens/s",
                *(f"{variant:>6}" for variant in list(variants)[1:]),
            ]
        )

    all_settings = compute_settings(args.threads, args.compile)
    print(f"training, batches of {args.batch_size} rows")
    print(header(all_settings), " compiling" if args.compile else "")
    for name in args.sizes:
        config = config_of_size(name, args.batch_size)
        variants, compiling = training_variants(config, all_settings)
        line = row(name, config, variants, config.tokens_per_step, turn=0.3)
        print(
            line,
            " ",
            ", ".join(
                f"{compiling[variant]:.0f} s" for variant in variants if "compiled" in variant
            ),
            flush=True,
        )
    eager = compute_settings(args.threads, compiled=False)
    print("decoding one text of 64 tokens, token by token")
    print(header(eager))
    for name in args.sizes:
        config = config_of_size(name, args.batch_size)
        print(row(name, config, decoding_variants(config, eager, 64), 64, turn=0.3), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # an empty compile cache
        main()
