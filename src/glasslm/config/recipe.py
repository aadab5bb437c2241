"""The recipe of a new run: the preset that its flags name, or the one that --max-time chooses."""

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
# Changes of the preset quick for a long run: 0.8M parameters on Shakespeare (docs/log.md).
LONG_RUN_CHANGES = {
    "d_model": 128, "block_size": 256, "dropout": 0.1, "batch_size": 8, "eval_interval": 500,
}  # fmt: skip
LONG_RUN_MIN_S = 600.0  # the time that they were chosen for


@dataclass(frozen=True)
class Recipe:
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


def choose_recipe(
    preset: str | None, max_time: str | None = None, given_fields: Collection[str] = ()
) -> Recipe:
    """The recipe of a new run. A recipe leaves `given_fields`, those of its flags, alone.

    Raises InputError for a time that is no duration.
    """
    if preset is not None:
        return Recipe(preset)
    if not max_time or (SIZE_FIELDS | {"init_from"}) & set(given_fields):
        return Recipe("quick")
    if parse_duration(max_time) < LONG_RUN_MIN_S:
        return Recipe("quick", max_time=max_time)
    changes = {name: value for name, value in LONG_RUN_CHANGES.items() if name not in given_fields}
    return Recipe("quick", changes, max_time)
