"""The run that the answers measure, with its model's activations on an excerpt if possible.

The NumPy engine computes them on one excerpt of the validation text, which takes seconds for every
model. B rows, T positions, V vocabulary, L layers, H heads.
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
from glasslm.data.dataset import Dataset
from glasslm.engines.protocol import Batch
from glasslm.errors import DamagedError, InputError
from glasslm.inference import trained_model
from glasslm.inference.trained_model import Model
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.report.run_report import cached_dataset, quote_visible
from glasslm.runs import checkpoint
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import EvalLine
from glasslm.runs.run_folder import Run

Array = NDArray[Any]

MAX_EXCERPT_TOKENS = 128  # all attention weights of the excerpt are stored


@dataclass(frozen=True)
class ExcerptActivations:
    """A model, an excerpt of the validation text, and its activations on it."""

    model: Model
    tokens: NDArray[np.int64]  # (T,)
    scores: Array  # (L, H, T, T) q . k / sqrt(head size), -inf where a key is masked
    weights: Array  # (L, H, T, T)
    logits: Array  # (T, V)

    def compute_logits(self, tokens: NDArray[np.int64]) -> Array:
        """The logits (T, V) of another text (T,)."""
        return self.model.engine.inspect(_make_batch(tokens), ["logits"])["logits"][0]

    def token_label(self, token: int) -> str:
        """A token in quotes, with visible spaces and line breaks, and incomplete bytes as \\xd0."""
        return bytes_label(self.model.tokenizer.token_bytes[token])


@dataclass(frozen=True)
class RunContext:
    """A run and what is known of it. `missing` is the reason if there are no activations."""

    run: Run
    config: ModelConfig  # resolved
    vocab_size: int
    dataset: Dataset | None  # None if the tokens are no longer in the cache
    activations: ExcerptActivations | None
    missing: str

    @property
    def table(self) -> ParameterTable:
        """The parameter table of the model."""
        return parameter_table(self.config, self.vocab_size)

    @cached_property
    def best(self) -> EvalLine | None:
        """The line of metrics.jsonl with the best validation loss."""
        return best_eval(self.run.metrics(), self.run.history)

    @property
    def model_files(self) -> tuple[Source, ...]:
        """The files of the weights that computed the activations."""
        assert self.activations is not None
        step = self.activations.model.step
        weights: Source = (
            f"the weights of step {step:,}",
            f"{checkpoint.FOLDER}/{step:06d}/model.safetensors",
        )
        base: Source = ("the frozen weights", f"{checkpoint.BASE}/model.safetensors")
        return (weights, base) if self.config.lora_rank else (weights,)


CONFIGURATION: Source = ("the configuration", "run.json")
TOKENIZER: Source = ("the tokenizer", "tokenizer.json")
METRICS: Source = ("the log", "metrics.jsonl")


def read_run(run_dir: Path) -> RunContext:
    """The context of a run. Raises DamagedError if run.json or metrics.jsonl cannot be read."""
    run = Run(run_dir)
    config, vocab_size = run.config.resolve().model, int(run.record["tokenizer"]["vocab_size"])
    dataset = cached_dataset(run)
    activations, missing = None, ""
    if dataset is None:
        missing = "Nothing more can be measured: the validation text is no longer in the cache."
    else:
        try:
            model = trained_model.load_model(run.path, engine="numpy")
            activations = _compute_activations(model, dataset)
        except (DamagedError, InputError) as error:
            missing = f"Nothing more can be measured without the model: {error}"
    if activations is not None and not np.isfinite(activations.logits).all():
        activations = None
        missing = "Nothing more can be measured: the logits of this model are not finite."
    return RunContext(run, config, vocab_size, dataset, activations, missing)


def _compute_activations(model: Model, dataset: Dataset) -> ExcerptActivations:
    c = model.config.model
    n_tokens = min(MAX_EXCERPT_TOKENS, c.block_size)
    excerpt = np.asarray(dataset.val.tokens[:n_tokens], np.int64)
    blocks = [f"blocks.{i}.attention" for i in range(c.n_layers)]
    names = [f"{block}.{kind}" for block in blocks for kind in ("scores", "weights")]
    arrays = model.engine.inspect(_make_batch(excerpt), [*names, "logits"])
    scores, weights = (
        np.stack([arrays[f"{block}.{kind}"][0] for block in blocks])
        for kind in ("scores", "weights")
    )
    return ExcerptActivations(model, excerpt, scores, weights, arrays["logits"][0])


def _make_batch(tokens: NDArray[np.int64]) -> Batch:
    """A batch of one text (T,) without targets."""
    return Batch(tokens[None], np.full((1, len(tokens)), -1), 0, np.zeros(1, np.int64))


def bytes_label(token: bytes) -> str:
    """The bytes of a token as readable text in quotes.

    >>> bytes_label(b" to")
    '“␣to”'
    """
    return quote_visible(token.decode("utf-8", "backslashreplace"))
