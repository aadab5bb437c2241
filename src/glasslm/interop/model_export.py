"""A trained model as it leaves: one set of weights, its tokenizer, and the run that can answer for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.factory import make_engine
from glasslm.model.adapters import merged, without_adapters
from glasslm.runs import checkpoint as checkpoints
from glasslm.runs import run_folder
from glasslm.runs.run_folder import Run

Array = NDArray[Any]

ROWS, LONGEST = 2, 512  # of the tokens whose logits are compared with those of another program


@dataclass(frozen=True)
class Leaving:
    """`weights` are float32, by the table's names, adapters merged into them; `config` is that of such a model."""

    run: Run
    step: int
    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Array]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def probe(self) -> NDArray[np.int64]:
        """(B, T) tokens to compare logits on: any will do, and random ones leave nothing out."""
        T = min(self.config.block_size, LONGEST)
        return np.random.default_rng(0).integers(0, self.vocab_size, (ROWS, T))

    def logits(self, tokens: NDArray[np.int64]) -> Array:
        """tokens (B, T) -> (B, T, V), as the hand-written engine computes them in float32."""
        engine = make_engine(
            RunConfig(model=self.config), self.vocab_size, ComputeConfig(engine="numpy")
        )
        engine.load(self.weights.items())
        B, T = tokens.shape
        return engine.logits(tokens, engine.new_cache(B, T), np.full(B, T), every=True)


def of(name: str, which: checkpoints.Which = "best") -> Leaving:
    """The model of a run, given by its path or name, at a checkpoint. Raises InputError and DamagedError."""
    run = Run(run_folder.find(name))
    held = checkpoints.load(run.path, which)
    checkpoints.check(
        held,
        config_sha256=run.config_sha256,
        tokenizer_sha256=run.tokenizer.sha256,
        data_sha256=run.record["data"]["sha256"],
    )
    whole = merged(held.weights(), run.config.model)
    weights = {name: array.astype(np.float32, copy=False) for name, array in whole.items()}
    return Leaving(
        run, held.step, without_adapters(run.config.model).resolved(), run.tokenizer, weights
    )


def largest_difference(ours: Array, theirs: Array) -> float:
    """Of two (B, T, V) logits, as a share of the largest one. Not a number compares as infinite."""
    difference = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(ours)))
    return difference if np.isfinite(difference) else np.inf
