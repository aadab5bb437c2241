"""glasslm: a glass-box language-model lab.

import glasslm

run = glasslm.train(text_file="book.txt", max_steps=500)
print(run.history.best_val_loss)
model = glasslm.load(run.path)
print(model.generate("Once upon a time", temperature=0.8))
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasslm.inference.trained_model import Model
    from glasslm.runs.run_folder import Run

__version__ = "0.1.0"
__all__ = ["load", "train"]


def train(
    *,
    preset: str = "tiny",
    run_dir: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    track: str = "",
    **flags: Any,
) -> Run:
    """Train a model; the flags are those of `glasslm train`, with underscores: text_file, max_steps, d_model, lr ...

    `track` shows the run in wandb or tensorboard, or with "wandb,tensorboard" in both.

    Returns the run, with its `path` and `history`; its report is in its folder. Raises what the command line reports:
    InputError (a ValueError) for a wrong setting, DivergedError, ... Ctrl-C saves, and is a KeyboardInterrupt then:
    `glasslm resume` goes on.
    """
    import signal
    from pathlib import Path

    from glasslm.config.conversion import from_dict, with_flags
    from glasslm.config.presets import PRESETS
    from glasslm.config.schema import ComputeConfig
    from glasslm.errors import DivergedError, InputError
    from glasslm.report import run_report
    from glasslm.runs.run_folder import Run
    from glasslm.text import tell
    from glasslm.training import launch
    from glasslm.training.fine_tuning import RANK, Base, recipe

    if preset not in PRESETS:
        raise InputError(f"there is no preset '{preset}': choose from {', '.join(PRESETS)}")
    settings = {"engine": engine, "device": device, "precision": precision, "threads": threads}
    compute = from_dict(ComputeConfig, settings)
    given = {"preset": preset, "run_dir": run_dir, **settings, **flags}
    plain = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in given.items()
    }
    command = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    start = PRESETS[preset]()
    if flags.get("init_from"):
        preset = "finetuned"
        start = recipe(
            Base(os.fspath(flags["init_from"])), rank=RANK if flags.get("lora_rank") else 0
        )
    outcome = launch.train(
        with_flags(start, flags),
        compute,
        Path(run_dir) if run_dir else None,
        preset=preset,
        command=f"glasslm.train({command})",
        track=track,
    )
    run_report.write_after_training(outcome, tell)
    if outcome.status == "diverged":
        raise DivergedError(f"the run in {outcome.run_dir} diverged: see its metrics.jsonl")
    if outcome.status == "interrupted":
        if outcome.signal == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # now that all is saved, it ends the program
        raise KeyboardInterrupt(f"saved in {outcome.run_dir}, which `glasslm resume` goes on with")
    return Run(outcome.run_dir)


def load(run: str | os.PathLike[str], checkpoint: str | int = "best", **compute: Any) -> Model:
    """A trained model, by the path or name of its run, at its best or latest checkpoint or at that of a step.

    `compute`: engine, device, precision and threads; also context and rope_scaling, for texts longer than in training.
    """
    from glasslm.inference import trained_model

    which = (
        checkpoint if isinstance(checkpoint, int) else trained_model.parse_checkpoint(checkpoint)
    )
    return trained_model.load(run, which, **compute)
