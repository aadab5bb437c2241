"""The description of a model family of transformers: one value of `Family` each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.interop.support import Support
from glasslm.interop.untrusted_json import Values
from glasslm.interop.weight_names import WeightNames

Array = NDArray[Any]


def no_refusals(c: ModelConfig) -> list[str]:
    """No reasons besides those of `Support`."""
    return []


@dataclass(frozen=True)
class Family:
    """A model type of transformers: what it computes, its config.json and its weights."""

    model_type: str
    architecture: str  # transformers' class
    support: Support
    read_config: Callable[[Values], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    names: Callable[[ModelConfig], WeightNames]
    more_refusals: Callable[[ModelConfig], list[str]] = no_refusals

    def refusals(self, c: ModelConfig) -> list[str]:
        """Reasons why the family does not compute a model, each with a flag that helps."""
        return self.support.refusals(c) + self.more_refusals(c)

    def from_hf_config(self, values: Values) -> ModelConfig:
        """The model that a config.json describes.

        Raises InputError for an option that glasslm does not have.
        """
        return self.read_config(values)

    def to_hf_config(self, c: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """The values of config.json, for a model without refusals."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            **self.write_config(c.resolve()),
            "tie_word_embeddings": c.tie_embeddings and not self._has_scaled_copy(c),
        }

    def to_hf_weights(self, c: ModelConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
        """All weights by transformers' names, from all weights by glasslm's names."""
        c = c.resolve()
        hf_weights = self.names(c).to_hf_weights(c, weights)
        if self._has_scaled_copy(c):  # the scale goes into the embeddings, and the head is kept
            names = self.names(c)
            name = names.hf_name("embedding.weight")
            hf_weights.setdefault(names.hf_name("head.weight"), hf_weights[name])
            scale = np.float32(math.sqrt(c.d_model))
            hf_weights[name] = hf_weights[name] * scale
        return hf_weights

    def _has_scaled_copy(self, c: ModelConfig) -> bool:
        """Whether the file has scaled embeddings beside the head that they are tied to."""
        return c.scale_embeddings and self.support.scaled_embeddings == (False, True)
