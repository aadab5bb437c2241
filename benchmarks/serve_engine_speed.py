"""Tokens/s of the scheduler with 1, 8 and 32 requests at once, and the time to a first token.

    python benchmarks/serve_engine_speed.py [--presets tiny nanogpt --engine numpy --rounds 5]

Each round measures every case once, in turn, so that other work on the machine falls on all of
them; the output is the medians. The weights are random. `generate` is glasslm generate's own batch
of 32 samples. The requests of the scheduler have different prompts and arrive one a step, so that
their texts have different lengths; the speed counts from the moment that all of them run. CPU time
per token hardly depends on other programs that share the machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np

from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, EngineName, RunConfig
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.inference.generation import generate
from glasslm.inference.request import Request, Token
from glasslm.inference.sampling import Sampling
from glasslm.inference.scheduler import Scheduler
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs.blas import format_blas, loaded_blas

TOKENIZER = CharTokenizer("\n" + "".join(map(chr, range(32, 96))))  # V = 65, as Shakespeare's
SLOTS = 32
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 24, 200


class Speed(NamedTuple):
    """One measurement."""

    tokens_per_s: float
    cpu_ms_per_token: float
    first_token_ms: float


def build_engine(config: RunConfig, name: EngineName) -> Engine:
    """An engine with two threads and the initial weights of the preset."""
    compute = ComputeConfig(engine=name, device="cpu", precision="fp32", threads=2)
    engine = make_engine(config, TOKENIZER.vocab_size, compute)
    engine.load(initial_weights(parameter_table(config.model, TOKENIZER.vocab_size), 0))
    return engine


def run_scheduler(engine: Engine, config: RunConfig, streams: int, prompt: int, new: int) -> Speed:
    """Serve `streams` requests with prompts of `prompt` tokens and `new` tokens each."""
    scheduler = Scheduler(engine, TOKENIZER, config.model, slots=SLOTS)
    rng = np.random.default_rng(0)
    requests = [
        Request(
            rng.integers(0, TOKENIZER.vocab_size, prompt).tolist(),
            new,
            Sampling(temperature=1.0, seed=seed),
        )
        for seed in range(streams)
    ]
    start, first = time.perf_counter(), 0.0
    n_tokens, full_start, cpu_start = 0, 0.0, 0.0
    while requests or scheduler.has_work:
        if requests:
            scheduler.submit(requests.pop())
        events = scheduler.step()
        new_tokens = sum(isinstance(event, Token) for _, event in events)
        if new_tokens and not first:
            first = time.perf_counter() - start
        if full_start:
            n_tokens += new_tokens
        elif new_tokens and scheduler.counts.running == streams and not requests:
            full_start, cpu_start = time.perf_counter(), time.process_time()
        if n_tokens and scheduler.counts.running < streams:
            break
    if not n_tokens:
        raise SystemExit(f"all {streams} streams never ran at once: give more --tokens than {new}")
    elapsed, cpu = time.perf_counter() - full_start, time.process_time() - cpu_start
    return Speed(n_tokens / elapsed, 1000 * cpu / n_tokens, 1000 * first)


def run_generate(engine: Engine, config: RunConfig, streams: int, new: int) -> Speed:
    """`glasslm generate --num-samples streams`."""
    prompt = TOKENIZER.decode(range(PROMPT_TOKENS))
    start, first, n_tokens = time.perf_counter(), 0.0, 0
    cpu_start = time.process_time()
    for _ in generate(
        engine,
        TOKENIZER,
        [prompt],
        model_config=config.model,
        max_new_tokens=new,
        samples=streams,
        sampling=Sampling(temperature=1.0),
    ):
        first = first or time.perf_counter() - start
        n_tokens += 1
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return Speed(n_tokens / elapsed, 1000 * cpu / n_tokens, 1000 * first)


def measure_preset(preset: str, engine_name: EngineName, rounds: int, new: int) -> None:
    """Measure all cases of a preset and print the medians."""
    config = PRESETS[preset]().resolve()
    start = time.perf_counter()
    engine = build_engine(config, engine_name)
    print(f"\npreset {preset}, engine made in {time.perf_counter() - start:.2f} s")
    serve, write = partial(run_scheduler, engine, config), partial(run_generate, engine, config)
    cases: dict[str, Callable[[], Speed]] = {
        "1 stream": partial(serve, 1, PROMPT_TOKENS, new),
        "8 streams": partial(serve, 8, PROMPT_TOKENS, new),
        "32 streams": partial(serve, SLOTS, PROMPT_TOKENS, new),
        "generate, 1 text": partial(write, 1, new),
        "generate, 32 texts": partial(write, SLOTS, new),
        "long prompt": partial(serve, 1, LONG_PROMPT_TOKENS, 10),
    }
    results: dict[str, list[Speed]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            results[name].append(run())
    print(f"{'':20}{'tokens/s':>10}{'CPU ms/token':>14}{'first token':>14}")
    for name, speeds in results.items():
        rate, cpu, first = (statistics.median(column) for column in zip(*speeds))
        print(f"{name:20}{rate:10,.0f}{cpu:14.2f}{first:11.1f} ms")
    for name in ("1 stream", "generate, 32 texts"):
        ratio = statistics.median(
            many.tokens_per_s / other.tokens_per_s
            for many, other in zip(results["32 streams"], results[name])
        )
        print(f"32 streams / {name}: {ratio:.2f} (median of rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tiny", "nanogpt"], choices=PRESETS)
    parser.add_argument("--engine", default="numpy", choices=["numpy", "torch"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=80, help="new tokens of each request")
    args = parser.parse_args()
    blas = format_blas(dict(loaded_blas() or {}))
    print(
        f"{datetime.date.today()}  {args.engine}, {blas}, {os.cpu_count()} cores, "
        f"{args.rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    for preset in args.presets:
        measure_preset(preset, args.engine, args.rounds, args.tokens)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
