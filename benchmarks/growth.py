"""Time and memory against one size at a time, beside the law that each should follow.

    python benchmarks/growth.py [--parts context batch width depth vocabulary corpus threads ranks]
        [--seconds 3 --json growth.json --figure docs/growth.png]

The base is the preset tiny: 4 layers, width 128, 128 tokens of context, 16 sequences, 65
characters, NumPy, float32. Each point is a process of its own, with three steps at least. The parts
context to corpus take one thread and count processor time, so that other programs disturb them
less. threads and ranks count the clock.

The law of a pass forward and backward is that of its products: 6 FLOPs a weight and token, and
12 L H Q T for attention (glasslm.model.flops); so GFLOP/s is constant where it holds. The law of a
corpus is a straight line. `bend` is the time divided by the law, and 1 at the point where that is
least: 2 means twice the time that the law promises. Memory is the growth of the process since the
import of glasslm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the engine has threads of its own
import numpy as np

from glasslm import files
from glasslm.config.conversion import with_flags
from glasslm.config.presets import tiny
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.batch_sampler import Sampler, make_sampler
from glasslm.data.dataset import prepare_dataset
from glasslm.data.sources import corpora
from glasslm.data.token_file import Tokens
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.training.memory import peak_memory_bytes
from paired import heading

Point = dict[str, float]  # seconds, law, megabytes, and others by part
BASE = {"block_size": 128, "batch_size": 16}
VOCABULARY = 65
BATCHES = 100  # drawn from a corpus, for each time that is taken
VALUES: dict[str, tuple[int, ...]] = {
    "context": (64, 256, 1024, 4096, 16384),
    "batch": (1, 4, 16, 64, 256),
    "width": (64, 128, 256, 512, 1024),
    "depth": (1, 2, 4, 8, 16, 32),
    "vocabulary": (65, 512, 4096, 16384, 50257),
    "corpus": (1, 8, 64, 512, 2048),
    "threads": (1, 2),
    "ranks": (1, 2),
}
LABELS = {
    "context": "tokens of context",
    "batch": "sequences of 128 tokens",
    "width": "width of the model",
    "depth": "layers",
    "vocabulary": "tokens in the vocabulary",
    "corpus": "MB of text",
    "threads": "threads",
    "ranks": "processes (gloo)",
}


def peak_megabytes() -> float:
    """The largest resident memory that this process has had; nan on Windows."""
    peak = peak_memory_bytes()
    return float("nan") if peak is None else peak / 1e6


def config_of(part: str, value: int) -> tuple[RunConfig, int]:
    """The base with one size changed, and the size of the vocabulary."""
    changes: dict[str, Any] = dict(BASE)
    vocabulary = VOCABULARY
    if part == "context":  # at least 2,048 tokens a step
        changes |= {"block_size": value, "batch_size": max(1, 2048 // value)}
    elif part == "batch":
        changes["batch_size"] = value
    elif part == "width":
        changes |= {"d_model": value, "n_heads": value // 32}
    elif part == "depth":
        changes["n_layers"] = value
    elif part == "vocabulary":
        vocabulary = value
    return with_flags(tiny(), changes).resolve(), vocabulary


def medians(
    works: Sequence[Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> list[float]:
    """The median times of calls in turns: three rounds at least, after one that is not counted."""
    rounds: list[list[float]] = []
    while len(rounds) < 4 or sum(map(sum, rounds)) < seconds:
        rounds.append([])
        for work in works:
            start = clock()
            work()
            rounds[-1].append(clock() - start)
    return [statistics.median(times) for times in zip(*rounds[1:])]


def measure_training(part: str, value: int, seconds: float) -> Point:
    """Passes forward and backward over a batch, and updates, in this process."""
    before = peak_megabytes()
    config, vocabulary = config_of(part, value)
    threads = value if part == "threads" else 1
    clock = time.perf_counter if part == "threads" else time.process_time
    table = parameter_table(config.model, vocabulary)
    engine = make_engine(config, vocabulary, ComputeConfig("numpy", threads=threads))
    engine.load(initial_weights(table, 0))
    B, T = config.train.batch_size, config.model.block_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (B, T + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], 0, np.arange(B))
    pass_s, update_s = medians(
        [lambda: engine.accumulate(batch, 1 / (B * T)), lambda: engine.update(1e-3)], seconds, clock
    )
    flops = B * T * flops_per_token(config.model, vocabulary)
    return {
        "seconds": pass_s,
        "law": flops / threads,
        "update": update_s,
        "parameters": table.total,
        "speed": flops / pass_s / 1e9,
        "megabytes": peak_megabytes() - before,
    }


def write_text(path: Path, megabytes: int) -> None:
    """Lines of eight words of 3 to 9 letters, drawn from 50,000; the first 8 MB again and again."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("etaoinshrdlu"), n)) for n in draw.integers(3, 10, 50_000)]
    lines = draw.zipf(1.2, (140_000, 8)) % len(words)
    block = "".join(" ".join(words[i] for i in line) + "\n" for line in lines).encode()
    block = block[: min(8, megabytes) * 1_000_000]
    with path.open("wb") as file:
        while file.tell() < megabytes * 1_000_000:
            file.write(block)


def measure_corpus(megabytes: int) -> Point:
    """Read, split and tokenize a text by characters; then draw batches from it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GLASSLM_CACHE"] = folder
        path = Path(folder) / "text.txt"
        command = [sys.executable, __file__, "--write-text", str(path), str(megabytes)]
        subprocess.run(command, check=True)  # in a process of its own, whose memory does not count
        before = peak_megabytes()
        start = time.process_time()
        config = with_flags(tiny(), {**BASE, "text_file": (str(path),)}).resolve()
        source = corpora.find_source(config.data, say_nothing)
        dataset = prepare_dataset(config.data, source, say_nothing)
        prepared = time.process_time() - start
        memory = peak_megabytes() - before
        sampler = make_sampler(config, dataset)
        draw = partial(draw_batches, sampler, dataset.train.tokens, config.train.batch_size)
        (draw_s,) = medians([draw], 0.5, time.process_time)
    return {
        "seconds": prepared,
        "law": megabytes,
        "batch": draw_s / BATCHES,
        "speed": megabytes / prepared,
        "megabytes": memory,
    }


def say_nothing(_: str) -> None:
    """Instead of the notes that a command would print."""


def draw_batches(sampler: Sampler, tokens: Tokens, batch_size: int) -> None:
    """Draw the batches of some steps from all over the text."""
    for step in range(BATCHES):
        sampler.batch(tokens, step, np.arange(batch_size))


def measure_ranks(count: int) -> Point:
    """Steps of 32 x 128 tokens in PyTorch, of one process with two threads or of two with one."""
    with tempfile.TemporaryDirectory() as folder:
        text, run = Path(folder) / "text.txt", Path(folder) / "run"
        write_text(text, 1)
        threads = 2 // count
        group = f"torch.distributed.run --standalone --nproc-per-node {count} -m " * (count > 1)
        command = (
            f"-m {group}glasslm train --text-file {text} --run-dir {run} --preset tiny "
            "--engine torch --compile off --batch-size 32 --max-steps 30 --log-interval 1 "
            f"--eval-interval 30 --sample-interval 0 --threads {threads}"
        )
        environment = os.environ | {"GLASSLM_CACHE": folder, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [sys.executable, *command.split()],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
        speeds = [line["timing"]["tokens_per_s"] for line in lines if line["kind"] == "step"]
    speed = statistics.median(speeds[5:])
    return {"seconds": 32 * 128 / speed, "law": 1, "speed": speed}


def measure(part: str, value: int, seconds: float) -> Point:
    """One point, in this process."""
    if part == "corpus":
        return measure_corpus(value)
    if part == "ranks":
        return measure_ranks(value)
    return measure_training(part, value, seconds)


def measure_apart(part: str, value: int, seconds: float) -> Point:
    """The point, measured by this program in a process of its own."""
    command = [sys.executable, __file__, "--point", part, str(value), "--seconds", str(seconds)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8").stdout
    point: Point = json.loads(answer)
    return point


def bends(points: dict[int, Point]) -> dict[int, float]:
    """The time over the law, by value, as a multiple of the least."""
    quotients = {value: point["seconds"] / point["law"] for value, point in points.items()}
    return {value: x / min(quotients.values()) for value, x in quotients.items()}


def print_part(part: str, points: dict[int, Point]) -> None:
    """Print a table."""
    unit = {"corpus": "MB/s", "ranks": "tokens/s"}.get(part, "GFLOP/s")
    print(f"\n{LABELS[part]:>24}  {'ms':>10}  {unit:>8}  {'bend':>5}  {'MB':>7}  others")
    for (value, point), bend in zip(points.items(), bends(points).values()):
        row = [f"{value:24,}", f"{1e3 * point['seconds']:10,.1f}", f"{point['speed']:8,.1f}"]
        row += [f"{bend:5.2f}", f"{point.get('megabytes', 0):7,.0f}"]
        if "update" in point:
            row.append(f"update {1e3 * point['update']:.1f} ms, {point['parameters']:,} parameters")
        elif "batch" in point:
            row.append(f"a batch is drawn in {1e6 * point['batch']:.0f} us")
        print(*row, sep="  ", flush=True)


def draw_figure(path: Path, parts: dict[str, dict[int, Point]]) -> None:
    """Seconds against each size, with the law through the point where the bend is 1."""
    from matplotlib.figure import Figure

    from glasslm.report import figures

    colours = figures.PRINT_PALETTE
    columns = 3
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(4 * columns, 3.1 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_visible(False)
    for axes, (part, points) in zip(grid, parts.items()):
        axes.set_visible(True)
        values = list(points)
        unit = "seconds" if part == "corpus" else "seconds a step"
        figures.style_axes(axes, part, unit, colours)
        least = min(point["seconds"] / point["law"] for point in points.values())
        law = [points[value]["law"] * least for value in values]
        axes.plot(values, law, color=colours.faint, linestyle="--", label="law")
        seconds = [points[value]["seconds"] for value in values]
        axes.plot(values, seconds, color=colours.train, marker="o", markersize=4, label="measured")
        axes.set(xscale="log", yscale="log", xlabel=LABELS[part])
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        figures.add_legend(axes, colours)
    files.write_atomic(path, figures.png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--seconds", type=float, default=3, help="of passes, for each point")
    parser.add_argument("--json", type=Path, help="keep all points in this file, and add to it")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--largest", type=int, default=0, help="leave out values above it")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)  # measures in this process
    parser.add_argument("--write-text", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_text:
        write_text(Path(args.write_text[0]), int(args.write_text[1]))
        return
    if args.point:
        print(json.dumps(measure(args.point[0], int(args.point[1]), args.seconds)))
        return
    print(heading("numpy", threads=1))
    earlier = json.loads(args.json.read_text("utf-8")) if args.json and args.json.exists() else {}
    parts: dict[str, dict[int, Point]] = {
        part: {int(value): point for value, point in points.items()}
        for part, points in earlier.items()
    }
    for part in args.parts:
        values = [value for value in VALUES[part] if not args.largest or value <= args.largest]
        parts[part] = {value: measure_apart(part, value, args.seconds) for value in values}
        print_part(part, parts[part])
        if args.json:
            files.write_atomic(args.json, json.dumps(parts, indent=1).encode())
    if args.figure:
        draw_figure(args.figure, {part: parts[part] for part in VALUES if part in parts})


if __name__ == "__main__":
    main()
