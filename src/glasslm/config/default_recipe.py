"""The recipe of a run whose flags name no preset: --max-time chooses it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from glasslm.config.conversion import with_flags
from glasslm.config.presets import preset_config
from glasslm.config.schema import RunConfig
from glasslm.config.units import parse_duration

# Fields that set the size of a model: where one is given, the time does not choose another size.
SIZE_FIELDS = frozenset(
    ["d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "block_size", "n_experts"]
)
LONG_RUN_MIN_S = 600.0  # the shortest time that the larger model was measured at (docs/log.md)


@dataclass(frozen=True)
class DefaultRecipe:
    """A preset with changed settings, and the time limit that chose it, if one did."""

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    max_time: str = ""

    @property
    def config(self) -> RunConfig:
        """The preset with the changes."""
        return with_flags(preset_config(self.preset), self.changes)

    def describe(self) -> str:
        """One line for the user; empty where no time limit chose the recipe."""
        if not self.max_time:
            return ""
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in self.changes.items()
        ]
        recipe = " ".join([f"preset {self.preset}", *(["with", *flags] if flags else [])])
        return f"--max-time {self.max_time}: {recipe} (choose another one with --preset)"


def default_recipe(max_time: str | None, given: Collection[str] = ()) -> DefaultRecipe:
    """The recipe of a run that takes `max_time`, with the fields `given` by flags.

    Raises InputError for a time that is no duration.
    """
    if not max_time or SIZE_FIELDS & set(given):
        return DefaultRecipe("quick")
    if parse_duration(max_time) < LONG_RUN_MIN_S:
        return DefaultRecipe("quick", max_time=max_time)
    return DefaultRecipe("small", {"qk_norm": True, "dropout": 0.1}, max_time)
