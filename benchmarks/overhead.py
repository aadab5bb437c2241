"""What trust costs: the share of training time that hashing, guarding and logging take, at a preset's own intervals.

    python benchmarks/overhead.py [--preset nanogpt] [--steps 8] [--engine torch] [--text-file PATH]

A few real steps are trained with a clock around everything that exists for the sake of trust: judging each step against
full windows, writing and showing each line, and saving each checkpoint, with its test for finite numbers, its hashes
and its waiting for the disk. A difference this small between two whole runs would drown in the machine's noise.
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
from glasslm.runs.metrics import Log
from glasslm.training import launch
from glasslm.training.display import Display
from glasslm.training.guard import WINDOW, Guard
from glasslm.training.loop import Loop

SPENT: dict[str, list[float]] = defaultdict(list)


def clocked(owner: Any, name: str, part: str) -> None:
    """Every call of owner.name adds its seconds to a part."""
    right: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return right(*arguments, **more)
        finally:
            SPENT[part].append(time.perf_counter() - began)

    setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nanogpt", choices=list(PRESETS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--text-file", default=None)
    chosen = parser.parse_args()
    preset = PRESETS[chosen.preset]()
    text = {"text_file": (chosen.text_file,)} if chosen.text_file else {"corpus": "python"}
    few = {
        "max_steps": chosen.steps,
        "warmup_steps": 1,
        "eval_interval": 10**6,
        "sample_interval": 0,
    }
    config = with_flags(
        preset, few | {"log_interval": 1, "checkpoint_interval": max(1, chosen.steps // 2)} | text
    )

    right_limits = Guard.limits.fget  # type: ignore[attr-defined]

    def limits(guard: Guard) -> Any:
        began = time.perf_counter()
        try:
            return right_limits(guard)
        finally:
            SPENT["guarding"].append(time.perf_counter() - began)

    right_init = Guard.__init__

    def filled(guard: Guard, *arguments: Any) -> None:
        """With full windows, as after 128 steps, that nothing stands out of."""
        right_init(guard, *arguments)
        guard.losses.extend([0.0, 4.0] * WINDOW)
        guard.norms.extend([0.0, 100.0] * WINDOW)

    Guard.__init__ = filled  # type: ignore[assignment, method-assign]
    Guard.limits = property(limits)  # type: ignore[assignment, method-assign]
    clocked(Guard, "judge", "guarding")
    clocked(Log, "write", "logging")
    clocked(Display, "show", "logging")
    clocked(Display, "tick", "logging")
    clocked(checkpoint, "save", "hashing and saving")
    clocked(Loop, "advance", "a step")
    run_report.write = lambda run_dir: run_dir / "report.html"
    with tempfile.TemporaryDirectory() as folder:
        compute = ComputeConfig(engine=chosen.engine)
        launch.train(
            dataclasses.replace(config), compute, Path(folder, "run"), preset=chosen.preset
        )

    steps = sorted(SPENT["a step"][1:])  # the first takes fresh memory
    step = steps[len(steps) // 2]
    saves = SPENT["hashing and saving"]
    interval = preset.train.checkpoint_interval
    every = {
        "guarding": sum(SPENT["guarding"]) / chosen.steps,
        "logging": sum(SPENT["logging"]) / len(SPENT["a step"]) / preset.train.log_interval,
        "hashing and saving": max(saves)
        / min(interval, preset.train.eval_interval),  # a better loss is saved, too
    }
    print(
        f"{chosen.preset}: {step:.3f} s a step; a checkpoint takes {max(saves):.2f} s (the slowest of {len(saves)})"
    )
    for part, seconds in every.items():
        print(f"  {part:<20} {1e3 * seconds:9.3f} ms a step  {seconds / step:8.3%}")
    print(
        f"  {'together':<20} {1e3 * sum(every.values()):9.3f} ms a step  {sum(every.values()) / step:8.3%}"
    )


if __name__ == "__main__":
    main()
