"""Generation with and without the KV cache: seconds for 64, 256 and 1,024 tokens, and memory.

    python benchmarks/cache_speed.py [--engine numpy torch --threads 1 --seconds 20]

The model is `tiny` with a context of 1,024 tokens. With the cache, each token is computed once.
Without it, each step computes the whole text again, and the logits of its last token only. Both
ways must give the same last logits. Memory is the growth that tracemalloc measures (NumPy) or the
size of the tensors (PyTorch).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np

from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, EngineName, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.memory_estimate import cache_bytes
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.text import format_bytes
from paired import heading, ratio, take_turns

LENGTHS, CONTEXT, WINDOW, V = (64, 256, 1024), 1024, 128, 65


def build_engine(name: EngineName, threads: int, window: int = 0) -> Any:
    """An engine with the `tiny` model at a context of CONTEXT tokens."""
    tiny = PRESETS["tiny"]()
    model = dataclasses.replace(tiny.model, block_size=CONTEXT, window=window)
    config = RunConfig(model=model).resolve()
    engine = make_engine(
        config, V, ComputeConfig(engine=name, device="cpu", precision="fp32", threads=threads)
    )
    weights = (  # larger than initial weights, so that logits differ from token to token
        (key, array * (4 if array.ndim == 2 else 1))
        for key, array in initial_weights(parameter_table(config.model, V), 0)
    )
    engine.load(weights)
    return engine


def logits_with_cache(engine: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits (V,) after the last of tokens (T,), with a KV cache."""
    cache, length = engine.new_cache(1, len(tokens)), np.ones(1, np.int64)
    for token in tokens:
        logits = engine.logits(token.reshape(1, 1), cache, length)
    return np.array(logits[0])


def logits_without_cache(engine: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits (V,) after the last of tokens (T,); each step computes the text from its start."""
    for length in range(1, len(tokens) + 1):
        logits = engine.logits(
            tokens[None, :length], engine.new_cache(1, length), np.array([length])
        )
    return np.array(logits[0])


def measured_bytes(name: str, make_cache: Callable[[], Any]) -> int:
    """Memory of a new cache of an engine, in bytes."""
    if name == "torch":
        cache = make_cache()
        return cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()
    tracemalloc.start()
    cache = make_cache()
    traced_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del cache  # it has to live until it is measured
    return traced_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engine", nargs="+", default=["numpy", "torch"], choices=["numpy", "torch"]
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help=f"tokens, at most {CONTEXT:,}"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of PyTorch; the NumPy engine uses one"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20,
        help="seconds for each engine and length (at least one pair)",
    )
    args = parser.parse_args()
    print(heading("numpy", *(["torch"] if "torch" in args.engine else []), threads=args.threads))
    print(f"preset tiny, context {CONTEXT:,}, one text; medians of pairs")
    print("engine  tokens   with cache, s   without, s   times as fast")
    tokens = np.random.default_rng(0).integers(0, V, CONTEXT)
    for name in args.engine:
        engine = build_engine(name, args.threads)
        for length in args.lengths:
            text = tokens[:length]
            difference = np.abs(
                logits_with_cache(engine, text) - logits_without_cache(engine, text)
            ).max()
            assert difference < 1e-3, difference
            ways = {
                "with": partial(logits_with_cache, engine, text),
                "without": partial(logits_without_cache, engine, text),
            }
            times = take_turns(ways, args.seconds, rounds=1)
            with_cache, without = (statistics.median(times[way]) for way in ways)
            speed_up = ratio(times, "with", "without")
            print(
                f"{name:6}  {length:6,}  {with_cache:14.3f}  {without:11.3f}  {speed_up:14.1f}",
                flush=True,
            )
    print("\nmemory of the cache: 2 L K Q min(capacity, window) rows numbers")
    print("engine  window   by formula, bytes   measured, bytes")
    for name in args.engine:
        for window in (0, WINDOW):
            engine = build_engine(name, args.threads, window)
            formula = cache_bytes(engine.config.model, 1, CONTEXT, 4)
            measured = measured_bytes(name, partial(engine.new_cache, 1, CONTEXT))
            print(
                f"{name:6}  {window or '-':>6}  {formula:18,}  {measured:16,}"
                f"   ({format_bytes(formula)})"
            )


if __name__ == "__main__":
    main()
