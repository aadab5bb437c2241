"""Time and memory of attention against the context length: plain, flash and PyTorch's own.

    python benchmarks/attention_memory.py [--window 256] [--lengths 256 1024 4096] [--seconds 5]
    python benchmarks/attention_memory.py --training [--length 4096]

The first command computes one attention layer, 4 heads of size 32, forward and backward for one
text, in float32 on one thread. For time, the implementations take turns. For memory, each runs in a
fresh process (Linux); the figure is the growth of the process beyond its inputs and the loaded
libraries, and includes the result. Plain attention is left out where it would need more than 8 GB.
The last line prints the smallest length from which on flash attention is as fast as plain.

--training trains a small model (4 layers, 4 heads, width 128) for three steps, one text at a time,
with plain and with flash attention. The figure is the growth of the process since the import of
glasslm.
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

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one thread, as in each worker of the engine
import numpy as np

from glasslm.config.schema import (
    AttentionName,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.numpy.attention import attention
from glasslm.engines.numpy.buffer_pool import BufferPool
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.numpy.flash import flash_attention
from glasslm.engines.protocol import Batch
from glasslm.model.parameters import initial_weights
from paired import heading, ratio, take_turns

H, Q, V = 4, 32, 65
LENGTHS = (256, 384, 512, 1024, 2048, 4096, 8192, 16384)
MAX_PLAIN_BYTES = 8e9
Step = Callable[[], np.ndarray]  # forward and backward; returns the gradients (1, T, 3H, Q)


def numpy_step(implementation: str, T: int, window: int) -> Step:
    """A step of the NumPy engine's attention, `plain` or `flash`."""
    qkv, dout = random_inputs(T)
    new = BufferPool(np.float32)

    def step() -> np.ndarray:
        heads, upstream = new(qkv.shape), new(dout.shape)  # attention overwrites both
        heads[...], upstream[...] = qkv, dout
        qk, v = heads[:, :, : 2 * H], heads[:, :, 2 * H :]
        if implementation == "plain":
            _, backward = attention(qk, v, None, None, new, window)
        else:
            _, backward = flash_attention(qk, v, None, window, new)
        return backward(upstream)

    return step


def torch_step(T: int, window: int) -> Step:
    """A step of PyTorch's scaled_dot_product_attention."""
    import torch

    torch.set_num_threads(1)
    qkv, dout = (torch.from_numpy(x) for x in random_inputs(T))
    mask = None  # is_causal replaces the mask
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


def random_inputs(T: int) -> tuple[np.ndarray, ...]:
    """Random queries, keys and values (1, T, 3H, Q), and a gradient of the output (1, T, H, Q)."""
    rng = np.random.default_rng(T)
    return tuple(rng.standard_normal((1, T, heads, Q), dtype=np.float32) for heads in (3 * H, H))


def step_factories(T: int, window: int) -> dict[str, Callable[[], Step]]:
    """The functions that make a step, by the name of the implementation."""
    factories: dict[str, Callable[[], Step]] = {}
    if 4 * T * T * (2 * H + 1) < MAX_PLAIN_BYTES:  # scores, their gradients and the mask
        factories["plain"] = partial(numpy_step, "plain", T, window)
    factories["flash"] = partial(numpy_step, "flash", T, window)
    if importlib.util.find_spec("torch"):
        factories["torch"] = partial(torch_step, T, window)
    return factories


def resident_bytes(field: str) -> int:
    """Resident memory of this process: `VmRSS` (now) or `VmHWM` (the peak)."""
    (kilobytes,) = re.findall(
        rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii")
    )
    return int(kilobytes) * 1024


def memory_growth(arguments: list[str]) -> float:
    """Memory growth that a fresh process prints for these arguments, in MB."""
    command = [sys.executable, __file__, *arguments]
    return (
        int(subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8").stdout)
        / 1e6
    )


def layer_growth(implementation: str, T: int, window: int) -> int:
    """Peak memory that one step of a layer adds, in bytes."""
    step_factories(256, window)[implementation]()()  # the first call loads libraries
    step = step_factories(T, window)[implementation]()
    before = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - before


def training_growth(implementation: AttentionName, T: int) -> int:
    """Peak memory that three training steps add to this process, in bytes."""
    before = resident_bytes("VmRSS")
    config = RunConfig(
        model=ModelConfig(block_size=T, attention=implementation),
        optimizer=OptimizerConfig(optimizer="adamw"),
        train=TrainConfig(batch_size=2, micro_batch_size=1),
    ).resolve()
    engine = NumpyEngine(config, V, threads=1)
    engine.load(initial_weights(engine.table, 0))
    rng = np.random.default_rng(0)
    for step in range(3):
        tokens, targets = rng.integers(0, V, (2, T)), rng.integers(0, V, (2, T))
        engine.accumulate(Batch(tokens, targets, step, np.arange(2)), 1 / (2 * T))
        engine.update(1e-3)
    return resident_bytes("VmHWM") - before


def compare_layers(lengths: list[int], window: int, seconds: float) -> None:
    """Print time and memory of one layer for each length and implementation."""
    print(
        f"forward and backward of one layer, {H} heads of {Q}, one text, window {window or 'none'}"
    )
    names = list(step_factories(lengths[0], window))
    print(
        f"{'T':>6}",
        *(f"{name + ', ms':>10}  {'MB':>6}" for name in names),
        "  x plain in time, memory",
        sep="  ",
    )
    speed_ups = {}  # flash against plain, by length
    for T in lengths:
        factories = step_factories(T, window)
        steps = {name: make_step() for name, make_step in factories.items()}
        results = {name: step() for name, step in steps.items()}
        for name, result in results.items():
            assert (
                np.abs(result - results["flash"]).max() < 1e-4 * np.abs(results["flash"]).max()
            ), name
        times = take_turns(steps, seconds, turn=0.1)
        del steps, results
        memory = {
            name: memory_growth(["--measure", name, "--length", str(T), "--window", str(window)])
            for name in factories
        }
        row = [f"{T:6}"]
        for name in names:
            row.append(
                f"{1e3 * statistics.median(times[name]):10,.1f}  {memory[name]:6,.0f}"
                if name in times
                else " " * 18
            )
        if "plain" in times:
            speed_ups[T] = ratio(times, "flash", "plain")
            row.append(f"  {speed_ups[T]:4.2f}, {memory['plain'] / memory['flash']:.1f}")
        print(*row, sep="  ", flush=True)
    slower = [T for T, speed_up in speed_ups.items() if speed_up < 1]
    faster = [T for T in speed_ups if max(slower, default=0) < T]
    print(
        f"flash is as fast as plain from T = {min(faster)} on"
        if faster
        else "flash is slower at all these lengths"
    )


def compare_training(T: int) -> None:
    """Print the memory of training with plain and with flash attention."""
    print(
        "training with the NumPy engine, 4 layers, 4 heads, width 128, "
        f"three steps of 2 x {T} tokens, one text at a time"
    )
    memory = {
        implementation: memory_growth(
            ["--measure", implementation, "--training", "--length", str(T)]
        )
        for implementation in ("plain", "flash")
    }
    for implementation, megabytes in memory.items():
        print(f"--attention {implementation}: {megabytes:,.0f} MB")
    print(f"plain attention takes {memory['plain'] / memory['flash']:.1f} times as much memory")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=5, help="seconds for each length (at least three rounds)"
    )
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--length", type=int, default=4096, help="context length of --training")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # measures in a process of its own
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
