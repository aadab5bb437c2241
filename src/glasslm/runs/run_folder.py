"""A run is a folder: found by name, created once, read lazily.

run.json and tokenizer.json are written when the run starts and never again; metrics.jsonl grows; checkpoints come and
go (checkpoint.py). Everything is readable without glasslm.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glasslm import files
from glasslm.config.conversion import from_dict
from glasslm.config.schema import RunConfig
from glasslm.errors import DamagedError, InputError
from glasslm.runs import checkpoint, metrics
from glasslm.runs.checkpoint import RunIdentity
from glasslm.runs.history import History, read_history
from glasslm.runs.record import FORMAT, RunRecord
from glasslm.text import Notify

if TYPE_CHECKING:
    from glasslm.data.dataset import Dataset
    from glasslm.data.tokenizers import Tokenizer

RUNS = Path("runs")
_RECORD, _TOKENIZER, _METRICS = "run.json", "tokenizer.json", "metrics.jsonl"


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a run, given by its path or by its name under ./runs; InputError, with what is close, if none."""
    given = Path(name_or_path)
    for path in (given, RUNS / given):
        if (path / _RECORD).is_file():
            return path
    if given.exists():
        raise InputError(f"{given} is not a run: it holds no {_RECORD}")
    names = sorted(path.parent.name for path in RUNS.glob(f"*/{_RECORD}"))
    close = difflib.get_close_matches(given.name, names, n=3, cutoff=0.4)
    if close:
        raise InputError(f"there is no run '{given}': did you mean {' or '.join(close)}?")
    raise InputError(
        f"there is no run '{given}', as a path or under {RUNS.resolve()}: `glasslm train` makes one"
    )


def default_name(corpus_or_stem: str, preset: str) -> str:
    """A new name under ./runs, fit for every file system: corpus or file stem, preset, date and time.

    >>> default_name("Faust: part I", "tiny")
    'Faust-part-I-tiny-20260314-153000'
    """
    stem = re.sub(r"[^\w]+", "-", corpus_or_stem).strip("-_")[:40] or "text"
    name = base = f"{stem}-{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    again = 1
    while (RUNS / name).exists():
        again += 1
        name = f"{base}-{again}"
    return name


def study_folder(given: Path | None, kind: str, of: str, flag: str = "--out") -> Path:
    """The folder that a study of several runs is in or goes to; InputError where that is a run itself."""
    folder = given or RUNS / default_name(kind, of)
    if (folder / _RECORD).exists():
        raise InputError(f"{folder} holds a run, not a study: choose another {flag}")
    return folder


def require_new(run_dir: Path) -> None:
    """Make sure, before any work is done, that a run can be started in `run_dir`; nothing is created.

    Raises InUseError when another process trains there, InputError when there is a run already, when the folder holds
    anything else, or when it cannot be written.
    """
    if (run_dir / _RECORD).exists():
        with files.lock(run_dir):  # an InUseError says more
            pass
    _refuse_existing(run_dir)
    parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(
            f"{run_dir} cannot be made, because {parent} cannot be written: choose another --run-dir"
        )


def create(run_dir: Path, record: Mapping[str, Any], tokenizer_json: str) -> None:
    """Write run.json and tokenizer.json of a new run. The caller holds files.lock(run_dir).

    Raises InputError when there is a run or anything else in the folder,
    ExhaustedError when the disk is full.
    """
    _refuse_existing(run_dir)
    files.make_folder(run_dir / checkpoint.FOLDER)
    files.write_atomic(run_dir / _TOKENIZER, tokenizer_json.encode("utf-8"))
    files.write_json(
        run_dir / _RECORD, {"format": FORMAT, **record}
    )  # last: with it the run exists


def clear(run_dir: Path) -> None:
    """Forget a run that ended before its first checkpoint, of which nothing can be gone on with. The lock is held."""
    for name in (_RECORD, _METRICS, _TOKENIZER):
        (run_dir / name).unlink(missing_ok=True)


def _refuse_existing(run_dir: Path) -> None:
    if (run_dir / _RECORD).exists():
        if not checkpoint.list_steps(run_dir):
            raise InputError(
                f"{run_dir} holds a run that ended before its first checkpoint: delete it, or choose another --run-dir"
            )
        raise InputError(
            f"{run_dir} already holds a run: go on with it by `glasslm resume {run_dir}`, or choose another --run-dir"
        )
    if not run_dir.is_dir():
        return
    present = {entry.name for entry in run_dir.iterdir()}
    if files.LOCK in present:  # a run that died while it was created left these
        present -= {files.LOCK, _TOKENIZER, checkpoint.FOLDER}
    present = {name for name in present if ".tmp-" not in name}
    if present:
        raise InputError(
            f"{run_dir} holds other things ({min(present)}): choose an empty or a new --run-dir"
        )


def config_sha256(config: dict[str, Any]) -> str:
    """The identity of a configuration, as run.json has it under `config`."""
    return hashlib.sha256(files.json_bytes(config, indent=None, sort=True)).hexdigest()


class Run:
    """A run folder. Nothing is read before it is asked for.

    >>> run = Run(find("shakespeare-tiny-20260314-153000"))
    >>> run.history.best_val_loss
    1.587
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def record(self) -> RunRecord:
        """run.json; DamagedError when it is missing, is not JSON, or has another format."""
        path = self.path / _RECORD
        record = files.read_json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DamagedError(
                f"{path} is not a run.json of format {FORMAT}: use a newer glasslm, or restore the file"
            )
        return cast(RunRecord, record)

    @cached_property
    def config(self) -> RunConfig:
        return from_dict(RunConfig, self._part("config"))

    @cached_property
    def config_sha256(self) -> str:
        return config_sha256(self._part("config"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; DamagedError when it is not the one that run.json names."""
        from glasslm.data import tokenizers

        path = self.path / _TOKENIZER
        try:
            tokenizer = tokenizers.parse_tokenizer(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing") from None
        except ValueError as error:  # also an InputError, which it is for a file that a user gives
            raise DamagedError(f"{path} is not as glasslm wrote it: {error}") from None
        expected = self._part("tokenizer")["sha256"]
        if tokenizer.sha256 != expected:
            raise DamagedError(
                f"{path} is another tokenizer: its sha256 is {tokenizer.sha256}, run.json says {expected}"
            )
        return tokenizer

    @property
    def identity(self) -> RunIdentity:
        """The hashes of config, tokenizer and data, which each checkpoint of this run has too."""
        data_sha256 = self._part("data")["sha256"]
        return RunIdentity(self.config_sha256, self.tokenizer.sha256, data_sha256)

    def dataset(self, notify: Notify) -> Dataset:
        """The tokens of the run's text, from the cache or made again from the text.

        Raises DamagedError where the text is gone or has changed.
        """
        from glasslm.data.dataset import load_run_dataset

        return load_run_dataset(self.config.data, self._part("data"), self.tokenizer, notify)

    def metrics(self) -> Iterator[metrics.Line]:
        """The lines of metrics.jsonl."""
        return metrics.read(self.path / _METRICS)

    @property
    def history(self) -> History:
        """metrics.jsonl as columns, read anew each time: the run may be going on."""
        return read_history(self.metrics())

    @property
    def length(self) -> int:
        """How many steps the run has made, as far as its log and its checkpoints know."""
        return max(
            [0, *(line["step"] for line in self.metrics()), *checkpoint.list_steps(self.path)]
        )

    @property
    def best_val_loss(self) -> float | None:
        return self.history.best_val_loss

    def _part(self, name: str) -> Any:
        if name not in self.record:
            raise DamagedError(
                f"{self.path / _RECORD} lacks '{name}': it is not as glasslm wrote it"
            )
        return self.record[name]  # type: ignore[literal-required]
