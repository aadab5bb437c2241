"""The model families of transformers that glasslm writes and reads, one module each."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError
from glasslm.interop import gpt2, llama
from glasslm.interop.untrusted_json import Values

Array = NDArray[Any]


class Family(Protocol):
    """The interface of a family's module: llama.py and gpt2.py."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]: ...

    @property
    def TOP_LEVEL(self) -> dict[str, str]: ...

    def refusals(self, c: ModelConfig) -> list[str]: ...

    def to_hf_config(self, c: ModelConfig, vocab_size: int) -> dict[str, Any]: ...

    def from_hf_config(self, values: Values) -> ModelConfig: ...

    def to_hf_weights(self, c: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]: ...

    def from_hf_weights(
        self, c: ModelConfig, hf_weights: dict[str, Array], names: list[str]
    ) -> dict[str, Array]: ...


FAMILIES: tuple[Family, ...] = (llama, gpt2)


def choose_family(c: ModelConfig) -> Family:
    """The first family that computes what this model computes.

    Raises InputError if there is none; the message lists what the nearest family lacks and the
    switches that help.
    """
    refusals = {family.MODEL_TYPES[0]: family.refusals(c) for family in FAMILIES}
    for family in FAMILIES:
        if not refusals[family.MODEL_TYPES[0]]:
            return family
    nearest = min(refusals, key=lambda name: len(refusals[name]))
    raise InputError(
        f"no architecture of transformers computes this model. The nearest is {nearest}, but "
        f"{'; '.join(refusals[nearest])}. Train with the flags in parentheses, then export"
    )


def find_family(values: Values) -> Family:
    """The family of a config.json.

    Raises InputError for a model type that glasslm does not know.
    """
    model_type = values.string("model_type")
    for family in FAMILIES:
        if model_type in family.MODEL_TYPES:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.MODEL_TYPES)
    raise InputError(
        f"{values.path} has the model type {model_type[:100]!r}: expected one of {known}"
    )
