"""Going on from a trained model with other text: what the new run starts from, and what it may forget.

Fine-tuning is training whose first weights are another run's, with its architecture and its tokenizer; with adapters
(lora_rank) all but them is frozen. The loop, the checkpoints and the flags are those of every run.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from glasslm import checkpoint, files, runs, tokens
from glasslm.checkpoint import Progress
from glasslm.config import ComputeConfig, DataConfig, ModelConfig, RunConfig, to_dict
from glasslm.engines import make_engine
from glasslm.errors import GlasslmError, InputError
from glasslm.lora import merged, without_adapters
from glasslm.metrics import Log
from glasslm.parameters import count, initial_weights, table
from glasslm.runs import Run
from glasslm.tokens import Shard
from glasslm.wording import Say, tell

Weights = Iterator[tuple[str, NDArray[Any]]]


class Base:
    """The run that another one starts from, at its best checkpoint, adapters merged."""

    def __init__(self, run: str) -> None:
        self.run = Run(runs.find(run))
        self.held = checkpoint.load(self.run.path, "best")
        self.model = without_adapters(self.run.config.model)

    def weights(self) -> dict[str, NDArray[Any]]:
        return merged(self.held.weights(), self.run.config.model)

    def first_weights(self, config: RunConfig) -> Weights:
        """What a run of this config starts from: these weights, and adapters that do nothing yet."""
        known = self.weights()
        rows = table(config.model, self.run.tokenizer.vocab_size)
        for name, array in initial_weights(rows, config.train.seed):
            yield name, known.get(name, array)

    def require_fit(self, config: ModelConfig) -> None:
        """Raises InputError where a model of this config could not take these weights."""
        vocab_size = self.run.tokenizer.vocab_size
        here, there = (
            {name: row.shape for name, row in table(model, vocab_size).items()}
            for model in (without_adapters(config), self.model)
        )
        wrong = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if wrong:
            raise InputError(
                f"{self.run.path} has another architecture ({wrong[0]} differs): leave out the flags that change it, "
                "or train a new model without --init-from"
            )

    def old_text(self, say: Say) -> Shard | None:
        """The validation tokens that this run was measured on; None, and a word why, where its text is gone."""
        run = self.run
        try:
            return tokens.of_run(run.config.data, run.record["data"], run.tokenizer, say).val.tokens
        except GlasslmError as error:
            say(f"note: what is forgotten of {run.path} is not measured, because its text is not there: {error}")
            return None


def recipe(base: Base, rank: int) -> RunConfig:
    """The defaults of fine-tuning: the base's architecture, few steps, low rates; with adapters of some rank, or 0."""
    config = base.run.config
    return RunConfig(
        model=dataclasses.replace(base.model, lora_rank=rank),
        data=DataConfig(tokenizer=config.data.tokenizer),
        optimizer=dataclasses.replace(
            config.optimizer, optimizer="adamw", lr=LORA_LR if rank else FULL_LR, min_lr=0.0, warmup_steps=20
        ),
        train=dataclasses.replace(
            config.train, max_steps=300, epochs=None, max_time=None, eval_interval=50, checkpoint_interval=100,
            sample_interval=100, stop_at_loss=None, patience=None, init_from=str(base.run.path),
        ),
    )  # fmt: skip


LORA_LR, FULL_LR = 1e-2, 3e-3  # docs/log.md has what was tried


def merge(run: Run, run_dir: Path, command: str, say: Say = tell) -> Path:
    """A new run whose one checkpoint is `run` with its adapters merged into the weights; its folder.

    Raises InputError where `run` has no adapters, or `run_dir` cannot be made.
    """
    if not run.config.model.lora_rank:
        raise InputError(f"{run.path} has no adapters to merge: it was trained without --lora-rank")
    runs.require_new(run_dir)
    held = checkpoint.load(run.path, "best", say)
    config = dataclasses.replace(run.config, model=without_adapters(run.config.model))
    vocab_size = run.tokenizer.vocab_size
    engine = make_engine(config, vocab_size, ComputeConfig(engine="numpy"))
    engine.load(merged(held.weights(), run.config.model).items())
    record = {name: value for name, value in run.record.items() if name not in ("format", "base")} | {
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": to_dict(config),
        "parameters": count(table(config.model, vocab_size)),
        "merged_from": {"run": str(run.path), "step": held.step},
    }
    with files.lock(run_dir):
        runs.create(run_dir, record, run.tokenizer.to_json())
        best = held.progress.best
        with Log(run_dir / "metrics.jsonl", 0) as log:
            for line in run.metrics():
                if line["kind"] in ("plan", "eval", "sample") and line["step"] <= held.step:
                    log.write(line)
            progress = Progress(held.step, held.progress.updates, held.progress.tokens, log.bytes, best)
            hashes = {"tokenizer_sha256": run.tokenizer.sha256, "data_sha256": run.record["data"]["sha256"]}
            checkpoint.save(run_dir, engine, progress, config_sha256=Run(run_dir).config_sha256, **hashes)
            best_step, best_loss = best or (None, None)
            end = {"kind": "end", "step": held.step, "status": "finished"}
            log.write(end | {"best_step": best_step, "best_loss": best_loss})
    return run_dir
