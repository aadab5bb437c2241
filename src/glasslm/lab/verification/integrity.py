"""The integrity of a run folder.

`examine_run` reads every file of a run and writes nothing, so it may be used while the run trains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from glasslm import files
from glasslm.data.chat import dialogues
from glasslm.engines.state import AVERAGE, MOMENTS, moment_kind, read_state
from glasslm.errors import DamagedError, ExhaustedError, GlasslmError, raise_if_exhausted
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.runs import checkpoint, metrics
from glasslm.runs.checkpoint import Best, Checkpoint, RunIdentity
from glasslm.runs.history import sample_note
from glasslm.runs.protection import UNPROTECTED, describe_protection, newest_position
from glasslm.runs.run_folder import Run, is_without_progress
from glasslm.text import quote_path

Verdict = Literal["ok", "note", "damaged"]

CURES = {
    "run.json": "restore it from a copy; no other file describes the run",
    "tokenizer.json": "restore it from a copy",
    "metrics.jsonl": "restore it from a copy",
    "base": "restore it from a copy, or from the run that this run was fine-tuned from",
    "checkpoint": "restore it from a copy, or delete its folder: a resume uses the newest intact "
    "checkpoint",
    "best": "use the latest checkpoint with --checkpoint latest, or restore it from a copy",
    "text": "restore the original text",
    "pairs": "restore the original pairs",
}


@dataclass(frozen=True)
class Part:
    """One part of a run folder with its verdict; a note is not damage."""

    name: str
    verdict: Verdict
    message: str


def examine_run(run_dir: Path) -> Iterator[Part]:
    """The verdict on each part of a run. Damage is a verdict, not an exception."""
    run = Run(run_dir)
    record = _check_part("run.json", "run.json", lambda: _check_record(run))
    record_ok = record.verdict == "ok"  # it can be read, though it may have been edited
    if record_ok:
        yield _check_part(
            "run.json", "run.json", lambda: f"{record.message}, {_check_record_hash(run)}"
        )
        yield _check_part(
            "tokenizer.json",
            "tokenizer.json",
            lambda: f"{run.tokenizer.kind}, sha256 as in run.json",
        )
    else:
        yield record
    if (run_dir / checkpoint.BASE).is_dir() or (record_ok and _needs_base(run)):
        yield _check_part("base", "base", lambda: _check_base(run_dir))
    intact: list[Checkpoint] = []
    for step in checkpoint.list_steps(run_dir):
        yield _examine_checkpoint(run, step, record_ok, intact)
    if not checkpoint.list_steps(run_dir):
        yield _explain_no_checkpoint(run)
    if intact:
        yield _check_part("best checkpoint", "best", lambda: _check_best(run))
    yield _examine_metrics(run, intact)
    if record_ok:
        yield from _examine_text(run)
        yield from _examine_pairs(run)
    yield from _list_leftovers(run_dir)


def _check_part(name: str, kind: str, check: Callable[[], str]) -> Part:
    """The verdict on one part: ok with the message of `check`, or damaged if it raises."""
    try:
        return Part(name, "ok", check())
    except ExhaustedError:
        raise
    except GlasslmError as error:
        return Part(name, "damaged", f"{error}. Cure: {CURES[kind]}")
    except OSError as error:
        raise_if_exhausted(error, name)
        return Part(
            name,
            "damaged",
            f"{error.filename} cannot be read ({error.strerror}). Cure: {CURES[kind]}",
        )


def _check_record(run: Run) -> str:
    """Check the format and fields of run.json, and values that follow from its config."""
    record, path = run.record, run.path / "run.json"
    config, seed = run.config, record["seed"]
    total, vocab_size = record["parameters"].get("total"), record["tokenizer"]["vocab_size"]
    if seed != config.train.seed:
        raise DamagedError(
            f"{path} has seed {seed} at its top, but {config.train.seed} in its config"
        )
    if total != (expected := parameter_table(config.model, vocab_size).total):
        raise DamagedError(f"{path} has {total} parameters, but its config gives {expected:,}")
    sha256 = run.config_sha256[:12]
    return f"format {record['format']}, {expected:,} parameters, config sha256 {sha256}"


def _check_record_hash(run: Run) -> str:
    """Compare the bytes of run.json with the hash in the newest checkpoint."""
    newest = newest_position(run)
    if newest is None:
        return "not protected before the first checkpoint"
    if newest.identity.record_sha256 is None:
        return UNPROTECTED
    checkpoint.require_record(newest, run.record_sha256)
    return "sha256 as in the checkpoints"


def _needs_base(run: Run) -> bool:
    """Whether the run has frozen or first weights in base/; a merged one has none."""
    is_tuned = bool(run.config.model.lora_rank) or run.config.preference.is_active
    # A run that was killed before its first checkpoint may not have written them.
    return is_tuned and "merged_from" not in run.record and bool(checkpoint.list_steps(run.path))


def _check_base(run_dir: Path) -> str:
    if not (run_dir / checkpoint.BASE).is_dir():
        raise DamagedError(f"{run_dir / checkpoint.BASE} is missing")
    files.verify_folder(run_dir / checkpoint.BASE)
    return "frozen weights, hashes as in their manifest"


def _examine_checkpoint(run: Run, step: int, record_ok: bool, intact: list[Checkpoint]) -> Part:
    """The verdict on a checkpoint, which is appended to `intact` if it is.

    A running run may remove or replace it meanwhile.
    """
    name = f"{checkpoint.FOLDER}/{step:06d}"
    path = run.path / name
    while path.exists():
        before = manifest_stamp(path)
        part = _check_part(
            name, "checkpoint", lambda: _check_checkpoint(run, step, record_ok, intact)
        )
        if part.verdict == "ok" or (path.exists() and manifest_stamp(path) == before):
            return part
    return Part(name, "note", "removed meanwhile by the run, which is still training")


def manifest_stamp(path: Path) -> tuple[int, int] | None:
    """Inode and modification time (ns) of a checkpoint's manifest: each writing has its own."""
    try:
        manifest = os.stat(path / files.MANIFEST)
    except OSError:
        return None
    return manifest.st_ino, manifest.st_mtime_ns


def _check_checkpoint(run: Run, step: int, record_ok: bool, intact: list[Checkpoint]) -> str:
    """Check hashes, identity, shapes and values of a checkpoint, and append it to `intact`."""
    saved = checkpoint.load(run.path, step)
    if not record_ok:
        intact.append(saved)
        return "hashes as in its manifest; not compared with run.json, which is damaged"
    record = run.record  # the tokenizer file has a verdict of its own
    identity = RunIdentity(
        run.config_sha256,
        record["tokenizer"]["sha256"],
        record["data"]["sha256"],
        saved.identity.record_sha256,  # so has run.json
    )
    checkpoint.require_identity(saved, identity)
    table = parameter_table(run.config.model, run.record["tokenizer"]["vocab_size"])
    entries = dict(saved.state())
    try:
        read_state(entries.items(), table, run.config.optimizer)
    except DamagedError as error:
        raise DamagedError(f"{saved.path}: {error}") from None
    moments = entries.keys() - table.keys()
    if moments and (missing := _required_moments(table, run) - moments):
        raise DamagedError(f"{saved.path}: the entry '{min(missing)}' is missing")
    for name, array in entries.items():
        if not np.isfinite(array).all():
            raise DamagedError(f"{saved.path}: the entry '{name}' is not finite")
    intact.append(saved)
    return (
        f"{len(entries)} entries, hashes as in its manifest, config, tokenizer and data as in "
        "run.json"
    )


def _explain_no_checkpoint(run: Run) -> Part:
    try:
        is_new = is_without_progress(run.path)
    except DamagedError:
        is_new = False
    if not is_new:
        return Part(
            checkpoint.FOLDER,
            "damaged",
            f"all checkpoints are missing, though the run had some. Cure: {CURES['checkpoint']}",
        )
    return Part(
        checkpoint.FOLDER,
        "note",
        "none yet: the run is new, or it ended before its first checkpoint. Cure: `glasslm train "
        f"--run-dir {quote_path(run.path)}`, with the other flags of its command, starts it again",
    )


def _required_moments(table: ParameterTable, run: Run) -> set[str]:
    """The entries that a complete optimizer.safetensors has."""
    optimizer = run.config.optimizer
    return {
        f"{kind}/{name}"
        for name, row in table.items()
        if row.trained
        for kind in (
            *MOMENTS[moment_kind(row, optimizer.optimizer)],
            *([AVERAGE] if optimizer.ema else []),
        )
    }


def _check_best(run: Run) -> str:
    """Check that the best checkpoint exists. A running run may replace it meanwhile."""
    run_dir, before = run.path, None
    while True:
        steps = checkpoint.list_steps(run_dir)
        try:
            latest = checkpoint.load(run_dir, "latest", lambda message: None)
        except OSError:  # DamagedError is one
            if checkpoint.list_steps(run_dir) == steps:
                raise
            continue
        best = latest.position.best
        if best is None:
            return "none yet: no evaluation had a finite loss"
        if best.step in checkpoint.list_steps(run_dir):
            return f"step {best.step}, validation loss {best.loss:.4f}{_describe_sample(run, best)}"
        if before is not None and before.step == latest.step:
            raise DamagedError(
                f"the checkpoint of step {best.step}, the best, is missing from {run_dir}"
            )
        before = latest


def _describe_sample(run: Run, best: Best) -> str:
    """In brackets, that the best loss is of a sample of the split, and its standard error."""
    try:
        evals = metrics.eval_lines(run.metrics())
    except GlasslmError:  # metrics.jsonl has a verdict of its own
        return ""
    notes = [sample_note(line) for line in evals if line["step"] == best.step]
    return f" ({notes[-1]})" if notes and notes[-1] else ""


def _examine_metrics(run: Run, intact: list[Checkpoint]) -> Part:
    path = run.path / "metrics.jsonl"
    if not path.exists() and not intact:
        return Part(path.name, "note", "does not exist yet")
    part = _check_part(path.name, path.name, lambda: _check_lines(run, path, intact))
    if part.verdict == "ok" and not path.read_bytes().endswith(b"\n"):
        return Part(
            path.name, "note", f"{part.message}; its last line is cut short, a resume removes it"
        )
    return part


def _check_lines(run: Run, path: Path, intact: list[Checkpoint]) -> str:
    """Check hashes, types and the order of all lines, and that each checkpoint ends at a line."""
    last_step = number = 0
    for number, line in enumerate(metrics.read_lines(path), 1):
        step = line["step"]
        if line["kind"] == "step" and step <= last_step:
            raise DamagedError(f"line {number} of {path} has step {step} after step {last_step}")
        if line["kind"] == "step" or line["kind"] == "resume":
            last_step = step
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        for saved in intact:
            length = saved.position.metrics_bytes
            file.seek(max(0, length - 1))
            if length and file.read(1) != b"\n":
                raise DamagedError(
                    f"{path} has {size:,} bytes, none of its lines ends at byte {length:,}, where "
                    f"{saved.path.name} was written"
                )
    return f"{number:,} lines to step {last_step:,}, {describe_protection(run, intact)}"


def _examine_text(run: Run) -> Iterator[Part]:
    """The verdict on the training text: a missing file or another version of a corpus is a note."""
    data, same, size = run.config.data, 0, 0
    is_generated = data.task is not None or dialogues.NAME in (data.corpus, data.chat)
    is_own_text = bool(data.text_file) or (data.chat is not None and not is_generated)
    recorded = run.record["data"]["files"]
    for path, sha256 in ((file["path"], file["sha256"]) for file in recorded):
        has_file = os.path.isfile(path) and data.chat != dialogues.NAME
        try:
            actual = files.file_sha256(Path(path)) if has_file else None
        except OSError as error:
            raise_if_exhausted(error, path)
            actual = None
        if actual is None and is_generated:
            yield Part("text", "ok", "generated by glasslm, which makes it again when needed")
            continue
        if actual is None:
            problem = (
                f"{path} is missing or cannot be read; a run without its cached tokens needs it"
            )
            yield Part("text", "note", f"{problem}: restore the text with sha256 {sha256}")
            continue
        if actual == sha256:
            same, size = same + 1, size + os.stat(path).st_size
            continue
        changed = f"{path} has changed: its sha256 was {sha256}, now it is {actual}"
        yield Part(
            "text",
            "damaged" if is_own_text else "note",
            changed + (f". Cure: {CURES['text']}" if is_own_text else ""),
        )
    if same:
        yield Part(
            "text", "ok", f"{same} of {len(recorded)} files, {size:,} bytes, sha256 as in run.json"
        )


def _examine_pairs(run: Run) -> Iterator[Part]:
    """The verdict on the file of pairs: changed pairs are damage, missing ones a note."""
    path, sha256 = run.config.preference.preferences, run.config.preference.preferences_sha256
    if not path:
        return
    if not os.path.isfile(path):
        message = f"{path} is missing; a run without it cannot be resumed or reproduced"
        yield Part("pairs", "note", f"{message}: restore the pairs with sha256 {sha256}")
        return

    def check() -> str:
        if (actual := files.file_sha256(Path(path))) != sha256:
            raise DamagedError(f"{path} has changed: its sha256 was {sha256}, now it is {actual}")
        return f"{os.stat(path).st_size:,} bytes, sha256 as in run.json"

    yield _check_part("pairs", "pairs", check)


def _list_leftovers(run_dir: Path) -> Iterator[Part]:
    """A note for each half-written file or folder."""
    for folder in (run_dir, run_dir / checkpoint.FOLDER):
        for path in sorted(folder.glob("*.tmp-[0-9]*")):
            message = "half written, by a save in progress or a killed process; a resume removes it"
            yield Part(path.relative_to(run_dir).as_posix(), "note", message)
