"""What every study begins with: its text, its plan, which is made once, and what its runs write down."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from glasslm import corpora, files, pace, tokens
from glasslm.config import ComputeConfig, RunConfig
from glasslm.engines import make_engine
from glasslm.errors import DamagedError, InputError
from glasslm.pace import Pace
from glasslm.parameters import initial_weights, table
from glasslm.settings import with_flags
from glasslm.tokens import Dataset
from glasslm.wording import Say

PLAN, FORMAT = "plan.json", 1
START_S = 1.0  # of a run: a process, its imports, its text


def with_text(base: RunConfig, say: Say) -> tuple[RunConfig, Dataset]:
    """The recipe with its corpus named, wherever that was found, and its tokens.

    Raises InputError for a recipe whose length depends on its own clock: a study fixes it for all its runs.
    """
    if base.train.epochs is not None or base.train.max_time is not None:
        raise InputError("the length of a study's runs is given by --max-steps, or by --budget for all of them")
    source = corpora.find(base.data, say)
    if base.data.corpus is None and not base.data.text_file:
        base = with_flags(base, {"corpus": source.name})
    return base.resolved(), tokens.prepare(base.data, source, say)


def held_plan(study: Path, asked: Any) -> dict[str, Any] | None:
    """plan.json of a study that goes on; None of a new one. InputError where it is of other flags than `asked`."""
    path = study / PLAN
    if not path.exists():
        return None
    held = files.read_json(path)
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise DamagedError(f"{path} is not a plan of format {FORMAT}: restore it, or choose another folder")
    if held["asked"] != asked:
        raise InputError(f"{path} is of a study with other settings: give the same flags, or choose another --out")
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
    engine.load(initial_weights(table(config.model, V), config.train.seed))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, sample_interval=0))
    return pace.measure(config, engine, dataset)
