"""Time and memory of attention against the length of the context: plain, by tiles (flash), and PyTorch's own.

    python benchmarks/attention_memory.py [--window 256] [--lengths 256 1024 4096] [--seconds 5]
    python benchmarks/attention_memory.py --training [--length 4096]

A layer of four heads of 32 computes forward and backward for one text, in float32 on one thread. For time the ways take
turns; each figure of memory is the growth of a fresh process (Linux), beyond inputs and libraries that are loaded, and
with what it keeps. Plain attention stops where it would take more than 8 GB. The crossing is the smallest length from
which on flash is as fast as plain.

--training trains a small model (4 layers, 4 heads, width 128) for three steps, one text at a time, with each of the
two, and counts all of the process's growth since glasslm was imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one of the engine's threads
import numpy as np

from glasslm.config.schema import (
    AttentionName,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.numpy.arena import Arena
from glasslm.engines.numpy.attention import attention
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.numpy.flash import flash_attention
from glasslm.engines.protocol import Batch
from glasslm.model.parameters import initial_weights
from paired import heading, ratio, take_turns

H, Q, V = 4, 32, 65
LENGTHS = (256, 384, 512, 1024, 2048, 4096, 8192, 16384)
ROOM = 8e9  # bytes that plain attention may take
Step = Callable[[], np.ndarray]  # forward and backward; gives the gradients (1, T, 3H, Q)


def numpy_step(way: str, T: int, window: int) -> Step:
    qkv, dout = inputs(T)
    new = Arena(np.float32)

    def step() -> np.ndarray:
        heads, upstream = new(qkv.shape), new(dout.shape)  # both are written to
        heads[...], upstream[...] = qkv, dout
        qk, v = heads[:, :, : 2 * H], heads[:, :, 2 * H :]
        if way == "plain":
            _, backward = attention(qk, v, None, None, new, window)
        else:
            _, backward = flash_attention(qk, v, None, window, new)
        return backward(upstream)

    return step


def torch_step(T: int, window: int) -> Step:
    import torch

    torch.set_num_threads(1)
    qkv, dout = (torch.from_numpy(x) for x in inputs(T))
    mask = None  # then it is causal, and no mask need exist
    if window:
        distance = torch.arange(T)[:, None] - torch.arange(T)
        mask = (distance >= 0) & (distance < window)

    def step() -> np.ndarray:
        heads = qkv.clone().requires_grad_()
        q, k, v = heads.transpose(1, 2).split(H, dim=1)
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )
        y.transpose(1, 2).backward(dout)
        assert heads.grad is not None
        return heads.grad.numpy()

    return step


def inputs(T: int) -> tuple[np.ndarray, ...]:
    """Queries, keys and values side by side, and a gradient of the output."""
    rng = np.random.default_rng(T)
    return tuple(rng.standard_normal((1, T, heads, Q), dtype=np.float32) for heads in (3 * H, H))


def ways(T: int, window: int) -> dict[str, Callable[[], Step]]:
    found: dict[str, Callable[[], Step]] = {}
    if 4 * T * T * (2 * H + 1) < ROOM:  # scores, their gradients and the mask
        found["plain"] = partial(numpy_step, "plain", T, window)
    found["flash"] = partial(numpy_step, "flash", T, window)
    if importlib.util.find_spec("torch"):
        found["torch"] = partial(torch_step, T, window)
    return found


def resident_bytes(what: str) -> int:
    (kilobytes,) = re.findall(
        rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii")
    )
    return int(kilobytes) * 1024


def growth(arguments: list[str]) -> float:
    """What a fresh process says its memory has grown by, in MB."""
    command = [sys.executable, __file__, *arguments]
    return (
        int(subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8").stdout)
        / 1e6
    )


def layer_growth(way: str, T: int, window: int) -> int:
    ways(256, window)[way]()()  # loads what a first call loads
    step = ways(T, window)[way]()
    before = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - before


def training_growth(way: AttentionName, T: int) -> int:
    before = resident_bytes("VmRSS")
    config = RunConfig(
        model=ModelConfig(block_size=T, attention=way),
        optimizer=OptimizerConfig(optimizer="adamw"),
        train=TrainConfig(batch_size=2, micro_batch_size=1),
    ).resolved()
    engine = NumpyEngine(config, V, threads=1)
    engine.load(initial_weights(engine.rows, 0))
    rng = np.random.default_rng(0)
    for step in range(3):
        tokens, targets = rng.integers(0, V, (2, T)), rng.integers(0, V, (2, T))
        engine.accumulate(Batch(tokens, targets, step, np.arange(2)), 1 / (2 * T))
        engine.update(1e-3)
    return resident_bytes("VmHWM") - before


def compare_layers(lengths: list[int], window: int, seconds: float) -> None:
    print(
        f"forward and backward of one layer, {H} heads of {Q}, one text, window {window or 'none'}"
    )
    names = list(ways(lengths[0], window))
    print(
        f"{'T':>6}",
        *(f"{name + ', ms':>10}  {'MB':>6}" for name in names),
        "  x plain in time, memory",
        sep="  ",
    )
    fast = {}
    for T in lengths:
        makers = ways(T, window)
        steps = {name: make() for name, make in makers.items()}
        results = {name: step() for name, step in steps.items()}
        for name, result in results.items():
            assert (
                np.abs(result - results["flash"]).max() < 1e-4 * np.abs(results["flash"]).max()
            ), name
        times = take_turns(steps, seconds, turn=0.1)
        del steps, results
        memory = {
            name: growth(["--measure", name, "--length", str(T), "--window", str(window)])
            for name in makers
        }
        row = [f"{T:6}"]
        for name in names:
            known = name in times
            row.append(
                f"{1e3 * statistics.median(times[name]):10,.1f}  {memory[name]:6,.0f}"
                if known
                else " " * 18
            )
        if "plain" in times:
            fast[T] = ratio(times, "flash", "plain")
            row.append(f"  {fast[T]:4.2f}, {memory['plain'] / memory['flash']:.1f}")
        print(*row, sep="  ", flush=True)
    slower = [T for T, times_as_fast in fast.items() if times_as_fast < 1]
    faster = [T for T in fast if max(slower, default=0) < T]
    print(
        f"flash is as fast as plain from T = {min(faster)} on"
        if faster
        else "flash is slower at all these lengths"
    )


def compare_training(T: int) -> None:
    print(
        f"training with the NumPy engine, 4 layers, 4 heads, width 128, three steps of 2 x {T} tokens, one at a time"
    )
    taken = {
        way: growth(["--measure", way, "--training", "--length", str(T)])
        for way in ("plain", "flash")
    }
    for way, megabytes in taken.items():
        print(f"--attention {way}: {megabytes:,.0f} MB")
    print(f"plain takes {taken['plain'] / taken['flash']:.1f} times as much")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=5, help="for a length; three rounds at least"
    )
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--length", type=int, default=4096, help="of --training")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.measure:
        print(
            training_growth(args.measure, args.length)
            if args.training
            else layer_growth(args.measure, args.length, args.window)
        )
        return
    libraries = ["numpy", "torch"] if importlib.util.find_spec("torch") else ["numpy"]
    print(heading(*libraries, threads=1))
    if args.training:
        compare_training(args.length)
    else:
        compare_layers(args.lengths, args.window, args.seconds)


if __name__ == "__main__":
    main()
