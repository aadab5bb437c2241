"""The models of a server: their names, their weights, and newer weights of a run in training."""

from __future__ import annotations

import importlib.metadata
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from glasslm.config.schema import DeviceConfig
from glasslm.data.chat.chat_template import ChatTemplate
from glasslm.errors import DamagedError, InputError
from glasslm.inference.request import Grammar
from glasslm.inference.trained_model import Model, load_model
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint_selector import CheckpointSelector
from glasslm.serve.json_schema import SchemaGrammar
from glasslm.serve.logprobs import TokenNames


@dataclass(frozen=True)
class ModelSource:
    """A run, the name by which clients ask for it, and how it is loaded."""

    name: str
    path: Path
    selector: CheckpointSelector
    device: DeviceConfig

    def load(self) -> LoadedModel:
        """The model. Raises InputError or DamagedError where it cannot be loaded."""
        return LoadedModel(self, load_model(self.path, self.selector, **vars(self.device)))

    def newest_step(self) -> int:
        """The step of the newest checkpoint, which is not verified."""
        return max(checkpoint.list_steps(self.path), default=0)

    def load_newest(self) -> LoadedModel:
        """The model of the newest checkpoint, tried again while the run replaces its files."""
        for attempt in range(3):
            try:
                return LoadedModel(self, load_model(self.path, "latest", **vars(self.device)))
            except (DamagedError, FileNotFoundError):
                if attempt == 2:
                    raise
                time.sleep(0.2)
        raise AssertionError


@dataclass(eq=False)
class LoadedModel:
    """The weights of a model, and what answering with them needs."""

    source: ModelSource
    model: Model
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970
    is_retired: bool = False  # newer weights of the same run are served
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        record = run_folder.Run(self.source.path).record
        settings: dict[str, Any] = record["tokenizer"].get("transformers", {})
        # Its source is empty where the model has none.
        self.template = ChatTemplate(settings, self.model.tokenizer)

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights: version, engine and step."""
        version = importlib.metadata.version("glasslm")
        return f"glasslm-{version}-{self.model.engine.name}-step{self.model.step}"

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
