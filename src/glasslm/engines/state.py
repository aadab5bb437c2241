"""What an engine's arrays are called where they leave it: weights by their names, moments as `adamw.m/NAME`.

Both engines speak these names, so that what one wrote the other reads.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from glasslm.config.schema import OptimizerConfig
from glasslm.engines.protocol import State
from glasslm.errors import DamagedError
from glasslm.model.parameters import ParameterSpec, ParameterTable

Array = NDArray[Any]

AVERAGE = "ema"
MOMENTS = {"adamw": ("adamw.m", "adamw.v"), "muon": ("muon.m",), "sgd": ("sgd.m",)}


def moment_kind(row: ParameterSpec, chosen: str) -> str:
    """The optimizer that moves a row: muon leaves all but the hidden matrices to adamw."""
    return row.group if chosen == "muon" else chosen


def decay_of_average(decay: float, updates: int) -> float:
    """The decay of the average of the weights (ema) at an update: smaller at first, so that it forgets the start."""
    return min(decay, (1 + updates) / (10 + updates))


def read_state(state: State, rows: ParameterTable, config: OptimizerConfig) -> tuple[dict[str, Array], ...]:
    """Weights by name, moments by `adamw.m/NAME`, and averages of the weights by name, of a model with these rows.

    Raises DamagedError, naming the entry, where a weight is missing and for what does not belong there.
    """
    weights: dict[str, Array] = {}
    moments: dict[str, Array] = {}
    averages: dict[str, Array] = {}
    for key, array in state:
        which, _, name = key.rpartition("/")
        known = name in rows and (
            not which or (rows[name].trained and which in _kept(rows[name], config))
        )
        if not known:
            raise DamagedError(
                f"the entry '{key}' belongs to no weight of this model: is it another architecture's?"
            )
        if array.shape != rows[name].shape:
            raise DamagedError(
                f"the entry '{key}' has shape {array.shape}, but this model's is {rows[name].shape}"
            )
        if which == AVERAGE:
            averages[name] = array
        else:
            (moments if which else weights)[key] = array
    missing = [name for name in rows if name not in weights]
    if missing:
        raise DamagedError(
            f"the entry '{min(missing)}' is missing ({len(missing)} of {len(rows)} weights are)"
        )
    return weights, moments, averages


def _kept(row: ParameterSpec, config: OptimizerConfig) -> tuple[str, ...]:
    """What is kept of a trained row beside its value."""
    return (*MOMENTS[moment_kind(row, config.optimizer)], *([AVERAGE] if config.ema else []))
