"""Fine-tuning: the base run of a new run, and merging of LoRA adapters.

A fine-tuned run starts from the weights of a base run, with its architecture and tokenizer. With
adapters (lora_rank) all other weights are frozen. Loop, checkpoints and flags are those of all
runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, DataConfig, ModelConfig, Precision, RunConfig
from glasslm.data.batch_sampler import TokenArray
from glasslm.engines.factory import make_engine
from glasslm.errors import GlasslmError, InputError
from glasslm.model.adapters import merge_adapters, without_adapters
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint import Best, Checkpoint, Progress
from glasslm.runs.metrics import EndLine, Line, MetricsLog, eval_lines
from glasslm.runs.record import SourceRun, build_merged_record
from glasslm.runs.run_folder import Run
from glasslm.runs.run_lock import lock_run
from glasslm.text import Notify, notify

Weights = Iterator[tuple[str, NDArray[Any]]]

DEFAULT_RANK = 8
LORA_LR, FULL_LR = 1e-2, 3e-3  # peak learning rates; the experiments are in docs/log.md
# Fields of ModelConfig that may differ from those of the base. block_size may not where positions
# are learned.
OVERRIDABLE_FIELDS = {
    "block_size", "dropout", "attention_dropout", "attention", "window", "rope_scaling",
    "rope_factor", "lora_rank", "lora_alpha", "lora_targets",
}  # fmt: skip


class Base:
    """The run that fine-tuning starts from, at its best checkpoint, with adapters merged."""

    def __init__(self, run: str) -> None:
        """`run` is a path or a name under ./runs; DamagedError where its checkpoint is damaged."""
        self.run = Run(run_folder.find_run(run))
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
        """The weights by name, in the shapes of the parameter table, with adapters merged."""
        return merge_adapters(self.checkpoint.weights(), self.run.config.model)

    def first_weights(self, config: RunConfig) -> Weights:
        """The first weights of a run of this config: those of the base, and initial adapters."""
        base_weights = self.weights()
        table = parameter_table(config.model, self.run.tokenizer.vocab_size)
        yield from base_weights.items()
        new_rows = {name: row for name, row in table.items() if name not in base_weights}
        yield from initial_weights(new_rows, config.train.seed)

    def require_fit(self, config: RunConfig) -> None:
        """Raise InputError where `config` has another architecture or tokenizer than the base.

        Equal shapes are not enough: other heads or another activation leave all shapes as they are.
        """
        model, base_model = config.model.resolve(), self.run.config.model.resolve()
        for name in (field.name for field in dataclasses.fields(ModelConfig)):
            value, base_value = getattr(model, name), getattr(base_model, name)
            is_overridable = name in OVERRIDABLE_FIELDS and not (
                name == "block_size" and base_model.position == "learned"
            )
            if value != base_value and not is_overridable:
                raise InputError(
                    f"{name} is {value}, but {self.run.path} was trained with {base_value}: leave "
                    f"out --{name.replace('_', '-')}, or train a new model without --init-from"
                )
        tokenizer, base_tokenizer = config.data.tokenizer, self.run.config.data.tokenizer
        if tokenizer != base_tokenizer:
            raise InputError(
                f"tokenizer is {tokenizer}, but {self.run.path} was trained with {base_tokenizer}: "
                "leave out --tokenizer, or train a new model"
            )

    def old_text(self, notify: Notify) -> TokenArray | None:
        """The base run's validation tokens (N,); None, with a note, where its text is missing."""
        try:
            return self.run.dataset(notify).val.tokens
        except GlasslmError as error:
            notify(
                f"note: forgetting of the text of {self.run.path} is not measured, because the "
                f"text is missing: {error}"
            )
            return None


def fine_tuning_config(base: Base, rank: int) -> RunConfig:
    """The default config of fine-tuning, with adapters of this rank (0: all weights are trained).

    It has the architecture and the tokenizer of the base, few steps and a low learning rate.
    """
    config = base.run.config
    return RunConfig(
        model=dataclasses.replace(config.model, lora_rank=rank),
        data=DataConfig(tokenizer=config.data.tokenizer, vocab_size=config.data.vocab_size),
        optimizer=dataclasses.replace(
            config.optimizer, optimizer="adamw", lr=LORA_LR if rank else FULL_LR, min_lr=0.0,
            warmup_steps=20,
        ),
        train=dataclasses.replace(
            config.train, max_steps=300, epochs=None, max_time=None, eval_interval=50,
            checkpoint_interval=100, sample_interval=100, stop_at_loss=None, patience=None,
            init_from=str(base.run.path),
        ),
    )  # fmt: skip


def merge_run(run: Run, run_dir: Path, command: str, notify: Notify = notify) -> Path:
    """Write a run whose checkpoint has the adapters of `run` merged into the weights.

    Returns `run_dir`. Raises InputError where `run` has no adapters, or `run_dir` cannot be
    created.
    """
    if not run.config.model.lora_rank:
        raise InputError(f"{run.path} has no adapters to merge: it was trained without --lora-rank")
    run_folder.require_new(run_dir)
    best_checkpoint = _load_best(run, notify)
    step = best_checkpoint.step
    config = dataclasses.replace(run.config, model=without_adapters(run.config.model))
    vocab_size = run.tokenizer.vocab_size
    precision: Precision = "fp64" if run.record.get("precision") == "fp64" else "fp32"
    engine = make_engine(config, vocab_size, ComputeConfig(engine="numpy", precision=precision))
    engine.load(merge_adapters(best_checkpoint.weights(), run.config.model).items())
    merged_from: SourceRun = {"run": str(run.path), "step": step}
    record = build_merged_record(run.record, config, command, merged_from)
    lines = [
        line
        for line in run.metrics()
        if line["kind"] in ("plan", "eval", "sample") and line["step"] <= step
    ]
    best = _validation_best(lines, step)
    best_step, best_loss = best or (None, None)
    end_line: EndLine = {
        "kind": "end",
        "step": step,
        "status": "finished",
        "best_step": best_step,
        "best_loss": best_loss,
    }
    with lock_run(run_dir):
        run_folder.create_run(run_dir, record, run.tokenizer.to_json())
        with MetricsLog(run_dir / "metrics.jsonl", 0) as log:
            for line in lines:
                log.write(line)
            updates, tokens = best_checkpoint.progress.updates, best_checkpoint.progress.tokens
            progress = Progress(step, updates, tokens, log.bytes, best)
            config_sha256 = Run(run_dir).config_sha256
            identity = best_checkpoint.identity._replace(config_sha256=config_sha256)
            checkpoint.save(run_dir, engine, progress, identity)
            log.write(end_line)
    return run_dir


def _validation_best(lines: Sequence[Line], step: int) -> Best | None:
    """The validation loss of a step: the last one, which may be that of the whole split."""
    losses = [line["loss"] for line in eval_lines(lines) if line["step"] == step]
    return Best(step, losses[-1]) if losses and losses[-1] is not None else None


def _load_best(run: Run, warn: Notify | None = None) -> Checkpoint:
    """The best checkpoint of a run. Raises DamagedError where it belongs to another run."""
    best_checkpoint = checkpoint.load(run.path, "best", warn)
    checkpoint.require_identity(best_checkpoint, run.identity)
    return best_checkpoint
