"""The names of the arrays of an engine's state: weights by name, moments as `adamw.m/NAME`.

Both engines use these names, so that each reads the checkpoints of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glasslm.config.schema import OptimizerConfig, RunConfig
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.engines.protocol import State
from glasslm.errors import DamagedError
from glasslm.model.parameters import ParameterSpec, ParameterTable, parameter_table

Array = NDArray[Any]

AVERAGE = "ema"
MOMENTS = {"adamw": ("adamw.m", "adamw.v"), "muon": ("muon.m",), "sgd": ("sgd.m",)}


def moment_kind(spec: ParameterSpec, optimizer: str) -> str:
    """The optimizer that updates a weight: muon leaves all but the hidden matrices to adamw."""
    return spec.group if optimizer == "muon" else optimizer


def average_decay(decay: float, updates: int) -> float:
    """The decay of the average of the weights (ema) at an update.

    It is smaller at first, so that the average forgets the initial weights.
    """
    return min(decay, (1 + updates) / (10 + updates))


def read_state(
    state: State | LazyArrays, table: ParameterTable, config: OptimizerConfig
) -> tuple[Mapping[str, Array], dict[str, Array], dict[str, Array]]:
    """Weights by name, moments by `adamw.m/NAME`, and averages of the weights by name.

    LazyArrays are weights, and stay unread: their names and shapes are checked.

    `table` is the parameter table of the model, whose shapes the arrays must have. Raises
    DamagedError, which names the entry, for a missing weight and for an entry that does not belong
    to the model.
    """
    if isinstance(state, LazyArrays):
        shapes = {name: np.broadcast_to(0, shape) for name, shape in state.shapes.items()}
        read_state(shapes.items(), table, config)
        return state, {}, {}
    weights: dict[str, Array] = {}
    moments: dict[str, Array] = {}
    averages: dict[str, Array] = {}
    for key, array in state:
        kind, _, name = key.rpartition("/")
        is_known = name in table and (
            not kind or (table[name].trained and kind in _state_kinds(table[name], config))
        )
        if not is_known:
            raise DamagedError(
                f"the entry '{key}' belongs to no weight of this model: is it from another "
                "architecture?"
            )
        if array.shape != table[name].shape:
            raise DamagedError(
                f"the entry '{key}' has shape {array.shape}, but this model's is "
                f"{table[name].shape}"
            )
        if kind == AVERAGE:
            averages[name] = array
        else:
            (moments if kind else weights)[key] = array
    missing_names = [name for name in table if name not in weights]
    if missing_names:
        raise DamagedError(
            f"the entry '{min(missing_names)}' is missing "
            f"({len(missing_names)} of {len(table)} weights are)"
        )
    return weights, moments, averages


def state_without_moments(
    weights: Mapping[str, Array], config: RunConfig, vocab_size: int, dtype: DTypeLike
) -> dict[str, Array]:
    """The state of a model that this run did not train: the trained weights by name, as `dtype`.

    Raises DamagedError unless every weight is there in its shape, and nothing else.
    """
    table = parameter_table(config.model, vocab_size)
    checked, _, _ = read_state(weights.items(), table, config.optimizer)
    return {
        name: checked[name].astype(dtype, copy=False) for name, row in table.items() if row.trained
    }


def _state_kinds(spec: ParameterSpec, config: OptimizerConfig) -> tuple[str, ...]:
    """The kinds of arrays in the state of a trained weight, besides its value."""
    return (*MOMENTS[moment_kind(spec, config.optimizer)], *([AVERAGE] if config.ema else []))
