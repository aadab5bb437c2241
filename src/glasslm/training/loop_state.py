"""What a checkpoint keeps of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from glasslm.training.guard import GuardState


@dataclass(frozen=True)
class LoopState:
    """What a checkpoint keeps of the loop. The field names are the keys in state.json."""

    patience_used: int = 0  # evaluations since the best one
    evaluated_at: int = -1  # step of the last evaluation
    sampled_at: int = -1  # step of the last sample
    measured: bool = False  # the final measurement on the whole split is done
    guard: GuardState = field(default_factory=GuardState)
    safe_at: int | None = None  # step of the last planned checkpoint, for a roll-back

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LoopState:
        """The state in a checkpoint; fields that an older run lacks take their defaults."""
        return cls(**{**values, "guard": GuardState.from_json(values.get("guard") or {})})
