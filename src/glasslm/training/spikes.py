"""The batches of loss spikes, written to spikes/ in the run folder."""

from __future__ import annotations

from pathlib import Path

from glasslm import files
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.protocol import Batch
from glasslm.training.guard import Limits, spike_warning

FOLDER = "spikes"
MAX_SPIKE_RECORDS = 100  # files in the folder


def record_spike(
    run_dir: Path,
    step: int,
    batch: Batch,
    tokenizer: Tokenizer,
    loss: float,
    norm: float,
    limits: Limits,
    action: str,
    rollback_step: int,
    can_replay: bool,
) -> str:
    """Write the batch of a spike, unless the folder is full, and return the warning.

    `action` is the value of --on-spike, and `rollback_step` the checkpoint of a rollback.
    """
    outcome = {
        "log": "",
        "skip": ": it was skipped",
        "rollback": f": back to the weights of step {rollback_step}",
    }
    _write_spike(run_dir / FOLDER, step, batch, tokenizer, loss, norm, limits, action)
    return spike_warning(step, loss, norm, limits, outcome[action], can_replay)


def _write_spike(
    folder: Path,
    step: int,
    batch: Batch,
    tokenizer: Tokenizer,
    loss: float,
    norm: float,
    limits: Limits,
    action: str,
) -> None:
    """Write the batch of a spike, its loss, gradient norm and limits."""
    if len(list(folder.glob("*.json"))) >= MAX_SPIKE_RECORDS:
        return
    files.make_folder(folder)
    record = {
        "step": step,
        "loss": loss,
        "grad_norm": norm,
        "limits": limits._asdict(),
        "action": action,
        "tokens": batch.tokens.tolist(),
        "texts": [tokenizer.decode(row) for row in batch.tokens],
    }
    files.write_json(folder / f"{step:06d}.json", record)
