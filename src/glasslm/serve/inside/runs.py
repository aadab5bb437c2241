"""What the page knows of the served runs: their models, checkpoints and curves, also in training.

Only run.json, metrics.jsonl and the folders of checkpoints are read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glasslm.data.dataset import Dataset
from glasslm.data.file_stamp import FileStamp, read_stamp
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import GlasslmError
from glasslm.inference.microscope.ngrams import MAX_COUNTED_BYTES, GramCounts, count_ngrams
from glasslm.model.parameters import parameter_table
from glasslm.runs import metrics
from glasslm.runs.history import History, read_history
from glasslm.runs.run_folder import Run
from glasslm.serve.inside.checkpoints import CheckpointStore, checkpoint_content
from glasslm.serve.inside.texts import text_limit
from glasslm.serve.served_model import ModelSource
from glasslm.text import ignore_message

MAX_CURVE_POINTS, MAX_FILES = 300, 8
SAMPLE_TOKENS = 46  # or the model's context, where it is shorter
MAX_CHARACTERS = 400  # of which the sample text is made where there is no validation text
SAMPLE_WAIT_S = 0.3  # for the sample text, before runs are listed without it
LIVE_S = 120.0  # a run without an end whose metrics have changed in this time is in training
RETRY_S = 60.0  # before a text that could not be read is looked for again
FALLBACK_TEXT = "To be, or not to be"


class InsideRun:
    """What the page knows of one run. Its methods may be called from any thread."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.run = Run(source.path)
        self._sample = ""
        self._history: tuple[FileStamp | None, History, int] | None = None
        self._dataset: Dataset | None = None
        self._dataset_error: Exception | None = None
        self._retry_time = 0.0  # of time.monotonic(), after an error
        self._sample_lock, self._dataset_lock = threading.Lock(), threading.Lock()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.run.tokenizer

    @cached_property
    def tokenizer_sha256(self) -> str:
        """The identity of the tokenizer: texts of equal ones are cut alike."""
        return self.tokenizer.sha256

    def content(self, store: CheckpointStore) -> dict[str, Any]:
        """The JSON of the run in /inside/runs."""
        run, config = self.run, self.run.config
        history, max_steps = self._read_history()
        losses = {step: loss for step, loss in zip(history.eval_steps, history.val_losses) if loss}
        names = store.list(self.source)
        model = config.model.resolve()
        data = run.record["data"]
        return {
            "name": self.source.name,
            "corpus": config.data.corpus or "",
            "files": [Path(file["path"]).name for file in data["files"]][:MAX_FILES],
            "preset": run.record.get("preset", ""),
            "config": {
                "layers": model.n_layers,
                "heads": model.n_heads,
                "kv_heads": model.n_kv_heads,
                "width": model.d_model,
                "feedforward_width": model.d_ff,
                "feedforward": model.feedforward,
                "block_size": model.block_size,
                "text_limit": text_limit(model.block_size),
                "position": model.position,
                "norm": model.norm,
                "norm_position": model.norm_position,
                "experts": model.n_experts,
                "tied": model.tie_embeddings,
                "window": model.window,
            },
            "parameters": parameter_table(model, self.tokenizer.vocab_size).total,
            "engine": run.record["engine"],
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.kind,
            "tokenizer_sha256": self.tokenizer_sha256,
            "checkpoints": [checkpoint_content(name, history.best_step, losses) for name in names],
            "keep": config.train.keep,
            "checkpoint_interval": config.train.checkpoint_interval,
            "max_steps": max_steps,
            "curve": thin([*zip(history.steps, history.train_losses)]),
            "val_curve": thin([*zip(history.eval_steps, history.val_losses)]),
            "status": history.status,
            "is_training": self._is_training(history),
            "sample_text": self.sample_text(),
        }

    def _read_history(self) -> tuple[History, int]:
        """The history and the planned number of steps, read again where metrics.jsonl changed."""
        stamp = read_stamp(self.run.path / "metrics.jsonl")
        if self._history is None or self._history[0] != stamp:
            lines = list(self.run.metrics())
            plans = [line["max_steps"] for line in lines if line["kind"] == "plan"]
            max_steps = plans[-1] if plans else self.run.config.train.max_steps
            self._history = stamp, read_history(lines), max_steps
        return self._history[1:]

    def _is_training(self, history: History) -> bool:
        stamp = read_stamp(self.run.path / "metrics.jsonl")
        if history.status is not None or stamp is None:
            return False
        return time.time() - stamp.modified_ns / 1e9 < LIVE_S

    def sample_text(self) -> str:
        """Some validation text; empty while it is read for the first time, which may take long."""
        if not self._sample and self._sample_lock.acquire(blocking=False):
            thread = threading.Thread(target=self._read_sample, name="sample text", daemon=True)
            thread.start()
            thread.join(SAMPLE_WAIT_S)
        return self._sample

    def _read_sample(self) -> None:
        limit = min(SAMPLE_TOKENS, self.run.config.model.block_size)
        try:
            tokens = np.asarray(self.dataset().val.tokens[:limit])
        except (GlasslmError, OSError):  # the text of the run is not on this machine
            tokens = np.zeros(0, np.int64)
        text = self.tokenizer.decode(tokens).rstrip("\ufffd")  # half a character at the end
        self._sample = text or _any_text(self.run, self.tokenizer, limit)

    def dataset(self) -> Dataset:
        """The tokens of the run's text. Raises the errors of Run.dataset.

        After an error it is tried again once RETRY_S have passed: a text that is not here may take
        seconds to look for.
        """
        with self._dataset_lock:
            if self._dataset_error is not None and time.monotonic() < self._retry_time:
                raise self._dataset_error
            if self._dataset is None:
                try:
                    self._dataset = self.run.dataset(ignore_message)
                except (GlasslmError, OSError) as error:
                    self._dataset_error = error
                    self._retry_time = time.monotonic() + RETRY_S
                    raise
            return self._dataset

    @cached_property
    def ngram_counts(self) -> GramCounts:
        """The n-grams of the training text. Raises the errors of Run.dataset."""
        tokens = self.dataset().train.tokens
        text = b"".join(self.tokenizer.token_bytes[i] for i in tokens[:MAX_COUNTED_BYTES].tolist())
        return count_ngrams(text)


def _any_text(run: Run, tokenizer: Tokenizer, limit: int) -> str:
    """The last sample of the run, or a text that it can read, of at most `limit` tokens."""
    samples = metrics.sample_lines(run.metrics())
    for text in [line["prompt"] + line["text"] for line in samples[-1:]] + [FALLBACK_TEXT]:
        ids = [i for character in text[:MAX_CHARACTERS] for i in _encode(tokenizer, character)]
        if ids:
            return tokenizer.decode(ids[:limit]).rstrip("\ufffd")
    return tokenizer.decode(range(min(limit, tokenizer.vocab_size)))


def _encode(tokenizer: Tokenizer, character: str) -> list[int]:
    """The tokens of a character; none where the vocabulary lacks it."""
    try:
        return tokenizer.encode(character).tolist()
    except GlasslmError:
        return []


def thin(points: Sequence[tuple[int, float | None]]) -> list[list[float | None]]:
    """At most MAX_CURVE_POINTS of the points of a curve, evenly, the last one included."""
    count = min(len(points), MAX_CURVE_POINTS)
    places = np.linspace(0, len(points) - 1, count).round().astype(int)
    return [list(points[i]) for i in np.unique(places)]
