"""Wall time to a validation loss of 1.88 on Shakespeare: glasslm's NumPy engine against nanoGPT's own CPU command.

    python benchmarks/time_to_loss.py --nanogpt PATH/TO/nanoGPT --text PATH/TO/tinyshakespeare.txt [--pairs 3]

nanoGPT runs the command that its README gives for a CPU (which publishes a loss of 1.88), to its end. glasslm runs
`glasslm train --stop-at-loss 1.88` with the flags below; its time is from the start of the process until the evaluation
line is on the disk, over the whole validation split. The two take turns. The checkout is copied, not changed; its
interpreter is this one, which must have torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL = 1.88
GLASSLM = (
    f"--stop-at-loss {GOAL} --qk-norm --block-size 64 --batch-size 32 --max-steps 145 --warmup-steps 15 "
    "--eval-interval 145 --sample-interval 0 --checkpoint-interval 1000"
).split()
NANOGPT = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split(" ")


def glasslm_seconds(text: Path, folder: Path) -> tuple[float, float, int]:
    """Seconds until the evaluation line that reaches the goal is written, its loss and its step."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "glasslm", "train", "--text-file", str(text), "--run-dir", str(folder), *GLASSLM]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = None
    while found is None and process.poll() is None:
        time.sleep(0.05)
        found = reached(folder / "metrics.jsonl")
    seconds = time.perf_counter() - start
    process.wait()
    line = found or reached(folder / "metrics.jsonl")
    if line is None:
        raise SystemExit(f"glasslm did not reach {GOAL}")
    return seconds, line["loss"], line["step"]


def reached(metrics: Path) -> dict | None:
    if not metrics.exists():
        return None
    for raw in metrics.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue  # being written
        if line["kind"] == "eval" and line["whole"] and line["loss"] <= GOAL:
            return line
    return None


def nanogpt_seconds(checkout: Path, out: Path) -> tuple[float, float]:
    """Seconds of the whole command, and the last validation loss that it prints (an estimate from 20 batches)."""
    start = time.perf_counter()
    command = [sys.executable, "train.py", *NANOGPT, f"--out_dir={out}"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, float(re.findall(r"val loss ([\d.]+)", done.stdout)[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GLASSLM_CACHE"] = str(folder / "cache")
        checkout = folder / "nanoGPT"
        shutil.copytree(args.nanogpt, checkout, ignore=shutil.ignore_patterns(".git"))
        data = checkout / "data" / "shakespeare_char"
        shutil.copy(args.text, data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
        ratios = []
        print(f"{datetime.date.today()}  glasslm train {' '.join(GLASSLM)}")
        for _ in range(args.pairs):
            shutil.rmtree(folder / "cache", ignore_errors=True)  # tokenising counts, each time
            ours, loss, step = glasslm_seconds(args.text, folder / "run")
            theirs, their_loss = nanogpt_seconds(checkout, folder / "out")
            ratios.append(theirs / ours)
            print(f"glasslm {loss:.4f} at step {step} after {ours:.1f} s", end="; ")
            print(f"nanoGPT {their_loss:.4f} after {theirs:.1f} s: {ratios[-1]:.2f}x", flush=True)
        print(f"ratio {statistics.median(ratios):.2f} (median of {len(ratios)} pairs)")


if __name__ == "__main__":
    main()
