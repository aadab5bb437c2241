"""The models of a server: their names, their weights, and newer weights of a run in training."""

from __future__ import annotations

import hashlib
import importlib.metadata
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.config.schema import DeviceConfig
from glasslm.data.chat.chat_template import ChatTemplate
from glasslm.errors import DamagedError, InputError
from glasslm.inference.request import Grammar
from glasslm.inference.trained_model import Model, load_model
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint_selector import CheckpointSelector
from glasslm.serve.json_schema import SchemaGrammar
from glasslm.serve.logprobs import TokenNames


def hash_checkpoint(run_dir: Path, step: int) -> str:
    """The hash that names a checkpoint and its run.json; empty where one of the two is missing.

    The manifest has the hashes of the files, which are not read.
    """
    path = manifest_path(run_dir, step)
    try:
        content = path.read_bytes() + files.file_sha256(run_dir / "run.json").encode()
    except FileNotFoundError:
        return ""
    return hashlib.sha256(content).hexdigest()[:32]


def manifest_path(run_dir: Path, step: int) -> Path:
    """The file with the hashes of a checkpoint."""
    return run_dir / checkpoint.FOLDER / f"{step:06d}" / files.MANIFEST


@dataclass(frozen=True)
class ModelSource:
    """A run, the name by which clients ask for it, and how it is loaded."""

    name: str
    path: Path
    selector: CheckpointSelector
    device: DeviceConfig

    def load(self) -> LoadedModel:
        """The model. Raises InputError or DamagedError where it cannot be loaded."""
        return self._load(self.selector)

    def newest_hash(self) -> str:
        """The hash of the newest checkpoint, whose files are not verified; empty without one."""
        for step in reversed(checkpoint.list_steps(self.path)):
            if newest := hash_checkpoint(self.path, step):
                return newest
        return ""

    def load_newest(self) -> LoadedModel:
        """The model of the newest checkpoint, tried again while the run replaces its files."""
        for attempt in range(3):
            try:
                return self._load("latest")
            except (DamagedError, FileNotFoundError):
                if attempt == 2:
                    raise
                time.sleep(0.2)
        raise AssertionError

    def _load(self, selector: CheckpointSelector) -> LoadedModel:
        # The hashes come first: those of a run that is replaced meanwhile are old, so the next
        # reload takes up the new one.
        steps = checkpoint.list_steps(self.path)
        hashes = {step: hash_checkpoint(self.path, step) for step in steps}
        model = load_model(self.path, selector, **vars(self.device))
        own_hash = hashes.get(model.step) or hash_checkpoint(self.path, model.step)
        return LoadedModel(self, model, own_hash)


@dataclass(eq=False)
class LoadedModel:
    """The weights of a model, and what answering with them needs."""

    source: ModelSource
    model: Model
    hash: str  # of hash_checkpoint
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970
    is_retired: bool = False  # newer weights of the same run are served
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        run = run_folder.Run(self.source.path)
        self._record_sha256 = run.record_sha256
        settings: dict[str, Any] = run.record["tokenizer"].get("transformers", {})
        # Its source is empty where the model has none.
        self.template = ChatTemplate(settings, self.model.tokenizer)

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights: version, engine, step and the start of the hash."""
        version = importlib.metadata.version("glasslm")
        return f"glasslm-{version}-{self.model.engine.name}-step{self.model.step}-{self.hash[:8]}"

    def replaces(self, other: LoadedModel) -> bool:
        """Whether these are other weights than `other` has, but no earlier ones of the same run.

        Earlier ones are loaded where the newest checkpoint is damaged.
        """
        is_same_run = self._record_sha256 == other._record_sha256
        is_earlier = is_same_run and self.model.step < other.model.step
        return self.hash != other.hash and not is_earlier

    @cached_property
    def names(self) -> TokenNames:
        """How the tokens of the vocabulary are written."""
        return TokenNames(self.model.tokenizer)

    def json_text(self, max_new_tokens: int) -> Grammar:
        """The grammar of one JSON text. Raises InputError where the vocabulary lacks symbols."""
        spellings = self.model.tokenizer.token_bytes
        if not ({b"{", b"}"} <= set(spellings) or {b"[", b"]"} <= set(spellings)):
            raise InputError(
                "this model's vocabulary has no brackets, so it cannot write an object: ask for no "
                "response_format"
            )
        with self._lock:  # made once, by the first request that needs it
            grammar = self.model.json_grammar
        return grammar.start_text(max_new_tokens)

    @cached_property
    def schema_grammar(self) -> SchemaGrammar:
        """Grammars of JSON schemas over this vocabulary."""
        return SchemaGrammar(self.model.tokenizer)

    @property
    def description(self) -> dict[str, Any]:
        """The object of /v1/models."""
        model = self.model
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "glasslm",
            "context": model.config.model.block_size,
            "vocab_size": model.tokenizer.vocab_size,
            "engine": model.engine.name,
            "step": model.step,
            "chat": bool(self.template.source),
        }


def name_sources(
    runs: Sequence[str], selector: CheckpointSelector, device: DeviceConfig
) -> list[ModelSource]:
    """A source for each run, named by its folder, with parents where two have the same name.

    Raises InputError for a run that does not exist or is given twice.
    """
    paths = [run_folder.find_run(run) for run in runs]
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise InputError("the same run is given twice: give each run once")
    n_parts = 1
    while len({part[-n_parts:] for part in parts}) < len(parts):
        n_parts += 1
    return [
        ModelSource("/".join(part[-n_parts:]), path, selector, device)
        for part, path in zip(parts, paths)
    ]
