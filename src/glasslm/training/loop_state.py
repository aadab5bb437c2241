"""LoopState: what a checkpoint stores of the training loop, so that it resumes exactly."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypedDict

from glasslm.runs.typed_json import Count, require_type
from glasslm.training.guard import GuardRecord, GuardState

# The keys in state.json that differ from the names of the fields.
JSON_KEYS = {"full_split_measured": "measured", "rollback_step": "safe_at"}


class LoopRecord(TypedDict, total=False):
    """The value of `loop` in state.json. Older runs lack some fields."""

    patience_used: Count
    evaluated_at: int
    sampled_at: int
    measured: bool
    guard: GuardRecord
    safe_at: Count | None


@dataclass(frozen=True)
class LoopState:
    """The part of a loop's state that follows from earlier steps."""

    patience_used: int = 0  # evaluations since the best one
    evaluated_at: int = -1  # step of the last evaluation
    sampled_at: int = -1  # step of the last sample
    full_split_measured: bool = False  # the final measurement on the whole split is done
    guard: GuardState = field(default_factory=GuardState)
    rollback_step: int | None = None  # step of the last planned checkpoint

    def to_json(self) -> dict[str, Any]:
        """The value of `loop` in state.json."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values["guard"] = self.guard.to_json()
        return {JSON_KEYS.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LoopState:
        """The state in a checkpoint; fields that an older run lacks take their defaults.

        Raises DamagedError for a value of another type.
        """
        require_type(values, LoopRecord, "the state of the loop in state.json")
        values = {key: value for key, value in values.items() if key in LoopRecord.__annotations__}
        names = {key: name for name, key in JSON_KEYS.items()}
        fields = {names.get(key, key): value for key, value in values.items()}
        return cls(**{**fields, "guard": GuardState.from_json(values.get("guard") or {})})
