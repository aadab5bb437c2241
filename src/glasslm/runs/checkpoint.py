"""Checkpoints: writing, loading, rotating and verifying the weights, moments and state of a run.

A checkpoint is the folder checkpoints/000500: model.safetensors (names of the parameter table;
float32, or float64 when the engine computes in float64), optimizer.safetensors (moments as
`adamw.m/NAME`), state.json (TrainingPosition and RunIdentity) and manifest.json. A run that trains
adapters has only those in its checkpoints; its frozen weights are in base/model.safetensors. So are
the first weights of preference tuning. No file points to another: the latest checkpoint is the
highest step that verifies, and its state names the best. The same state gives the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from glasslm import files, strict_json
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.engines.protocol import State
from glasslm.engines.state import AVERAGE
from glasslm.errors import DamagedError, DivergedError, InputError
from glasslm.runs.checkpoint_selector import CheckpointSelector
from glasslm.runs.tensor_file import lazy_arrays, read_arrays, safetensors_chunks
from glasslm.runs.typed_json import Count, require_type
from glasslm.text import Notify, notify

Array = NDArray[Any]

FORMAT = 1
FOLDER, BASE = "checkpoints", "base"
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class RunIdentity(NamedTuple):
    """The hashes of what a checkpoint belongs to."""

    config_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    record_sha256: str | None = None  # of the bytes of run.json; None in older runs


class BestRecord(TypedDict):
    """Best, as JSON."""

    step: Count
    loss: float


class StateRecord(TypedDict):
    """state.json, which is read by this type. Older runs may lack the NotRequired fields."""

    format: Literal[1]
    step: Count
    updates: Count
    tokens: Count
    metrics_bytes: Count
    metrics_sha256: NotRequired[str | None]
    best: BestRecord | None
    loss_scale: NotRequired[float]
    loop: dict[str, Any]
    config_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    record_sha256: NotRequired[str | None]
    base_sha256: NotRequired[str]


class ManifestRecord(TypedDict):
    """manifest.json, as far as a position needs it."""

    files: dict[str, dict[str, Any]]


class Best(NamedTuple):
    """The lowest validation loss (nats per token) so far, and the step of its checkpoint."""

    step: int
    loss: float


@dataclass(frozen=True)
class TrainingPosition:
    """The counters and states that an exact resume needs besides weights and moments."""

    step: int  # batches consumed
    updates: int  # updates applied; a skipped step applies none
    tokens: int  # tokens trained on
    metrics_bytes: int  # length of metrics.jsonl
    best: Best | None = None
    loop: dict[str, Any] = field(default_factory=dict)  # training.loop_state.LoopState, as JSON
    loss_scale: float = 1.0  # of float16 gradients
    metrics_sha256: str | None = None  # of the first `metrics_bytes`; None in older runs

    @property
    def metrics_position(self) -> tuple[int, str | None]:
        """Length and hash of the lines of metrics.jsonl before the checkpoint, for MetricsLog."""
        return self.metrics_bytes, self.metrics_sha256


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files agree with their manifest. Its arrays are read when needed."""

    path: Path
    position: TrainingPosition
    identity: RunIdentity
    base_sha256: str | None = None  # of base/model.safetensors, in runs with adapters

    @property
    def step(self) -> int:
        """The number of batches trained on."""
        return self.position.step

    def weights(self) -> dict[str, Array]:
        """The weights for inference by name: their moving average, where the run has one."""
        averages = read_arrays(self.path / _OPTIMIZER, f"{AVERAGE}/")
        return self._last_weights() | {
            name.removeprefix(f"{AVERAGE}/"): array for name, array in averages.items()
        }

    def lazy_weights(self) -> LazyArrays:
        """`weights`, read when asked for where neither adapters nor averages belong to them."""
        weights = lazy_arrays(self.path / _MODEL)
        averages = lazy_arrays(self.path / _OPTIMIZER, f"{AVERAGE}/")
        has_adapters = any(".lora_" in name for name in weights)
        if not (has_adapters or averages):
            return weights
        merged = self.weights()
        return LazyArrays({name: array.shape for name, array in merged.items()}, merged.__getitem__)

    def state(self) -> Iterator[tuple[str, Array]]:
        """The weights after the last step, then moments and averages, for Engine.load."""
        yield from self._last_weights().items()
        yield from read_arrays(self.path / _OPTIMIZER).items()

    def _last_weights(self) -> dict[str, Array]:
        weights = read_arrays(self.path / _MODEL)
        if not any(".lora_" in name for name in weights):
            return weights
        base = self.path.parent.parent / BASE
        files.verify_folder(base)
        if (base_sha256 := _base_sha256(base)) != self.base_sha256:
            raise DamagedError(
                f"{base / _MODEL} belongs to another run: its sha256 is {base_sha256}, {self.path} "
                f"was trained with {self.base_sha256}. Put the original back"
            )
        return read_arrays(base / _MODEL) | weights


def save(
    run_dir: Path,
    state: State | LazyArrays,
    position: TrainingPosition,
    identity: RunIdentity,
    *,
    keep: int = 2,
    protect_step: int = 0,
) -> Path:
    """Write the checkpoint of `position.step` and remove old ones; returns its folder.

    `state` is that of Engine.state: trained weights, and moments unless all of them are zero.
    The `keep` newest stay, and also the best, step 0 and `protect_step`. Raises DivergedError for a
    value that is not finite and ExhaustedError when the disk is full; the older checkpoints are
    untouched then.
    """
    weights, moments = (state, {}) if isinstance(state, LazyArrays) else _split_state(state)
    for name, array in () if isinstance(state, LazyArrays) else {**weights, **moments}.items():
        if not np.isfinite(array).all():
            raise DivergedError(
                f"{name} is not finite at step {position.step}: no checkpoint is written"
            )
    values = {
        "format": FORMAT,
        **dataclasses.asdict(position),
        "best": position.best._asdict() if position.best else None,
        **identity._asdict(),
    }
    if (run_dir / BASE).is_dir():
        values["base_sha256"] = _base_sha256(run_dir / BASE)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        files.sync_file(metrics)  # its first metrics_bytes must survive a power failure
    path = _checkpoint_path(run_dir, position.step)
    contents: dict[str, Iterable[files.Chunk]] = {
        _MODEL: safetensors_chunks(weights),
        _OPTIMIZER: safetensors_chunks(moments),
        _STATE: [strict_json.json_bytes(values)],
    }
    files.write_folder(path, contents)
    _verified_folders.add(path.absolute())
    _rotate(run_dir, position, keep, protect_step)
    return path


def _split_state(state: State) -> tuple[Mapping[str, Array], dict[str, Array]]:
    """The weights, and the moments and averages, named KIND/NAME."""
    parts: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
    for name, array in state:
        parts["/" in name][name] = array
    return parts


def save_base(run_dir: Path, frozen: dict[str, Array]) -> None:
    """Write frozen weights once: those under adapters, or the first ones of preference tuning."""
    files.write_folder(run_dir / BASE, {_MODEL: safetensors_chunks(frozen)})


def read_base(run_dir: Path) -> dict[str, Array]:
    """The weights of base/ by name; DamagedError where they are missing or were altered."""
    files.verify_folder(run_dir / BASE)
    return read_arrays(run_dir / BASE / _MODEL)


def list_steps(run_dir: Path) -> list[int]:
    """The steps of all checkpoints of a run, ascending; they are not verified."""
    folder = run_dir / FOLDER
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def load(
    run_dir: Path, which: CheckpointSelector = "latest", warn: Notify | None = None
) -> Checkpoint:
    """The latest or best checkpoint, or that of one step, compared with its manifest.

    If the latest or best checkpoint is damaged, the newest intact one is loaded; `warn` (default:
    print to standard error) receives the name of the damaged file. Raises DamagedError when no
    checkpoint verifies, or that of the given step does not; InputError when there is no such step.
    """
    warn = warn or _warn
    steps = list_steps(run_dir)
    if isinstance(which, int):
        if which not in steps:
            existing = ", ".join(map(str, steps)) or "none"
            raise InputError(f"{run_dir} has no checkpoint of step {which}: there are {existing}")
        return _open_checkpoint(_checkpoint_path(run_dir, which))
    latest = _latest(run_dir, steps, warn)
    best = latest.position.best
    if which == "latest" or best is None or best.step == latest.step:
        return latest
    try:
        return _open_checkpoint(_checkpoint_path(run_dir, best.step))
    except DamagedError as error:
        warn(f"the best checkpoint is damaged ({error}); using step {latest.step}")
        return latest


def require_identity(checkpoint: Checkpoint, identity: RunIdentity) -> None:
    """Raise DamagedError, with both hashes, where config, tokenizer, text or run.json is another.

    The checkpoints of older runs have no hash of run.json.
    """
    for field_name in ("config_sha256", "tokenizer_sha256", "data_sha256"):
        run_hash, checkpoint_hash = (
            getattr(each, field_name) for each in (identity, checkpoint.identity)
        )
        if run_hash != checkpoint_hash:
            raise DamagedError(
                f"{checkpoint.path} belongs to another {field_name.removesuffix('_sha256')}: it "
                f"was written with sha256 {checkpoint_hash}, this run has {run_hash}. Put the "
                "original back, or start a new run"
            )
    require_record(checkpoint, identity.record_sha256)


def require_record(checkpoint: Checkpoint, record_sha256: str | None) -> None:
    """Raise DamagedError where run.json has another hash than when the checkpoint was written."""
    expected = checkpoint.identity.record_sha256
    if expected not in (None, record_sha256):
        raise DamagedError(
            f"{checkpoint.path.parent.parent / 'run.json'} was altered, or {checkpoint.path.name} "
            f"is a checkpoint of another run: its sha256 is {record_sha256}, "
            f"{checkpoint.path.name}/{_STATE} says {expected}. Restore it from a copy"
        )


def _latest(run_dir: Path, steps: list[int], warn: Notify) -> Checkpoint:
    problem = ""
    for step in reversed(steps):
        try:
            checkpoint = _open_checkpoint(_checkpoint_path(run_dir, step))
        except DamagedError as error:
            problem = problem or str(error)
            continue
        if problem:
            warn(f"a checkpoint is damaged ({problem}); going back to step {step}")
        return checkpoint
    reason = (
        f"every checkpoint is damaged ({problem})"
        if steps
        else f"{run_dir} ended before its first checkpoint"
    )
    raise DamagedError(
        f"{reason}: there is nothing to continue from; start a new run"
        + ("" if steps else " in the same folder")
    )


def remove_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints after `step`, whose hashes do not fit a log that goes on from it."""
    for later in list_steps(run_dir):
        if later > step:
            files.remove_folder(_checkpoint_path(run_dir, later))


def _rotate(run_dir: Path, position: TrainingPosition, keep: int, protect_step: int) -> None:
    """Remove checkpoints but this, `keep - 1` complete ones before it, and the protected ones."""
    protected_steps = {0, protect_step, position.best.step if position.best else 0}
    n_complete = 1
    for step in reversed(list_steps(run_dir)):
        path = _checkpoint_path(run_dir, step)
        if step < position.step and n_complete < keep and _is_complete(path):
            n_complete += 1
        elif step != position.step and step not in protected_steps:
            files.remove_folder(path)


# Checkpoints that this process has written or verified by their hashes. Rotation compares only the
# sizes of their files, as hashing would read hundreds of megabytes at each save.
_verified_folders: set[Path] = set()


def _is_complete(path: Path) -> bool:
    try:
        files.verify_folder(path, hashes=path.absolute() not in _verified_folders)
    except DamagedError:
        return False
    _verified_folders.add(path.absolute())
    return True


def _checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"{step:06d}"


def _warn(message: str) -> None:
    notify(f"warning: {message}")


# -- files of a checkpoint -------------------------------------------------------------------------


def load_position(run_dir: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, of which only state.json is compared with the manifest.

    Raises DamagedError where that file was altered. The weights are not read, so it takes no time.
    """
    path = _checkpoint_path(run_dir, step)
    manifest = files.read_json(path / files.MANIFEST)
    require_type(manifest, ManifestRecord, path / files.MANIFEST)
    entry = manifest["files"].get(_STATE, {})
    if files.file_sha256(path / _STATE) != entry.get("sha256"):
        raise DamagedError(f"{path / _STATE} was altered: {path / files.MANIFEST} has another hash")
    return _parse_state(path)


def _open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder; DamagedError, with the file's name, when any part is damaged."""
    files.verify_folder(path)
    for name in (_MODEL, _OPTIMIZER):
        if not (path / name).exists():
            raise DamagedError(f"{path / name} is missing")
    return _parse_state(path)


def _parse_state(path: Path) -> Checkpoint:
    """The checkpoint `path` by its state.json; DamagedError where that is not of this type."""
    state = files.read_json(path / _STATE)
    if isinstance(state, dict) and state.get("format", FORMAT) != FORMAT:
        raise DamagedError(
            f"{path / _STATE} has format {state['format']}: this glasslm reads format {FORMAT}"
        )
    require_type(state, StateRecord, path / _STATE)
    best = state["best"]
    position = TrainingPosition(
        step=state["step"],
        updates=state["updates"],
        tokens=state["tokens"],
        metrics_bytes=state["metrics_bytes"],
        best=Best(best["step"], float(best["loss"])) if best else None,
        loss_scale=float(state.get("loss_scale", 1.0)),
        loop=state["loop"],
        metrics_sha256=state.get("metrics_sha256"),
    )
    identity = RunIdentity(*(state.get(name) for name in RunIdentity._fields))
    if path.name != f"{position.step:06d}":
        raise DamagedError(f"{path} holds step {position.step}: the folder was renamed")
    return Checkpoint(path, position, identity, state.get("base_sha256"))


def _base_sha256(base: Path) -> str:
    return str(files.read_json(base / files.MANIFEST)["files"][_MODEL]["sha256"])
