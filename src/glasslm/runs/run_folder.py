"""Run folders: finding, creating and reading them.

run.json and tokenizer.json are written once, when the run starts; metrics.jsonl grows; checkpoints
are written and rotated (checkpoint.py). All files can be read without glasslm (docs/formats.md).
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glasslm import files, strict_json
from glasslm.config.conversion import from_dict
from glasslm.config.schema import RunConfig
from glasslm.errors import DamagedError, InputError
from glasslm.runs import checkpoint, metrics
from glasslm.runs.checkpoint import RunIdentity
from glasslm.runs.history import History, read_history
from glasslm.runs.record import FORMAT, RunRecord
from glasslm.runs.run_lock import LOCK_FILE, lock_run
from glasslm.runs.typed_json import Count, require_type
from glasslm.text import Notify, quote_path, similar_names

if TYPE_CHECKING:
    from glasslm.data.dataset import Dataset
    from glasslm.data.tokenizers import Tokenizer

RUNS = Path("runs")
_RECORD, _TOKENIZER, _METRICS = "run.json", "tokenizer.json", "metrics.jsonl"


def find_run(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of the run with this path, or with this name under ./runs.

    Raises InputError, with similar names, where there is none.
    """
    requested = Path(name_or_path)
    for path in (requested, RUNS / requested):
        if (path / _RECORD).is_file():
            return path
    if requested.exists():
        raise InputError(f"{requested} is not a run: it holds no {_RECORD}")
    names = sorted(path.parent.name for path in RUNS.glob(f"*/{_RECORD}"))
    if similar := similar_names(requested.name, names, count=3, min_similarity=0.4):
        raise InputError(f"there is no run '{requested}': did you mean {' or '.join(similar)}?")
    raise InputError(
        f"there is no run '{requested}', as a path or under {RUNS.resolve()}: `glasslm train` "
        "makes one"
    )


def default_name(corpus_or_stem: str, preset: str) -> str:
    """A new run name, valid on every file system: corpus or file stem, preset, date and time.

    >>> default_name("Faust: part I", "tiny")
    'Faust-part-I-tiny-20260314-153000'
    """
    stem = re.sub(r"[^\w]+", "-", corpus_or_stem).strip("-_")[:40] or "text"
    name = base = f"{stem}-{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while (RUNS / name).exists():
        number += 1
        name = f"{base}-{number}"
    return name


def study_folder(path: Path | None, kind: str, topic: str, flag: str = "--out") -> Path:
    """The folder of a study of several runs: `path`, or a new one named for its kind and topic.

    Raises InputError where that folder is a run. `flag` is the one that the message names.
    """
    folder = path or RUNS / default_name(kind, topic)
    if (folder / _RECORD).exists():
        raise InputError(f"{folder} holds a run, not a study: choose another {flag}")
    return folder


def continuation_hint(folder: Path, flag: str = "--out") -> str:
    """How to continue the study in `folder` after an interruption; `flag` names its folder."""
    return f"to continue it, give the same command with {flag} {quote_path(folder)}"


def require_new(run_dir: Path) -> None:
    """Raise an error, before any work is done, where no run can be started in `run_dir`.

    Nothing is created. Raises InUseError when another process trains there; InputError when the
    folder holds a run with a checkpoint or anything else, or cannot be written.
    """
    if (run_dir / _RECORD).exists():
        with lock_run(run_dir):  # its InUseError names the process
            pass
    _refuse_existing(run_dir)
    parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(
            f"{run_dir} cannot be created, because {parent} cannot be written: choose another "
            "--run-dir"
        )


def create_run(run_dir: Path, record: Mapping[str, Any], tokenizer_json: str) -> None:
    """Write run.json and tokenizer.json of a new run. The caller holds its lock.

    A run that ended before its first checkpoint is replaced. Raises InputError when the folder
    holds another run or anything else, ExhaustedError when the disk is full.
    """
    _refuse_existing(run_dir)
    delete_run(run_dir)
    files.make_folder(run_dir / checkpoint.FOLDER)
    files.write_atomic(run_dir / _TOKENIZER, tokenizer_json.encode("utf-8"))
    # run.json comes last: a folder with it is a run.
    files.write_json(run_dir / _RECORD, {"format": FORMAT, **record})


def delete_run(run_dir: Path) -> None:
    """Delete what a run that ended before its first checkpoint left. The caller holds its lock."""
    for name in (_RECORD, _METRICS, _TOKENIZER, checkpoint.BASE):
        files.remove(run_dir / name)


def is_without_progress(run_dir: Path) -> bool:
    """Whether the run has neither a checkpoint nor lost one: a new run may replace it."""
    if checkpoint.list_steps(run_dir):
        return False
    lines = metrics.read_lines(run_dir / _METRICS)
    return not any(line["kind"] in ("step", "checkpoint") for line in lines)


def _refuse_existing(run_dir: Path) -> None:
    if (run_dir / _RECORD).exists():
        if is_without_progress(run_dir):
            return
        if not checkpoint.list_steps(run_dir):
            raise InputError(
                f"{run_dir} holds a run whose checkpoints are missing: restore them, or choose "
                "another --run-dir"
            )
        raise InputError(
            f"{run_dir} already holds a run: continue it with `glasslm resume {run_dir}`, or "
            "choose another --run-dir"
        )
    if not run_dir.is_dir():
        return
    present = {entry.name for entry in run_dir.iterdir()}
    if LOCK_FILE in present:  # a run that died while it was created left these
        present -= {LOCK_FILE, _TOKENIZER, checkpoint.FOLDER}
    present = {name for name in present if ".tmp-" not in name}
    if present:
        raise InputError(
            f"{run_dir} holds other files ({min(present)}): choose an empty or a new --run-dir"
        )


def config_sha256(config: dict[str, Any]) -> str:
    """The SHA-256 of a configuration, given as the value of `config` in run.json."""
    return hashlib.sha256(strict_json.json_bytes(config, indent=None, sort=True)).hexdigest()


class Run:
    """A run, in training or trained: the folder `path`. Its files are read when they are needed.

    Every attribute raises DamagedError where the file it needs is missing or was altered.

    >>> run = glasslm.train(text_file="book.txt", max_steps=500)
    >>> run.history.best_val_loss
    1.587
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """`path` is the folder of a run."""
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def record(self) -> RunRecord:
        """run.json as a dictionary (docs/formats.md).

        Raises DamagedError when it is missing, is not JSON, or has another format.
        """
        path = self.path / _RECORD
        record = files.read_json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DamagedError(
                f"{path} is not a run.json of format {FORMAT}: use a newer glasslm, or restore the "
                "file"
            )
        require_type(record, RunRecord, path)
        return cast(RunRecord, record)

    @cached_property
    def record_sha256(self) -> str:
        """The SHA-256 of the bytes of run.json."""
        return files.file_sha256(self.path / _RECORD)

    @cached_property
    def config(self) -> RunConfig:
        """The configuration that the run was started with."""
        try:
            return from_dict(RunConfig, self.record["config"])
        except InputError as error:  # a flag may have the same fault
            raise DamagedError(
                f"{self.path / _RECORD} is damaged: in its config, {error}. Restore it from a copy"
            ) from None

    @cached_property
    def config_sha256(self) -> str:
        """The SHA-256 of the configuration."""
        return config_sha256(self.record["config"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run; DamagedError unless run.json has the hash of its file."""
        from glasslm.data import tokenizers

        path = self.path / _TOKENIZER
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing: restore it from a copy") from None
        # Of the bytes: an edit may leave a file from which the same tokenizer is parsed.
        actual, expected = hashlib.sha256(content).hexdigest(), self.record["tokenizer"]["sha256"]
        if actual != expected:
            raise DamagedError(
                f"{path} was altered: its sha256 is {actual}, run.json says {expected}. Restore it "
                "from a copy"
            )
        try:
            tokenizer = tokenizers.parse_tokenizer(content.decode("utf-8"))
        except ValueError as error:  # InputError is one: users give tokenizer files, too
            raise DamagedError(f"{path} is not as glasslm wrote it: {error}") from None
        # The text may have shown what the file alone does not.
        tokenizer.lossy_reason = self.record["tokenizer"].get(
            "lossy_reason", tokenizer.lossy_reason
        )
        ends = self.record["tokenizer"].get("transformers", {}).get("generation_eos_ids", [])
        require_type(ends, list[Count], self.path / _RECORD)
        tokenizer.other_end_ids = frozenset(ends)
        return tokenizer

    @property
    def identity(self) -> RunIdentity:
        """The hashes of config, tokenizer, data and run.json, which each checkpoint repeats."""
        return RunIdentity(
            self.config_sha256,
            self.tokenizer.sha256,
            self.record["data"]["sha256"],
            self.record_sha256,
        )

    def dataset(self, notify: Notify) -> Dataset:
        """The tokens of the run's text, from the cache or tokenized again.

        `notify` receives progress messages. Raises DamagedError where the text is missing or has
        changed.
        """
        from glasslm.data.dataset import load_run_dataset

        facts = cast(dict[str, Any], self.record["data"])
        if self.config.data.chat is not None:
            from glasslm.data.chat.chat_dataset import load_chat_dataset
            from glasslm.data.chat.chat_vocabulary import ChatVocabulary

            settings = self.record["tokenizer"].get("transformers", {})
            vocabulary = ChatVocabulary(self.tokenizer, settings)
            return load_chat_dataset(self.config.data, facts, vocabulary, notify)
        return load_run_dataset(self.config.data, facts, self.tokenizer, notify)

    def metrics(self) -> Iterator[metrics.Line]:
        """The lines of metrics.jsonl as dictionaries (docs/formats.md)."""
        return metrics.read_lines(self.path / _METRICS)

    @property
    def history(self) -> History:
        """metrics.jsonl as columns. It is read at each access, as the run may be in progress."""
        return read_history(self.metrics())

    @property
    def length(self) -> int:
        """The number of training steps in the log and the checkpoints."""
        return max(
            [0, *(line["step"] for line in self.metrics()), *checkpoint.list_steps(self.path)]
        )

    @property
    def best_val_loss(self) -> float | None:
        """The lowest validation loss, in nats per token; None before the first evaluation."""
        return self.history.best_val_loss
