"""The plan of a run, printed before its first step: model, data, length, time and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.dataset import Dataset
from glasslm.engines import memory_estimate
from glasslm.engines.operations import describe_operations, find_operations
from glasslm.engines.protocol import Engine
from glasslm.engines.resources import count_ranks
from glasslm.model import flops
from glasslm.model.parameters import parameter_table
from glasslm.runs.blas import format_blas, loaded_blas
from glasslm.runs.run_folder import Run
from glasslm.text import escape_control_chars, format_bytes, format_duration, plural
from glasslm.training.evaluation_windows import (
    count_windows,
    evaluation_windows,
    second_measurement_windows,
)
from glasslm.training.preference.opening import open_objective
from glasslm.training.step_timer import RunLength

FEW_STEPS = 20  # fewer steps of --max-time than this are reported
LONG_RUN_S = 3 * 3600.0  # the plan of a longer run names flags that shorten it


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run is about to do."""

    preset: str
    corpus: str
    run_dir: Path
    parameters: Mapping[str, int]  # total, non_embedding, active and trained
    vocab_size: int
    train_tokens: int
    val_tokens: int
    max_steps: int
    tokens_per_step: int
    epochs: float
    preference_step: str = ""  # the pairs or prompts of a step; empty where a text is learned
    flops: float | None  # of all steps; None: unknown, because answers differ in length
    memory_bytes: int
    seconds: float
    engine: str
    device: str
    precision: str
    threads: int | None  # None: the device is not a CPU
    processes: int
    operations: str = ""  # those that --ops replaces, and their file
    blas: str = ""  # library, version and kernel, if NumPy computes
    reasons: Sequence[str] = ()  # for choices that were made automatically


def make_plan(
    run: Run,
    dataset: Dataset,
    engine: Engine,
    compute: ComputeConfig,
    expected_s: float,
    corpus: str,
    reasons: list[str],
) -> TrainingPlan:
    """The plan of a run that was created; `reasons` are its notes, `expected_s` its seconds."""
    config, vocab_size = run.config, dataset.tokenizer.vocab_size
    compute = dataclasses.replace(compute, compile="on" if engine.compiled else "off")
    objective = open_objective(run, engine, dataset)
    steps, flops_per_token = config.train.max_steps, flops.flops_per_token(config.model, vocab_size)
    operations = find_operations(config)
    return TrainingPlan(
        preset=run.record["preset"],
        corpus=corpus,
        run_dir=run.path,
        parameters=parameter_table(config.model, vocab_size).counts(),
        vocab_size=vocab_size,
        train_tokens=len(dataset.train.tokens),
        val_tokens=len(dataset.val.tokens),
        max_steps=steps,
        tokens_per_step=config.tokens_per_step,
        epochs=(
            objective.epoch(steps) if objective else config.total_tokens / len(dataset.train.tokens)
        ),
        preference_step=describe_preference_step(config),
        flops=None if objective else config.total_tokens * flops_per_token,
        memory_bytes=memory_estimate.training_bytes(
            config, vocab_size, compute, engine.micro_batch_size
        ),
        seconds=expected_s,
        engine=engine.name,
        device=engine.device,
        precision=engine.precision,
        threads=compute.threads if engine.device == "cpu" else None,
        processes=count_ranks(),
        operations=describe_operations(operations) if operations else "",
        blas=format_blas(loaded_blas()) if engine.name == "numpy" else "",
        reasons=reasons,
    )


def format_plan(plan: TrainingPlan) -> str:
    """The plan in a few aligned lines."""
    expected = [
        f"about {format_duration(plan.seconds)}",
        f"{format_bytes(plan.memory_bytes)} of memory",
    ]
    compute = [
        *([] if plan.flops is None else [f"{plan.flops:.2g} FLOPs"]),
        f"{plan.engine} engine",
        plan.device,
        plan.precision,
        *([f"{plan.threads} threads"] if plan.threads is not None else []),
        *([f"{plan.processes} processes"] if plan.processes > 1 else []),
        *([plan.blas] if plan.blas else []),
    ]
    rows = [
        ("model", [*_parameter_parts(plan.parameters), f"vocabulary of {plan.vocab_size:,}"]),
        ("data", _data_parts(plan)),
        ("training", _training_parts(plan)),
        ("expected", expected),
        ("compute", compute),
        *([("ops", [plan.operations])] if plan.operations else []),
        ("run", [str(plan.run_dir)]),
        *(("note", [reason]) for reason in plan.reasons),
    ]
    title = f"glasslm  {plan.preset} on {plan.corpus}"
    lines = [title, *(f"  {head:<10}{', '.join(parts)}" for head, parts in rows)]
    return escape_control_chars("\n".join(lines))


def describe_preference_step(config: RunConfig) -> str:
    """The pairs or prompts of a step of preference tuning; empty where a text is learned."""
    settings, B = config.preference, config.train.batch_size
    if settings.reward:
        G = settings.group_size
        return f"{plural(B // G, 'prompt')} with {G} answers each"
    return plural(B // 2, "pair") if settings.preferences else ""


def _data_parts(plan: TrainingPlan) -> list[str]:
    if plan.preference_step:
        return [f"{plan.val_tokens:,} validation tokens of the old text"]
    return [f"{plan.train_tokens:,} training tokens", f"{plan.val_tokens:,} validation tokens"]


def _training_parts(plan: TrainingPlan) -> list[str]:
    steps, epochs = plural(plan.max_steps, "step"), f"{plan.epochs:.3g} epochs"
    if plan.preference_step:
        return [f"{steps} of {plan.preference_step}", epochs]
    total_tokens = plan.max_steps * plan.tokens_per_step
    return [f"{steps} of {plan.tokens_per_step:,} tokens", f"{total_tokens:,} in all", epochs]


def _parameter_parts(parameters: Mapping[str, int]) -> list[str]:
    total = parameters["total"]
    parts = [f"{total:,} parameters ({parameters['non_embedding']:,} without embeddings)"]
    for which, meaning in (("active", "active per token"), ("trained", "trained")):
        if parameters[which] != total:
            parts.append(f"{parameters[which]:,} {meaning}")
    return parts


def describe_preparation(compute: ComputeConfig) -> str:
    """The message before the engine is made and its speed is measured."""
    if compute.compile == "on":
        return "compiling the model and measuring its speed (10 to 150 s)"
    return f"starting the {compute.engine} engine and measuring its speed"


def length_notes(length: RunLength, val_tokens: int) -> list[str]:
    """What the plan says about a short or a long run, and about a sampled final measurement."""
    train, notes = length.config.train, []
    if train.max_time is not None and train.max_steps < FEW_STEPS:
        steps = plural(train.max_steps, "step")
        notes.append(
            f"--max-time {train.max_time} allows only {steps}: give a longer one, or train a "
            "smaller model"
        )
    if length.seconds > LONG_RUN_S and train.max_time is None:
        notes.append(
            f"training takes about {format_duration(length.seconds)}: --max-time 1h makes it fit "
            "into an hour, --preset small trains a smaller model"
        )
    if length.final_windows is not None:
        n_all = count_windows(length.config, val_tokens)
        windows = second_measurement_windows(length.config, val_tokens, length.final_windows)
        n = windows or evaluation_windows(length.config, val_tokens) or n_all
        reason = (
            f"outlast the training ({plural(train.max_steps, 'step')})"
            if train.max_time is None
            else "take more than a tenth of --max-time"
        )
        notes.append(
            f"the final loss is measured on {n:,} of {n_all:,} validation windows and has a "
            f"standard error: all would {reason}. "
            "`glasslm evaluate RUN --split val` measures all"
        )
    return notes
