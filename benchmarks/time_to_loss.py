"""Wall time to a validation loss of 1.88 on Shakespeare: glasslm against nanoGPT on a CPU.

    python benchmarks/time_to_loss.py --nanogpt PATH/TO/nanoGPT --text PATH/TO/tinyshakespeare.txt
        [--engine numpy torch --pairs 3]

nanoGPT runs the command that its README gives for a CPU (published loss 1.88) to its end. glasslm
runs `glasslm train --stop-at-loss 1.88` with the flags below, once with each requested engine, and
must reach the loss on the whole validation split. Each command is timed from the start of its
process to the end, including imports, tokenizing, compiling, checkpoints and the report. The
commands take turns. The checkout is copied, not changed. nanoGPT runs with this interpreter, which
must have torch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from glasslm.engines.resources import thread_count
from paired import heading

GOAL_LOSS = 1.88
GLASSLM_FLAGS = (
    f"--preset tiny --stop-at-loss {GOAL_LOSS} --qk-norm --block-size 64 --batch-size 32 "
    "--max-steps 145 --warmup-steps 15 --eval-interval 145 --sample-interval 0 "
    "--checkpoint-interval 1000"
).split()
NANOGPT_FLAGS = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()


def time_glasslm(
    text: Path, folder: Path, flags: Sequence[str], goal: float
) -> tuple[float, float, int]:
    """Seconds of the whole command, the lowest loss on the whole validation split, and its step.

    Exits with a message where the command fails or does not reach the goal.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "glasslm",
        "train",
        "--text-file",
        str(text),
        "--run-dir",
        str(folder),
        *flags,
    ]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    loss, step = min(
        (line["loss"], line["step"]) for line in lines if line["kind"] == "eval" and line["whole"]
    )
    if loss > goal:
        raise SystemExit(
            f"glasslm did not reach a loss of {goal}: "
            f"the lowest was {loss:.4f} at step {step}, after {seconds:.0f} s"
        )
    return seconds, loss, step


def time_nanogpt(
    checkout: Path, out: Path, flags: Sequence[str], goal: float = 0.0
) -> tuple[float, float]:
    """Seconds of the whole command and the lowest validation loss that it prints.

    The command is ended when a loss reaches the goal. nanoGPT estimates its validation losses from
    a few batches.
    """
    command = [sys.executable, "-u", "train.py", *flags, f"--out_dir={out}"]
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        lowest = math.inf
        assert run.stdout is not None
        for line in run.stdout:
            if match := re.search(r"val loss ([\d.]+)", line):
                lowest = min(lowest, float(match[1]))
            if lowest <= goal:
                run.terminate()
                break
    seconds = time.perf_counter() - start
    if run.returncode and lowest > goal:
        raise SystemExit(f"nanoGPT's command failed: {' '.join(command)}")
    return seconds, lowest


def copy_nanogpt(checkout: Path, folder: Path, text: Path) -> Path:
    """Copy a checkout of nanoGPT and prepare its Shakespeare data from `text`; returns the copy."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git"))
    data = folder / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="a file with tiny Shakespeare")
    parser.add_argument("--engine", nargs="+", default=["numpy"], choices=["numpy", "torch"])
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {engine: [] for engine in args.engine}
    print(heading("numpy", "torch", threads=thread_count(0)))
    print(f"glasslm train {' '.join(GLASSLM_FLAGS)} --engine {' or '.join(args.engine)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GLASSLM_CACHE"] = str(folder / "cache")
        checkout = copy_nanogpt(args.nanogpt, folder / "nanoGPT", args.text)
        for _ in range(args.pairs):
            theirs, loss = time_nanogpt(checkout, folder / "out", NANOGPT_FLAGS)
            print(f"nanoGPT {loss:.4f} after {theirs:.1f} s", end="")
            for engine in args.engine:
                shutil.rmtree(folder / "cache", ignore_errors=True)  # each run tokenizes again
                flags = [*GLASSLM_FLAGS, "--engine", engine]
                ours, loss, step = time_glasslm(args.text, folder / "run", flags, GOAL_LOSS)
                ratios[engine].append(theirs / ours)
                print(
                    f"; {engine} {loss:.4f} at step {step} after {ours:.1f} s: "
                    f"{theirs / ours:.2f}x",
                    end="",
                )
            print(flush=True)
    for engine, pairs in ratios.items():
        print(
            f"{engine} {statistics.median(pairs):.2f} times as fast (median of {len(pairs)} pairs)"
        )


if __name__ == "__main__":
    main()
