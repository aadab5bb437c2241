"""What the answers look at: a run, and where it has them, its model as it computes and some of its text.

All is computed by the NumPy engine on one excerpt of the validation text, so that it takes seconds whatever trained the
model. B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.course.capstone.questions import Source
from glasslm.data.shards import Dataset
from glasslm.engines.protocol import Batch
from glasslm.errors import GlasslmError
from glasslm.inference import trained_model
from glasslm.inference.trained_model import Model
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.report.run_report import dataset_of, shown
from glasslm.runs import checkpoint
from glasslm.runs.history import best_eval
from glasslm.runs.run_folder import Run

Array = NDArray[Any]

LONGEST = 128  # tokens of the excerpt, at most: all attention weights over it are written out


@dataclass(frozen=True)
class Look:
    """A model over an excerpt of the validation text: what it computed on the way."""

    model: Model
    tokens: NDArray[np.int64]  # (T,)
    scores: Array  # (L, H, T, T) q . k / sqrt(head size), -inf where a key is hidden
    weights: Array  # (L, H, T, T)
    logits: Array  # (T, V)

    def again(self, tokens: NDArray[np.int64]) -> Array:
        """(T, V) the logits of another text."""
        return self.model.engine.inspect(_batch(tokens), ["logits"])["logits"][0]

    def named(self, token: int) -> str:
        """A token to be read: quoted, its spaces and line breaks to be seen, bytes of half a character as \\xd0."""
        return named(self.model.tokenizer.token_bytes[token])


@dataclass(frozen=True)
class Specimen:
    """A run, and what can be known of it. `missing` says why there is no look, where there is none."""

    run: Run
    config: ModelConfig  # resolved
    vocab_size: int
    dataset: Dataset | None  # none where the cache has lost its tokens
    look: Look | None
    missing: str

    @property
    def rows(self) -> ParameterTable:
        return parameter_table(self.config, self.vocab_size)

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The line of metrics.jsonl with the best validation loss."""
        return best_eval(self.run.metrics(), self.run.history)

    @property
    def model_files(self) -> tuple[Source, ...]:
        """Where the weights that were looked at come from."""
        assert self.look is not None
        step = self.look.model.step
        held: Source = (
            f"the weights of step {step:,}",
            f"{checkpoint.FOLDER}/{step:06d}/model.safetensors",
        )
        base: Source = ("the frozen weights", f"{checkpoint.BASE}/model.safetensors")
        return (held, base) if self.config.lora_rank else (held,)


CONFIGURATION: Source = ("the configuration", "run.json")
TOKENIZER: Source = ("the tokenizer", "tokenizer.json")
METRICS: Source = ("the log", "metrics.jsonl")


def read(run_dir: Path) -> Specimen:
    """A run as it lies there. Raises DamagedError where run.json or metrics.jsonl cannot be read."""
    run = Run(run_dir)
    config, vocab_size = run.config.resolved().model, int(run.record["tokenizer"]["vocab_size"])
    dataset = dataset_of(run)
    if dataset is None:
        missing = (
            "No more can be measured: the cache no longer has the validation text of this run."
        )
        return Specimen(run, config, vocab_size, None, None, missing)
    try:
        look = _look(trained_model.load(run.path, engine="numpy"), dataset)
    except GlasslmError as error:
        return Specimen(
            run,
            config,
            vocab_size,
            dataset,
            None,
            f"No more can be measured without the model: {error}",
        )
    if not np.isfinite(look.logits).all():
        missing = "No more can be measured: the logits of this model are not finite."
        return Specimen(run, config, vocab_size, dataset, None, missing)
    return Specimen(run, config, vocab_size, dataset, look, "")


def _look(model: Model, dataset: Dataset) -> Look:
    c = model.config.model
    excerpt = np.asarray(dataset.val.tokens[: min(LONGEST, c.block_size)], np.int64)
    blocks = [f"blocks.{i}.attention" for i in range(c.n_layers)]
    names = [f"{block}.{what}" for block in blocks for what in ("scores", "weights")]
    seen = model.engine.inspect(_batch(excerpt), [*names, "logits"])
    scores, weights = (
        np.stack([seen[f"{block}.{what}"][0] for block in blocks]) for what in ("scores", "weights")
    )
    return Look(model, excerpt, scores, weights, seen["logits"][0])


def _batch(text: NDArray[np.int64]) -> Batch:
    """To be looked at: nothing is predicted."""
    return Batch(text[None], np.full((1, len(text)), -1), 0, np.zeros(1, np.int64))


def named(token: bytes) -> str:
    """
    >>> named(b" to")
    '“␣to”'
    """
    return shown(token.decode("utf-8", "backslashreplace"))
