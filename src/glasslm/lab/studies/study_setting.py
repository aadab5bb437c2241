"""What every study begins with: its text, its plan, which is made once, where it computes, what its runs write down."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data import shards
from glasslm.data.shards import Dataset
from glasslm.data.sources import corpora
from glasslm.engines.choice import choose
from glasslm.engines.factory import make_engine
from glasslm.errors import DamagedError, InputError
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.text import Say
from glasslm.training import step_timer
from glasslm.training.step_timer import Pace

PLAN, FORMAT = "plan.json", 1
START_S = 1.0  # of a run: a process, its imports, its text
TUNING_SEED = 1_000_003  # added to the first seed: rates are chosen on runs that are not compared


def with_text(base: RunConfig, say: Say) -> tuple[RunConfig, Dataset]:
    """The recipe with its corpus named, wherever that was found, and its tokens.

    What came through a pipe is read again from the cache, as it comes only once. Raises InputError for a recipe whose
    runs would end when they like (a study fixes their length), that goes on from another run, or whose text is short.
    """
    train = base.train
    if train.epochs is not None or train.max_time is not None:
        raise InputError(
            "the length of a study's runs is given by --max-steps, or by --budget for all of them"
        )
    if train.patience is not None or train.stop_at_loss is not None:
        raise InputError(
            "--patience and --stop-at-loss end each run at another step: leave them out of a study"
        )
    if train.init_from is not None:
        raise InputError(
            "--init-from goes on from a trained run, and those of a study begin anew: leave it out"
        )
    source = corpora.find(base.data, say)
    if not base.data.chosen:
        base = with_flags(base, {"corpus": source.name})
    if "-" in base.data.text_file:
        base = with_flags(base, {"text_file": tuple(str(file.path) for file in source.files)})
    dataset = shards.prepare(base.data, source, say)
    shards.require_room(dataset, base.model.block_size, train.batch_size)
    return base.resolved(), dataset


def with_engine(
    compute: ComputeConfig, largest: RunConfig, vocab_size: int, threads: int = 1
) -> ComputeConfig:
    """Engine, device and precision decided once, by the largest model, so that no size is computed in another way."""
    size = parameter_table(largest.model.resolved(), vocab_size).total
    return choose(
        dataclasses.replace(compute, threads=compute.threads or threads), size, training=True
    )[0]


def held_plan(study: Path, asked: Any) -> dict[str, Any] | None:
    """plan.json of a study that goes on; None of a new one. InputError where it is of other flags than `asked`."""
    path = study / PLAN
    if not path.exists():
        return None
    held = files.read_json(path)
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise DamagedError(
            f"{path} is not a plan of format {FORMAT}: restore it, or choose another folder"
        )
    if held["asked"] != asked:
        raise InputError(
            f"{path} is of a study with other settings: give the same flags, or choose another --out"
        )
    return held


def hold_plan(study: Path, asked: Any, planned: dict[str, Any]) -> None:
    """Write plan.json: what was measured with a clock would come out otherwise when the study goes on."""
    files.make_folder(study)
    files.write_json(study / PLAN, {"format": FORMAT, "asked": asked, **planned})


def sparing(config: RunConfig) -> RunConfig:
    """The same training with fewer evaluations, one sample at the end and few checkpoints."""
    steps = config.train.max_steps
    train = dataclasses.replace(
        config.train,
        eval_interval=max(1, math.ceil(steps / 5)), log_interval=max(1, steps // 100), sample_interval=steps,
        checkpoint_interval=max(1, math.ceil(steps / 4)), keep=1,
    )  # fmt: skip
    return dataclasses.replace(config, train=train)


def measured(config: RunConfig, compute: ComputeConfig, dataset: Dataset) -> Pace:
    """How long a step and an evaluation of this model take here; samples are left out."""
    V = dataset.tokenizer.vocab_size
    engine = make_engine(config, V, compute, training=True)
    engine.load(initial_weights(parameter_table(config.model, V), config.train.seed))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, sample_interval=0))
    return step_timer.measure(config, engine, dataset)


def seeded(config: RunConfig, rate: float, seed: int) -> RunConfig:
    """With another peak rate, which the last rate follows, and another seed."""
    changed = with_flags(
        config, {"lr": rate, "min_lr": config.optimizer.min_lr * rate / config.optimizer.lr}
    )
    return dataclasses.replace(
        changed, train=dataclasses.replace(changed.train, seed=seed)
    ).resolved()
