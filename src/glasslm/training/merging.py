"""Write a run whose weights are those of a fine-tuned run with its LoRA adapters merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glasslm import files
from glasslm.engines.state import state_without_moments
from glasslm.errors import InputError
from glasslm.model.adapters import merge_adapters, without_adapters
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint import Best, TrainingPosition
from glasslm.runs.metrics import EndLine, Line, MetricsLog, eval_lines
from glasslm.runs.record import SourceRun, build_merged_record
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, notify
from glasslm.training.fine_tuning import load_best_checkpoint


def merge_run(run: Run, run_dir: Path, command: str, notify: Notify = notify) -> Path:
    """Write a run whose checkpoint has the adapters of `run` merged into the weights.

    Returns `run_dir`. Raises InputError where `run` has no adapters, or `run_dir` cannot be
    created.
    """
    if not run.config.model.lora_rank:
        raise InputError(f"{run.path} has no adapters to merge: it was trained without --lora-rank")
    run_folder.require_new(run_dir)
    best_checkpoint = load_best_checkpoint(run, notify)
    step = best_checkpoint.step
    config = dataclasses.replace(run.config, model=without_adapters(run.config.model))
    weights = merge_adapters(best_checkpoint.weights(), run.config.model)
    dtype = np.float64 if run.record.get("precision") == "fp64" else np.float32
    vocab_size = run.tokenizer.vocab_size
    state = state_without_moments(weights, config, vocab_size, dtype)
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
    with files.atomic_path(run_dir) as folder:
        run_folder.create_run(folder, record, run.tokenizer.to_json())
        with MetricsLog(folder / "metrics.jsonl", 0) as log:
            for line in lines:
                log.write(line)
            updates, tokens = best_checkpoint.position.updates, best_checkpoint.position.tokens
            position = TrainingPosition(
                step, updates, tokens, log.bytes, best, metrics_sha256=log.sha256
            )
            checkpoint.save(folder, state.items(), position, Run(folder).identity)
            log.write(end_line)
    return run_dir


def _validation_best(lines: Sequence[Line], step: int) -> Best | None:
    """The validation loss of a step: the last one, which may be that of the whole split."""
    losses = [line["loss"] for line in eval_lines(lines) if line["step"] == step]
    return Best(step, losses[-1]) if losses and losses[-1] is not None else None
