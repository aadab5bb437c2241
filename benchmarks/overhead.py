"""Share of training time that hashing, guarding and logging take, at a preset's own intervals.

    python benchmarks/overhead.py [--preset nanogpt] [--steps 8] [--engine torch] [--text-file PATH]

The script trains a few real steps and times three parts: judging each step (with full windows),
writing and showing each line, and saving each checkpoint (with its test for finite numbers, its
hashes and its fsync). The parts are timed directly because the machine's noise hides a difference
this small between two whole runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig
from glasslm.report import run_report
from glasslm.runs import checkpoint
from glasslm.runs.metrics import MetricsLog
from glasslm.training import launch
from glasslm.training.display import Display
from glasslm.training.guard import WINDOW_STEPS, Guard
from glasslm.training.loop import Loop

CALL_SECONDS: dict[str, list[float]] = defaultdict(list)


def time_calls(owner: Any, name: str, part: str) -> None:
    """Wrap owner.name so that every call appends its seconds to CALL_SECONDS[part]."""
    original: Callable[..., Any] = getattr(owner, name)

    def timed_call(*arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments, **keywords)
        finally:
            CALL_SECONDS[part].append(time.perf_counter() - start)

    setattr(owner, name, timed_call)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nanogpt", choices=list(PRESETS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--text-file", default=None)
    args = parser.parse_args()
    preset = PRESETS[args.preset]()
    text = {"text_file": (args.text_file,)} if args.text_file else {"corpus": "python"}
    short_run = {
        "max_steps": args.steps,
        "warmup_steps": 1,
        "eval_interval": 10**6,
        "sample_interval": 0,
    }
    config = with_flags(
        preset,
        short_run | {"log_interval": 1, "checkpoint_interval": max(1, args.steps // 2)} | text,
    )

    time_parts()
    with tempfile.TemporaryDirectory() as folder:
        compute = ComputeConfig(engine=args.engine)
        launch.train(dataclasses.replace(config), compute, Path(folder, "run"), preset=args.preset)
    print_shares(args.preset, args.steps)


def time_parts() -> None:
    """Wrap the functions of each part, so that training fills CALL_SECONDS."""
    original_limits = Guard.limits.fget  # type: ignore[attr-defined]

    def limits(guard: Guard) -> Any:
        start = time.perf_counter()
        try:
            return original_limits(guard)
        finally:
            CALL_SECONDS["guarding"].append(time.perf_counter() - start)

    original_init = Guard.__init__

    def init_with_full_windows(guard: Guard, *arguments: Any) -> None:
        """Initialize a guard with full windows, as after 128 steps, wide enough for every step."""
        original_init(guard, *arguments)
        guard.losses.extend([0.0, 4.0] * WINDOW_STEPS)
        guard.norms.extend([0.0, 100.0] * WINDOW_STEPS)

    Guard.__init__ = init_with_full_windows  # type: ignore[assignment, method-assign]
    Guard.limits = property(limits)  # type: ignore[assignment, method-assign]
    time_calls(Guard, "judge_step", "guarding")
    time_calls(MetricsLog, "write", "logging")
    time_calls(Display, "show", "logging")
    time_calls(Display, "tick", "logging")
    time_calls(checkpoint, "save", "hashing and saving")
    time_calls(Loop, "advance", "a step")
    run_report.write = lambda run_dir, time_share=1.0: run_dir / "report.html"


def print_shares(preset_name: str, n_steps: int) -> None:
    """Print the time of a step and the share of each part in it."""
    preset = PRESETS[preset_name]()
    steps = sorted(CALL_SECONDS["a step"][1:])  # the first allocates memory
    step = steps[len(steps) // 2]
    saves = CALL_SECONDS["hashing and saving"]
    interval = preset.train.checkpoint_interval
    seconds_per_step = {
        "guarding": sum(CALL_SECONDS["guarding"]) / n_steps,
        "logging": sum(CALL_SECONDS["logging"])
        / len(CALL_SECONDS["a step"])
        / preset.train.log_interval,
        # An evaluation with a better loss saves a checkpoint, too.
        "hashing and saving": max(saves) / min(interval, preset.train.eval_interval),
    }
    print(
        f"{preset_name}: {step:.3f} s per step; "
        f"a checkpoint takes {max(saves):.2f} s (the slowest of {len(saves)})"
    )
    for part, seconds in seconds_per_step.items():
        print(f"  {part:<20} {1e3 * seconds:9.3f} ms per step  {seconds / step:8.3%}")
    total = sum(seconds_per_step.values())
    print(f"  {'together':<20} {1e3 * total:9.3f} ms per step  {total / step:8.3%}")


if __name__ == "__main__":
    main()
