"""Wall time of one small ablation with local workers and with Ray on this machine.

    pip install 'glasslm[ray]'
    python benchmarks/runner_speed.py --text-file shakespeare.txt [--max-steps 300 --rounds 3]

A baseline and two variants with two seeds each are six runs of the preset quick, one core each. The
two commands take turns, and each is timed from the start of its process to its end: Ray starts its
own processes every time, as for a user. Both must find the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
from paired import heading, ratio, take_turns

RUNNERS = ("local", "ray")


def ablate(args: argparse.Namespace, runner: str, losses: dict[str, list[list[float]]]) -> None:
    """One study with one runner; keeps its losses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "glasslm", "ablate", "--preset", "quick"),
            *("--axes", "lr=2e-3/1e-2", "--seeds", "2", "--max-steps", str(args.max_steps)),
            *("--text-file", str(args.text_file), "--runner", runner, "--json"),
            *("--out", str(Path(folder) / "study")),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        variants = json.loads(done.stdout)["variants"]
    losses[runner] = [variant["losses"] for variant in variants]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    losses: dict[str, list[list[float]]] = {}
    variants = {runner: partial(ablate, args, runner, losses) for runner in RUNNERS}
    print(heading("numpy", "ray", threads=os.cpu_count() or 1))
    times = take_turns(variants, seconds=0, rounds=args.rounds)
    assert losses["local"] == losses["ray"], losses
    for runner in RUNNERS:
        seconds = ", ".join(f"{value:.1f}" for value in times[runner])
        print(f"{runner:5}  {seconds} s, {ratio(times, runner, 'local'):.2f} of local's speed")
    print(f"the same losses of six runs: {losses['local']}")


if __name__ == "__main__":
    main()
