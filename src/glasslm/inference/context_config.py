"""The context of a trained model, where it differs from that of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from glasslm.config.config_fields import optional_flag
from glasslm.config.conversion import from_dict, to_dict
from glasslm.config.model_config import HIGH_ROTATIONS
from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError

RopeScalingName = Literal["linear", "ntk"]


@dataclass(frozen=True)
class ContextConfig:
    """The context of a trained model, where it differs from that of training."""

    context: Annotated[int | None, optional_flag("INT", "the context of training")] = None
    """Context in tokens. Learned positions allow no other than that of training."""
    rope_scaling: Annotated[RopeScalingName | None, optional_flag("linear|ntk", "none")] = None
    """Stretch rope to a longer --context: linear (arXiv:2306.15595), or ntk, less at high
    frequencies."""

    def apply_to(self, model: ModelConfig) -> ModelConfig:
        """`model` with this context; InputError where its positions do not allow it."""
        names = get_args(RopeScalingName)
        if self.rope_scaling is not None and self.rope_scaling not in names:
            raise InputError(
                f"rope_scaling is {self.rope_scaling!r}: expected one of {', '.join(names)}"
            )
        if self.rope_scaling is not None and (self.context or 0) <= model.block_size:
            raise InputError(
                "--rope-scaling stretches rope to longer texts: give a --context above "
                f"{model.block_size}"
            )
        if self.context is None:
            return model
        if model.position == "learned" and self.context != model.block_size:
            raise InputError(
                f"context is {self.context}, but this model learned a vector for each of "
                f"{model.block_size} positions: leave out --context, or train with --position "
                "rope, alibi, sinusoidal or none"
            )
        changes: dict[str, Any] = {"block_size": self.context}
        if self.rope_scaling is not None:
            factor = model.rope_factor * self.context / model.block_size
            changes |= {"rope_scaling": self.rope_scaling, "rope_factor": factor}
        elif model.rope_scaling in HIGH_ROTATIONS and self.context != model.block_size:
            changes["rope_original_context"] = _trained_original_context(model)
        return from_dict(ModelConfig, to_dict(model) | changes)


def _trained_original_context(model: ModelConfig) -> int:
    """The tokens of the context before yarn or llama3 stretched it, as in training.

    Its default follows block_size: in another context it would change the trained frequencies.
    """
    if model.rope_original_context:
        return model.rope_original_context
    original = model.block_size / model.rope_factor
    if original % 1:
        raise InputError(
            f"rope_original_context is {model.block_size} / {model.rope_factor:g} = {original:g} "
            "in this model: another context needs a whole number, leave out --context"
        )
    return int(original)
