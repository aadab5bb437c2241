"""glasslm: a glass-box language-model lab.

import glasslm

run = glasslm.train(text_file="book.txt", max_steps=500)
print(run.history.best_val_loss)
model = glasslm.load(run.path)
print(model.generate("Once upon a time", temperature=0.8))
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasslm import ops
    from glasslm.config.schema import RunConfig
    from glasslm.course import learn
    from glasslm.inference.trained_model import Model
    from glasslm.runs.run_folder import Run
    from glasslm.training.outcome import Outcome

__version__ = "0.1.0"
__all__ = ["learn", "load", "ops", "train"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The packages `glasslm.ops` and `glasslm.learn`, which are imported on first use."""
        if name == "ops":
            return importlib.import_module("glasslm.ops")
        if name == "learn":
            return importlib.import_module("glasslm.course.learn")
        raise AttributeError(f"module 'glasslm' has no attribute '{name}'")


def train(
    *,
    preset: str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    compile: str = "auto",
    parallel: str = "auto",
    deterministic: bool = False,
    track: str = "",
    ops: str | os.PathLike[str] = "",
    **flags: Any,
) -> Run:
    """Train a model and write its report; returns the run.

    The run folder has the report, the metrics and the checkpoints. On Ctrl-C a checkpoint is saved
    and KeyboardInterrupt is raised; `glasslm resume RUN` continues the run.

    Args:
        preset: The configuration that `flags` change: one of those of `glasslm train --preset`. By
            default quick, or what `max_time` chooses.
        run_dir: The folder of the run; by default a new one under ./runs.
        engine: "numpy", "torch" or "auto".
        device: "cpu", "cuda", "mps" or "auto".
        precision: "fp32", "bf16", "fp16", "fp64" or "auto".
        threads: CPU threads; 0 takes GLASSLM_THREADS, or one per core.
        compile: "on", "off" or "auto": torch.compile, by default if the run repays it.
        parallel: "ddp", "fsdp" or "auto": under torchrun, copies of the model or its shards.
        deterministic: Compute the same bits again on a GPU, at some cost in speed.
        track: "wandb", "tensorboard" or "wandb,tensorboard": shows the run there, too.
        ops: A Python file whose functions replace the engine's operations of the same names.
        **flags: The other flags of `glasslm train` with underscores: text_file, max_steps, d_model,
            lr, init_from ...

    Returns:
        The finished run, with its `path`, `history`, `config` and `tokenizer`. A notebook shows
        its curves and its latest sample.

    Raises:
        InputError: A setting or a text cannot be used (a ValueError).
        DivergedError: Training diverged; the report is written.
        InUseError: Another process trains in `run_dir`.
        ExhaustedError: The disk or the memory is full.

    >>> run = glasslm.train(text_file="book.txt", max_steps=500, d_model=128)
    >>> run.history.best_val_loss
    """
    from pathlib import Path

    from glasslm.config.config_fields import refuse_empty_value
    from glasslm.config.conversion import from_dict, with_flags
    from glasslm.config.schema import ComputeConfig, DataConfig
    from glasslm.config.unused_flags import refuse_unread_settings, refuse_unused_flags
    from glasslm.report import run_report
    from glasslm.text import notify
    from glasslm.training import launch

    settings = {
        "engine": engine, "device": device, "precision": precision, "threads": threads,
        "compile": compile, "parallel": parallel, "deterministic": deterministic,
    }  # fmt: skip
    compute = from_dict(ComputeConfig, settings)
    arguments = {"preset": preset, "run_dir": run_dir, **settings, "track": track}
    arguments |= {**({"ops": os.fspath(ops)} if ops else {}), **flags}
    command = _format_call(arguments)
    for name, value in {"preset": preset, "run_dir": run_dir, **flags}.items():
        if value != vars(DataConfig()).get(name):  # a call may give all fields of a config
            refuse_empty_value(name, value, name)
    preset, defaults = _default_config(preset, flags)
    config = with_flags(defaults, {**flags, **({"ops": os.fspath(ops)} if ops else {})})
    refuse_unused_flags(flags, config.data, config.preference, config.train.init_from)
    refuse_unread_settings(flags, [config])
    path = Path(run_dir) if run_dir else None
    outcome = launch.train(config, compute, path, preset=preset, command=command, track=track)
    run_report.write_after_training(outcome, notify)
    return _finished_run(outcome)


def _default_config(preset: str | None, flags: dict[str, Any]) -> tuple[str, RunConfig]:
    """The config that flags change, and its name for run.json: a preset, or one of fine-tuning."""
    from glasslm.config.recipe import choose_recipe
    from glasslm.config.schema import ALIASES
    from glasslm.errors import InputError
    from glasslm.text import notify
    from glasslm.training.fine_tuning import BaseRun, fine_tuning_config

    if not flags.get("init_from"):
        given_fields = {ALIASES.get(name, name) for name in flags}
        limit = flags.get("max_time")
        max_time = limit if isinstance(limit, str) else None
        recipe = choose_recipe(preset, max_time, given_fields)
        if chosen := recipe.describe():
            notify(chosen)
        return recipe.preset, recipe.config
    if preset is not None:
        raise InputError("both preset and init_from describe a model: give one of them")
    base = BaseRun(os.fspath(flags["init_from"]))
    return "finetuned", fine_tuning_config(base, with_adapters=bool(flags.get("lora_rank")))


def _format_call(arguments: dict[str, Any]) -> str:
    """The call of `train` with these arguments, for run.json; paths become strings."""
    values = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in arguments.items()
    }
    return f"glasslm.train({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _finished_run(outcome: Outcome) -> Run:
    """The run of an outcome; raises the error of one that diverged or was interrupted."""
    from glasslm.errors import DivergedError
    from glasslm.report.notebook import DisplayedRun
    from glasslm.training.interruption import pass_on_signal

    if outcome.status == "diverged":
        raise DivergedError(f"the run in {outcome.run_dir} diverged: see its metrics.jsonl")
    if outcome.status == "interrupted":
        pass_on_signal(
            outcome.signal, f"the run is saved: continue it with `glasslm resume {outcome.run_dir}`"
        )
    return DisplayedRun(outcome.run_dir)


def load(run: str | os.PathLike[str], checkpoint: str | int = "best", **compute: Any) -> Model:
    """Load a trained model.

    Args:
        run: The path of a run, or its name under ./runs.
        checkpoint: "best", "latest" or the step of a checkpoint.
        **compute: engine, device, precision, threads and ops as in `train`; ops="recorded" runs the
            operations in run.json. For texts longer than in training also context (tokens) and
            rope_scaling ("linear" or "ntk").

    Returns:
        The model, which generates text, scores it and returns logits.

    Raises:
        InputError: There is no such run or checkpoint, or a setting cannot be used (a ValueError).
        DamagedError: A file of the run is missing or was altered (an OSError).

    >>> model = glasslm.load("runs/shakespeare-quick")
    >>> model.generate("Once upon a time", temperature=0.8)
    """
    from glasslm.inference.trained_model import load_model
    from glasslm.runs.checkpoint_selector import parse_checkpoint

    if isinstance(checkpoint, str):
        return load_model(run, parse_checkpoint(checkpoint), **compute)
    return load_model(run, checkpoint, **compute)
