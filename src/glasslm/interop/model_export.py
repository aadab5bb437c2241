"""A trained model ready for export: its weights, its tokenizer, and the run that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.factory import make_engine
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.interop.families import choose_family
from glasslm.interop.family import Family
from glasslm.interop.hf_special_tokens import TokenSettings, default_settings
from glasslm.interop.hf_tokenizer import replaced_by_model_type
from glasslm.model.adapters import merge_adapters, without_adapters
from glasslm.runs import checkpoint as checkpoints
from glasslm.runs.checkpoint_selector import CheckpointSelector
from glasslm.runs.protection import open_run
from glasslm.runs.recorded_operations import require_without_operations
from glasslm.runs.run_folder import Run

Array = NDArray[Any]

# The tokens on which logits are compared with those of another program.
PROBE_ROWS, MAX_PROBE_TOKENS = 2, 512
DOCUMENT_ATTENTION_NOTE = (
    "this model attends within one document. Other programs also attend to earlier documents of "
    "the same context, so give them one document at a time; of one document the logits are equal"
)


@dataclass(frozen=True)
class ModelExport:
    """A model with adapters merged, ready for export.

    `weights` are float32, with the names and shapes of the parameter table of `config`.
    """

    run: Run
    step: int
    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Array]
    imported_settings: TokenSettings | None = None  # of a model from another program
    model_type: str = ""  # in transformers, of an imported model

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.run.path.resolve().name

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def token_settings(self) -> TokenSettings:
        """The roles of the special tokens: those of the imported model, or the default ones."""
        if self.imported_settings is None:
            return default_settings(self.tokenizer)
        return self.imported_settings

    @property
    def family(self) -> Family:
        """The family of transformers that the model is written as.

        Raises InputError where none computes it.
        """
        return choose_family(self.config, self.model_type, replaced_by_model_type(self.tokenizer))

    def probe_tokens(self) -> NDArray[np.int64]:
        """(B, T) random tokens on which to compare logits."""
        T = min(self.config.block_size, MAX_PROBE_TOKENS)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, (PROBE_ROWS, T))
        if self.config.document_attention:  # other programs attend to earlier documents
            tokens[tokens == self.config.document_end_id] = 0
        return tokens

    def logits(self, tokens: NDArray[np.int64]) -> Array:
        """tokens (B, T) -> logits (B, T, V), computed by the NumPy engine in float32."""
        return compute_logits(self.config, self.vocab_size, self.weights, tokens)


def load_export(name: str, which: CheckpointSelector = "best") -> ModelExport:
    """The model of a run, given by path or name, at a checkpoint.

    Raises InputError and DamagedError.
    """
    run = open_run(name, with_log=True)  # of which the model card shows results
    checkpoint = checkpoints.load(run.path, which)
    checkpoints.require_identity(checkpoint, run.identity)
    require_without_operations(run, "exported: other programs do not have this code")
    merged_weights = merge_adapters(checkpoint.weights(), run.config.model)
    weights = {name: array.astype(np.float32, copy=False) for name, array in merged_weights.items()}
    config = without_adapters(run.config.model).resolve()
    settings = run.record["tokenizer"].get("transformers")
    model_type = imported_model_type(run)
    return ModelExport(run, checkpoint.step, config, run.tokenizer, weights, settings, model_type)


def imported_model_type(run: Run) -> str:
    """The model type in transformers of an imported model; empty for other runs."""
    return str(run.record.get("imported", {}).get("model_type", ""))


def compute_logits(
    config: ModelConfig, vocab_size: int, weights: Mapping[str, Array], tokens: NDArray[np.int64]
) -> Array:
    """tokens (B, T) -> logits (B, T, V), computed by the NumPy engine in float32."""
    engine = make_engine(RunConfig(model=config), vocab_size, ComputeConfig(engine="numpy"))
    engine.load(weights if isinstance(weights, LazyArrays) else weights.items())
    B, T = tokens.shape
    return engine.logits(tokens, engine.new_cache(B, T), np.full(B, T), every=True)


def largest_difference(ours: Array, theirs: Array) -> float:
    """The largest difference of two logits (B, T, V), as a share of the largest of `ours`.

    It is inf if it is not finite.
    """
    difference = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(ours)))
    return difference if np.isfinite(difference) else np.inf
