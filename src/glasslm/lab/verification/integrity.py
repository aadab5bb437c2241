"""Whether a run folder is whole.

`examine` looks at every file of a run and never writes there, so that it may look while the run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from glasslm import files
from glasslm.engines.state import AVERAGE, MOMENTS, moment_kind, read_state
from glasslm.errors import DamagedError, GlasslmError
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.runs import checkpoint, metrics
from glasslm.runs.checkpoint import Checkpoint
from glasslm.runs.run_folder import Run

Verdict = Literal["ok", "note", "damaged"]

FIELDS = (
    "glasslm", "created", "command", "seed", "config", "engine", "device", "precision", "parameters",
    "flops_per_token", "data", "tokenizer", "versions", "machine", "git",
)  # fmt: skip
CURES = {
    "run.json": "restore it from a copy; nothing else says what this run is",
    "tokenizer.json": "restore it from a copy",
    "metrics.jsonl": "restore it from a copy",
    "base": "restore it from a copy, or from the run that this one was fine-tuned from",
    "checkpoint": "restore it from a copy, or delete the folder: the newest that is whole is the one to go on from",
    "best": "use the latest by --checkpoint latest, or restore it from a copy",
    "text": "put the original back",
}


@dataclass(frozen=True)
class Part:
    """One part of a run folder and what is to be said of it; a note is worth knowing and no damage."""

    name: str
    verdict: Verdict
    message: str


def examine(run_dir: Path) -> Iterator[Part]:
    """Each part of a run, looked at in turn. Damage is never an exception here."""
    run = Run(run_dir)
    record = _judged("run.json", "run.json", lambda: _record(run))
    yield record
    known = record.verdict == "ok"
    if known:
        yield _judged(
            "tokenizer.json",
            "tokenizer.json",
            lambda: f"{run.tokenizer.kind}, sha256 as in run.json",
        )
    if (run_dir / checkpoint.BASE).is_dir():
        yield _judged("base", "base", lambda: _base(run_dir))
    held: list[Checkpoint] = []
    for step in checkpoint.list_steps(run_dir):
        yield _checkpoint(run, step, known, held)
    if held:
        yield _judged("best checkpoint", "best", lambda: _best(run_dir))
    yield _metrics(run_dir, held)
    if known:
        yield from _text(run)
    yield from _leftovers(run_dir)


def _judged(name: str, kind: str, look: Callable[[], str]) -> Part:
    try:
        return Part(name, "ok", look())
    except GlasslmError as error:
        return Part(name, "damaged", f"{error}. Cure: {CURES[kind]}")
    except OSError as error:
        return Part(
            name,
            "damaged",
            f"{error.filename} cannot be read ({error.strerror}). Cure: {CURES[kind]}",
        )


def _record(run: Run) -> str:
    """Its format and fields, and what follows from its own config. A hash of it is in every checkpoint."""
    record, path = run.record, run.path / "run.json"
    if missing := [name for name in FIELDS if name not in record]:
        raise DamagedError(f"{path} lacks '{missing[0]}'")
    config = run.config
    try:
        seed, total = record["seed"], record["parameters"]["total"]
        vocab_size = record["tokenizer"]["vocab_size"]
        names = [record[part]["sha256"] for part in ("data", "tokenizer")]
        names += [file[name] for file in record["data"]["files"] for name in ("path", "sha256")]
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} is not as glasslm wrote it ({error!r})") from None
    if not all(isinstance(name, str) for name in names) or type(vocab_size) is not int:
        raise DamagedError(
            f"{path} is not as glasslm wrote it: its data or its tokenizer is not named"
        )
    if seed != config.train.seed:
        raise DamagedError(
            f"{path} says seed {seed} at its top, and {config.train.seed} in its config"
        )
    if total != (expected := parameter_table(config.model, vocab_size).total):
        raise DamagedError(f"{path} says {total} parameters, but its config makes {expected:,}")
    return f"format {record['format']}, {expected:,} parameters, config sha256 {run.config_sha256[:12]}"


def _base(run_dir: Path) -> str:
    files.verify_folder(run_dir / checkpoint.BASE)
    return "frozen weights, as their manifest says"


def _checkpoint(run: Run, step: int, known: bool, held: list[Checkpoint]) -> Part:
    """A checkpoint, added to `held` when it is whole. The run may remove or replace it while we look."""
    name = f"{checkpoint.FOLDER}/{step:06d}"
    path = run.path / name
    while path.exists():
        before = written(path)
        part = _judged(name, "checkpoint", lambda: _whole(run, step, known, held))
        if part.verdict == "ok" or (path.exists() and written(path) == before):
            return part
    return Part(name, "note", "the run, which goes on, removed it meanwhile")


def written(path: Path) -> tuple[int, int] | None:
    """Which writing of a checkpoint this is."""
    try:
        manifest = os.stat(path / files.MANIFEST)
    except OSError:
        return None
    return manifest.st_ino, manifest.st_mtime_ns


def _whole(run: Run, step: int, known: bool, held: list[Checkpoint]) -> str:
    found = checkpoint.load(run.path, step)
    if not known:
        held.append(found)
        return "as its manifest says; what it belongs to is not known without run.json"
    data, tokenizer = (run.record[part]["sha256"] for part in ("data", "tokenizer"))
    checkpoint.check(
        found, config_sha256=run.config_sha256, tokenizer_sha256=tokenizer, data_sha256=data
    )
    rows = parameter_table(run.config.model, run.record["tokenizer"]["vocab_size"])
    entries = dict(found.state())
    try:
        read_state(entries.items(), rows, run.config.optimizer)
    except DamagedError as error:
        raise DamagedError(f"{found.path}: {error}") from None
    moments = entries.keys() - rows.keys()
    if moments and (missing := _moments(rows, run) - moments):
        raise DamagedError(f"{found.path}: the entry '{min(missing)}' is missing")
    for name, array in entries.items():
        if not np.isfinite(array).all():
            raise DamagedError(f"{found.path}: the entry '{name}' is not finite")
    held.append(found)
    return f"{len(entries)} entries, hashes as in its manifest, config, tokenizer and data as in run.json"


def _moments(rows: ParameterTable, run: Run) -> set[str]:
    """The entries that a whole optimizer.safetensors has."""
    optimizer = run.config.optimizer
    return {
        f"{kind}/{name}"
        for name, row in rows.items()
        if row.trained
        for kind in (
            *MOMENTS[moment_kind(row, optimizer.optimizer)],
            *([AVERAGE] if optimizer.ema else []),
        )
    }


def _best(run_dir: Path) -> str:
    """The best checkpoint is there; the run may find a better one, and remove this one, while we look."""
    before: Checkpoint | None = None
    while True:
        steps = checkpoint.list_steps(run_dir)
        try:
            latest = checkpoint.load(run_dir, "latest", lambda message: None)
        except OSError:  # what is damaged, too
            if checkpoint.list_steps(run_dir) == steps:
                raise
            continue
        best = latest.progress.best
        if best is None:
            return "none yet: no evaluation gave a finite loss"
        if best.step in checkpoint.list_steps(run_dir):
            return f"step {best.step}, validation loss {best.loss:.4f}"
        if before is not None and before.step == latest.step:
            raise DamagedError(
                f"the checkpoint of step {best.step}, the best, is missing from {run_dir}"
            )
        before = latest


def _metrics(run_dir: Path, held: list[Checkpoint]) -> Part:
    path = run_dir / "metrics.jsonl"
    if not path.exists() and not held:
        return Part(path.name, "note", "not there yet")
    part = _judged(path.name, path.name, lambda: _lines(path, held))
    if part.verdict == "ok" and not path.read_bytes().endswith(b"\n"):
        return Part(
            path.name, "note", f"{part.message}; its last line is cut short, which a resume removes"
        )
    return part


def _lines(path: Path, held: list[Checkpoint]) -> str:
    """Strict JSON throughout, steps that go on, and as long as the checkpoints remember it."""
    done = number = 0
    for number, line in enumerate(metrics.read(path), 1):
        kind, step = line.get("kind"), line.get("step")
        if not isinstance(kind, str) or type(step) is not int or step < 0:
            raise DamagedError(f"line {number} of {path} is damaged: it lacks its kind or its step")
        if kind == "step" and step <= done:
            raise DamagedError(f"line {number} of {path} has step {step} after step {done}")
        if kind in ("step", "resume"):
            done = step
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        for found in held:
            length = found.progress.metrics_bytes
            file.seek(max(0, length - 1))
            if length and file.read(1) != b"\n":
                raise DamagedError(
                    f"{path} has {size:,} bytes, none of its lines ends at byte {length:,}, where "
                    f"{found.path.name} was written"
                )
    return f"{number:,} lines to step {done:,}, whole at the end of each checkpoint"


def _text(run: Run) -> Iterator[Part]:
    """The text that it was trained on; one that is gone, or is another version of a corpus, is worth a note."""
    own, same, size = bool(run.config.data.text_file), 0, 0
    recorded = run.record["data"]["files"]
    for path, sha256 in ((file["path"], file["sha256"]) for file in recorded):
        try:
            found = files.sha256_of(Path(path)) if os.path.isfile(path) else None
        except OSError:
            found = None
        if found is None:
            why = f"{path} is gone or cannot be read; it is needed where the cache has lost its tokens"
            yield Part("text", "note", f"{why}: put the text with sha256 {sha256} there")
            continue
        if found == sha256:
            same, size = same + 1, size + os.stat(path).st_size
            continue
        changed = f"{path} has changed since: its sha256 was {sha256}, it is {found} now"
        yield Part(
            "text",
            "damaged" if own else "note",
            changed + (f". Cure: {CURES['text']}" if own else ""),
        )
    if same:
        yield Part(
            "text", "ok", f"{same} of {len(recorded)} files, {size:,} bytes, sha256 as in run.json"
        )


def _leftovers(run_dir: Path) -> Iterator[Part]:
    for folder in (run_dir, run_dir / checkpoint.FOLDER):
        for path in sorted(folder.glob("*.tmp-[0-9]*")):
            why = "half written, by a save under way or a process that was killed: the next one that trains removes it"
            yield Part(path.relative_to(run_dir).as_posix(), "note", why)
