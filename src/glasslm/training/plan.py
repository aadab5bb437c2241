"""The plan of a run, printed before its first step: model, data, length, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glasslm.text import escape_control_chars, format_bytes, format_duration


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
    flops: float  # of all steps
    memory_bytes: int
    seconds: float
    engine: str
    device: str
    precision: str
    threads: int | None  # None: the device is not a CPU
    processes: int
    blas: str = ""  # library, version and kernel, if NumPy computes
    reasons: Sequence[str] = ()  # for choices that were made automatically


def format_plan(plan: TrainingPlan) -> str:
    """The plan in a few aligned lines."""
    total_tokens = plan.max_steps * plan.tokens_per_step
    expected = [
        f"about {format_duration(plan.seconds)}",
        f"{format_bytes(plan.memory_bytes)} of memory",
    ]
    training = [
        f"{plan.max_steps:,} steps of {plan.tokens_per_step:,} tokens",
        f"{total_tokens:,} in all",
        f"{total_tokens / plan.train_tokens:.3g} epochs",
    ]
    compute = [
        f"{plan.flops:.2g} FLOPs",
        f"{plan.engine} engine",
        plan.device,
        plan.precision,
        *([f"{plan.threads} threads"] if plan.threads is not None else []),
        *([f"{plan.processes} processes"] if plan.processes > 1 else []),
        *([plan.blas] if plan.blas else []),
    ]
    rows = [
        ("model", [*_parameter_parts(plan.parameters), f"vocabulary of {plan.vocab_size:,}"]),
        (
            "data",
            [
                f"{plan.train_tokens:,} training tokens",
                f"{plan.val_tokens:,} validation tokens",
            ],
        ),
        ("training", training),
        ("expected", expected),
        ("compute", compute),
        ("run", [str(plan.run_dir)]),
        *(("note", [reason]) for reason in plan.reasons),
    ]
    title = f"glasslm  {plan.preset} on {plan.corpus}"
    lines = [title, *(f"  {head:<10}{', '.join(parts)}" for head, parts in rows)]
    return escape_control_chars("\n".join(lines))


def _parameter_parts(parameters: Mapping[str, int]) -> list[str]:
    total = parameters["total"]
    parts = [f"{total:,} parameters ({parameters['non_embedding']:,} without embeddings)"]
    for which, meaning in (("active", "active per token"), ("trained", "trained")):
        if parameters[which] != total:
            parts.append(f"{parameters[which]:,} {meaning}")
    return parts
