"""Whether a run folder is whole, and whether it resumes to the bit.

`examine` looks at every file of a run and never writes there, so that it may look while the run goes on. `try_resume`
trains a short copy of the run twice in a temporary folder, once to its end and once with a sudden death on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from glasslm import checkpoint, files, launch, metrics, runs, tokens
from glasslm.checkpoint import Checkpoint
from glasslm.config import ComputeConfig
from glasslm.display import Display
from glasslm.engines import Array, Engine, make_engine
from glasslm.engines.choice import as_recorded
from glasslm.engines.state import AVERAGE, MOMENTS, moment_kind, read_state
from glasslm.errors import DamagedError, GlasslmError
from glasslm.memory import enough_memory
from glasslm.metrics import Log
from glasslm.parameters import Table, count, table
from glasslm.runs import Run
from glasslm.settings import to_dict
from glasslm.tokens import Dataset
from glasslm.training import Loop, hashes
from glasslm.wording import Say

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
STEPS, STOPPED_AFTER = 12, 7  # of the copy: in all, and before its sudden death, which follows no save
TORN = b'{"kind": "step", "step": 9, "lo'  # what a line is when a process dies in the middle of it


@dataclass(frozen=True)
class Part:
    """One part of a run folder and what is to be said of it; a note is worth knowing and no damage."""

    name: str
    verdict: Verdict
    message: str


@dataclass(frozen=True)
class Resumption:
    """What became of the copy that was interrupted, beside the one that was not."""

    engine: str
    precision: str
    begin: int  # the step of the checkpoint that both copies start from
    died: int  # the step after which one of them died
    resumed: int  # the step of the checkpoint that it went on from
    end: int
    entries: int  # weights and moments compared
    difference: float  # the largest of any element of any of them
    where: str  # the entry with that difference
    lines: int  # of metrics.jsonl compared, without their timing
    same_lines: bool
    same_progress: bool  # counters, best and the loop's own memory

    @property
    def passed(self) -> bool:
        return self.difference == 0.0 and self.same_lines and self.same_progress


# -- whether it is whole ----------------------------------------------------------------------------------------------


def examine(run_dir: Path) -> Iterator[Part]:
    """Each part of a run, looked at in turn. Damage is never an exception here."""
    run = Run(run_dir)
    record = _judged("run.json", "run.json", lambda: _record(run))
    yield record
    known = record.verdict == "ok"
    if known:
        yield _judged("tokenizer.json", "tokenizer.json", lambda: f"{run.tokenizer.kind}, sha256 as in run.json")
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
        return Part(name, "damaged", f"{error.filename} cannot be read ({error.strerror}). Cure: {CURES[kind]}")


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
        raise DamagedError(f"{path} is not as glasslm wrote it: its data or its tokenizer is not named")
    if seed != config.train.seed:
        raise DamagedError(f"{path} says seed {seed} at its top, and {config.train.seed} in its config")
    if total != (expected := count(table(config.model, vocab_size))["total"]):
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
        before = _written(path)
        part = _judged(name, "checkpoint", lambda: _whole(run, step, known, held))
        if part.verdict == "ok" or (path.exists() and _written(path) == before):
            return part
    return Part(name, "note", "the run, which goes on, removed it meanwhile")


def _written(path: Path) -> tuple[int, int] | None:
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
    checkpoint.check(found, config_sha256=run.config_sha256, tokenizer_sha256=tokenizer, data_sha256=data)
    rows = table(run.config.model, run.record["tokenizer"]["vocab_size"])
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


def _moments(rows: Table, run: Run) -> set[str]:
    """The entries that a whole optimizer.safetensors has."""
    optimizer = run.config.optimizer
    return {
        f"{kind}/{name}"
        for name, row in rows.items()
        if row.trained
        for kind in (*MOMENTS[moment_kind(row, optimizer.optimizer)], *([AVERAGE] if optimizer.ema else []))
    }


def _best(run_dir: Path) -> str:
    """The best checkpoint is there; the run may find a better one, and remove this one, while we look."""
    before: Checkpoint | None = None
    while True:
        latest = checkpoint.load(run_dir, "latest", lambda message: None)
        best = latest.progress.best
        if best is None:
            return "none yet: no evaluation gave a finite loss"
        if best.step in checkpoint.list_steps(run_dir):
            return f"step {best.step}, validation loss {best.loss:.4f}"
        if before is not None and before.step == latest.step:
            raise DamagedError(f"the checkpoint of step {best.step}, the best, is missing from {run_dir}")
        before = latest


def _metrics(run_dir: Path, held: list[Checkpoint]) -> Part:
    path = run_dir / "metrics.jsonl"
    if not path.exists() and not held:
        return Part(path.name, "note", "not there yet")
    part = _judged(path.name, path.name, lambda: _lines(path, held))
    if part.verdict == "ok" and not path.read_bytes().endswith(b"\n"):
        return Part(path.name, "note", f"{part.message}; its last line is cut short, which a resume removes")
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
        yield Part("text", "damaged" if own else "note", changed + (f". Cure: {CURES['text']}" if own else ""))
    if same:
        yield Part("text", "ok", f"{same} of {len(recorded)} files, {size:,} bytes, sha256 as in run.json")


def _leftovers(run_dir: Path) -> Iterator[Part]:
    for folder in (run_dir, run_dir / checkpoint.FOLDER):
        for path in sorted(folder.glob("*.tmp-[0-9]*")):
            why = "half written, by a save under way or a process that was killed: the next one that trains removes it"
            yield Part(path.relative_to(run_dir).as_posix(), "note", why)


# -- whether it resumes -----------------------------------------------------------------------------------------------


def try_resume(run_dir: Path, say: Say) -> Resumption:
    """Train on from the latest checkpoint twice, once interrupted, in a temporary folder, and compare the ends.

    The copies have the run's weights, moments, text, dropout, engine, precision and threads, but `STEPS` steps of their
    own at the peak learning rate: the schedule of a finished run is over. Raises DamagedError where there is no whole
    checkpoint, or the text is gone, and KeyboardInterrupt for a signal.
    """
    run = Run(run_dir)
    latest = checkpoint.load(run_dir, "latest", say)
    dataset = tokens.of_run(run.config.data, run.record["data"], run.tokenizer, say)
    checkpoint.check(latest, **hashes(run, dataset))
    with tempfile.TemporaryDirectory(prefix="glasslm-verify-", ignore_cleanup_errors=True) as folder:
        whole, cut = (_copy(run, latest, dataset, Path(folder, name)) for name in ("whole", "cut"))
        with contextlib.redirect_stderr(io.StringIO()):  # the display of a run, which nobody need see
            with _training(whole, dataset) as loop:
                _require_end(loop.run())
            with _training(cut, dataset) as loop:
                while loop.step < latest.step + STOPPED_AFTER or loop.saved_at == loop.step:
                    loop.do_step()
            died, resumed = loop.step, max(checkpoint.list_steps(cut.path))
            _as_a_kill_leaves_it(cut.path)
            _require_end(launch.resume(cut.path, _compute(cut)[0], lambda message: None).status)
        return _compare(whole, cut, latest.step, died, resumed)


def _copy(run: Run, latest: Checkpoint, dataset: Dataset, folder: Path) -> Run:
    """A run that stands where `latest` does and has STEPS more to go."""
    train = dataclasses.replace(
        run.config.train, max_steps=latest.step + STEPS, log_interval=1, eval_interval=STEPS // 2, sample_interval=0,
        checkpoint_interval=STEPS // 3, stop_at_loss=None, patience=None, max_time=None,
    )  # fmt: skip
    optimizer = dataclasses.replace(run.config.optimizer, schedule="constant")
    config = dataclasses.replace(run.config, train=train, optimizer=optimizer)
    record = {name: value for name, value in run.record.items() if name not in ("format", "base")}
    with files.lock(folder):
        runs.create(folder, record | {"config": to_dict(config)}, run.tokenizer.to_json())
        if (run.path / checkpoint.BASE).is_dir():
            shutil.copytree(run.path / checkpoint.BASE, folder / checkpoint.BASE)
        with open(run.path / "metrics.jsonl", "rb") as file:
            files.write_atomic(folder / "metrics.jsonl", file.read(latest.progress.metrics_bytes))
        copy = Run(folder)
        memory = latest.progress.loop | {"measured": False, "safe_at": latest.step}
        progress = dataclasses.replace(latest.progress, best=None, loop=memory)
        held = cast(Engine, _Held(latest, table(config.model, run.tokenizer.vocab_size)))
        belongs_to: dict[str, Any] = hashes(copy, dataset)
        checkpoint.save(folder, held, progress, keep=train.keep, **belongs_to)
    return copy


@dataclass(frozen=True)
class _Held:
    """An engine as far as a checkpoint to be written knows one."""

    latest: Checkpoint
    rows: Table

    def state(self) -> Iterator[tuple[str, Array]]:
        return ((name, array) for name, array in self.latest.state() if "/" in name or self.rows[name].trained)


def _compute(run: Run) -> tuple[ComputeConfig, list[str]]:
    """As recorded; a GPU adds in a fixed order, or no two runs would be equal."""
    return as_recorded(ComputeConfig(deterministic=run.record["device"] != "cpu"), run.record)


@contextmanager
def _training(run: Run, dataset: Dataset) -> Iterator[Loop]:
    """The loop from the latest checkpoint; when the block ends it is gone, with nothing saved."""
    start = checkpoint.load(run.path)
    log = Log(run.path / "metrics.jsonl", start.progress.metrics_bytes)
    with enough_memory(run.config, run.record["engine"]), log, Display() as shown:
        engine = make_engine(run.config, run.tokenizer.vocab_size, _compute(run)[0], training=True)
        engine.load(start.state(), start.progress.updates, start.progress.loss_scale)
        yield Loop(run, engine, dataset, log, shown, start.progress)


def _require_end(status: str) -> None:
    if status != "finished":  # nothing but a signal ends it early
        raise KeyboardInterrupt


def _as_a_kill_leaves_it(run_dir: Path) -> None:
    """Half a line of metrics, and half a checkpoint."""
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(TORN)
    half = run_dir / checkpoint.FOLDER / "999999.tmp-1"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")


def _compare(whole: Run, cut: Run, begin: int, died: int, resumed: int) -> Resumption:
    one, other = (checkpoint.load(run.path) for run in (whole, cut))
    expected, found = dict(one.state()), dict(other.state())
    assert expected.keys() == found.keys()
    differences = {name: float(np.abs(array - found[name]).max()) for name, array in expected.items()}
    where = max(differences, key=differences.__getitem__)
    lines, same = (metrics.comparable(run.metrics()) for run in (whole, cut))
    one_at, other_at = (dataclasses.replace(held.progress, metrics_bytes=0) for held in (one, other))
    return Resumption(
        engine=whole.record["engine"],
        precision=whole.record["precision"],
        begin=begin,
        died=died,
        resumed=resumed,
        end=one.step,
        entries=len(expected),
        difference=differences[where],
        where=where,
        lines=sum(line["step"] > begin for line in lines),
        same_lines=lines == same,
        same_progress=one_at == other_at,
    )
