"""Going on from a trained model with other text: what the new run starts from, and what it may forget.

Fine-tuning is training whose first weights are another run's, with its architecture and its tokenizer; with adapters
(lora_rank) all but them is frozen. The loop, the checkpoints and the flags are those of every run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from glasslm import files
from glasslm.config.schema import ComputeConfig, DataConfig, ModelConfig, RunConfig
from glasslm.data.batch_sampler import TokenArray
from glasslm.engines.factory import make_engine
from glasslm.errors import GlasslmError, InputError
from glasslm.model.adapters import merged, without_adapters
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint import Best, Checkpoint, Progress
from glasslm.runs.metrics import Line, Log, eval_lines
from glasslm.runs.record import SourceRun, build_merged_record
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, notify

Weights = Iterator[tuple[str, NDArray[Any]]]

RANK = 8
LORA_LR, FULL_LR = 1e-2, 3e-3  # docs/log.md has what was tried
# What may change of an architecture from run to run. The context may where its positions are computed, not learned.
FREE = {"block_size", "dropout", "attention_dropout", "attention", "window", "rope_scaling", "rope_factor",
        "lora_rank", "lora_alpha", "lora_targets"}  # fmt: skip


class Base:
    """The run that another one starts from, at its best checkpoint, adapters merged."""

    def __init__(self, run: str) -> None:
        self.run = Run(run_folder.find(run))
        self.checkpoint = _load_best(self.run)

    @property
    def source(self) -> SourceRun:
        """The base as run.json of the new run names it."""
        return {
            "run": str(self.run.path.resolve()),
            "step": self.checkpoint.step,
            "data_sha256": self.run.record["data"]["sha256"],
        }

    def weights(self) -> dict[str, NDArray[Any]]:
        return merged(self.checkpoint.weights(), self.run.config.model)

    def first_weights(self, config: RunConfig) -> Weights:
        """What a run of this config starts from: these weights, and adapters that do nothing yet."""
        known = self.weights()
        rows = parameter_table(config.model, self.run.tokenizer.vocab_size)
        yield from known.items()
        yield from initial_weights(
            {name: row for name, row in rows.items() if name not in known}, config.train.seed
        )

    def require_fit(self, config: RunConfig) -> None:
        """Raises InputError where these weights and this tokenizer would mean something else to a run of this config.

        A shape that fits is not enough: other heads, say, or another activation leave all shapes as they are.
        """
        here, there = config.model.resolve(), self.run.config.model.resolve()
        for name in (field.name for field in dataclasses.fields(ModelConfig)):
            mine, its = getattr(here, name), getattr(there, name)
            free = name in FREE and not (name == "block_size" and there.position == "learned")
            if mine != its and not free:
                raise InputError(
                    f"{name} is {mine}, but {self.run.path} was trained with {its}: leave out "
                    f"--{name.replace('_', '-')}, or train a new model instead of going on from this one"
                )
        if config.data.tokenizer != self.run.config.data.tokenizer:
            raise InputError(
                f"tokenizer is {config.data.tokenizer}, but the weights of {self.run.path} belong to its own: leave "
                "out --tokenizer, or train a new model"
            )

    def old_text(self, notify: Notify) -> TokenArray | None:
        """The validation tokens that this run was measured on; None, and a word why, where its text is gone."""
        run = self.run
        try:
            return run.dataset(notify).val.tokens
        except GlasslmError as error:
            notify(
                f"note: what is forgotten of {run.path} is not measured, because its text is not there: {error}"
            )
            return None


def recipe(base: Base, rank: int) -> RunConfig:
    """The defaults of fine-tuning: the base's architecture, few steps, low rates; with adapters of some rank, or 0."""
    config = base.run.config
    return RunConfig(
        model=dataclasses.replace(config.model, lora_rank=rank),
        data=DataConfig(tokenizer=config.data.tokenizer, vocab_size=config.data.vocab_size),
        optimizer=dataclasses.replace(
            config.optimizer, optimizer="adamw", lr=LORA_LR if rank else FULL_LR, min_lr=0.0, warmup_steps=20
        ),
        train=dataclasses.replace(
            config.train, max_steps=300, epochs=None, max_time=None, eval_interval=50, checkpoint_interval=100,
            sample_interval=100, stop_at_loss=None, patience=None, init_from=str(base.run.path),
        ),
    )  # fmt: skip


def merge(run: Run, run_dir: Path, command: str, notify: Notify = notify) -> Path:
    """A new run whose one checkpoint is `run` with its adapters merged into the weights; its folder.

    Raises InputError where `run` has no adapters, or `run_dir` cannot be made.
    """
    if not run.config.model.lora_rank:
        raise InputError(f"{run.path} has no adapters to merge: it was trained without --lora-rank")
    run_folder.require_new(run_dir)
    held = _load_best(run, notify)
    config = dataclasses.replace(run.config, model=without_adapters(run.config.model))
    vocab_size = run.tokenizer.vocab_size
    exact = run.record.get("precision") == "fp64"
    engine = make_engine(
        config, vocab_size, ComputeConfig(engine="numpy", precision="fp64" if exact else "fp32")
    )
    engine.load(merged(held.weights(), run.config.model).items())
    merged_from: SourceRun = {"run": str(run.path), "step": held.step}
    record = build_merged_record(run.record, config, command, merged_from)
    kept = [
        line
        for line in run.metrics()
        if line["kind"] in ("plan", "eval", "sample") and line["step"] <= held.step
    ]
    best = _measured(kept, held.step)
    with files.lock(run_dir):
        run_folder.create(run_dir, record, run.tokenizer.to_json())
        with Log(run_dir / "metrics.jsonl", 0) as log:
            for line in kept:
                log.write(line)
            progress = Progress(
                held.step, held.progress.updates, held.progress.tokens, log.bytes, best
            )
            checkpoint.save(
                run_dir,
                engine,
                progress,
                held.identity._replace(config_sha256=Run(run_dir).config_sha256),
            )
            best_step, best_loss = best or (None, None)
            log.write(
                {
                    "kind": "end",
                    "step": held.step,
                    "status": "finished",
                    "best_step": best_step,
                    "best_loss": best_loss,
                }
            )
    return run_dir


def _measured(lines: Sequence[Line], step: int) -> Best | None:
    """The validation loss of the weights of a step, as it was measured last: on the whole split, if it was."""
    losses = [line["loss"] for line in eval_lines(lines) if line["step"] == step]
    return Best(step, losses[-1]) if losses and losses[-1] is not None else None


def _load_best(run: Run, warn: Notify | None = None) -> Checkpoint:
    """The best checkpoint of a run. Raises DamagedError where it belongs to something else."""
    held = checkpoint.load(run.path, "best", warn)
    checkpoint.require_identity(held, run.identity)
    return held
