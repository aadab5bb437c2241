"""The architectures of transformers that glasslm's models are, one file a family, all with the same six names."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError
from glasslm.interop import gpt2, llama
from glasslm.interop.untrusted_json import Values

Array = NDArray[Any]


class Family(Protocol):
    """What there is to know of a family: its files llama.py and gpt2.py have these."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]: ...

    def refusals(self, c: ModelConfig) -> list[str]: ...

    def to_config(self, c: ModelConfig, vocab_size: int) -> dict[str, Any]: ...

    def from_config(self, values: Values) -> ModelConfig: ...

    def to_weights(self, c: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]: ...

    def from_weights(
        self, c: ModelConfig, there: dict[str, Array], wanted: list[str]
    ) -> dict[str, Array]: ...


FAMILIES: tuple[Family, ...] = (llama, gpt2)


def of(c: ModelConfig) -> Family:
    """The family that computes what this model does. Raises InputError, with what stands against the nearest one."""
    found = {family.MODEL_TYPES[0]: family.refusals(c) for family in FAMILIES}
    for family in FAMILIES:
        if not found[family.MODEL_TYPES[0]]:
            return family
    nearest = min(found, key=lambda name: len(found[name]))
    raise InputError(
        f"no architecture of transformers computes what this model does. Nearest is {nearest}, but "
        f"{'; '.join(found[nearest])}. Train with what stands in parentheses, and export that"
    )


def named(values: Values) -> Family:
    """The family of a config.json. Raises InputError for one that glasslm does not know."""
    kind = values.word("model_type")
    for family in FAMILIES:
        if kind in family.MODEL_TYPES:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.MODEL_TYPES)
    raise InputError(f"{values.path} is of the model type {kind[:100]!r}: glasslm can take {known}")
