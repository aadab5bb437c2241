"""What an engine's arrays are called where they leave it: weights by their names, moments as `adamw.m/NAME`.

Both engines speak these names, so that what one wrote the other reads.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from glasslm.engines import State
from glasslm.errors import DamagedError
from glasslm.parameters import Row, Table

Array = NDArray[Any]

MOMENTS = {"adamw": ("adamw.m", "adamw.v"), "muon": ("muon.m",), "sgd": ("sgd.m",)}


def moment_kind(row: Row, chosen: str) -> str:
    """The optimizer that moves a row: muon leaves all but the hidden matrices to adamw."""
    return row.group if chosen == "muon" else chosen


def read_state(state: State, rows: Table, chosen: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights by name, and moments by `adamw.m/NAME`, of a model with these rows, trained by the optimizer `chosen`.

    Raises DamagedError, naming the entry, where a weight is missing and for what does not belong there.
    """
    weights: dict[str, Array] = {}
    moments: dict[str, Array] = {}
    for key, array in state:
        which, _, name = key.rpartition("/")
        if name not in rows or (which and which not in MOMENTS[moment_kind(rows[name], chosen)]):
            raise DamagedError(f"the entry '{key}' belongs to no weight of this model: is it another architecture's?")
        if array.shape != rows[name].shape:
            raise DamagedError(f"the entry '{key}' has shape {array.shape}, but this model's is {rows[name].shape}")
        (moments if which else weights)[key] = array
    missing = [name for name in rows if name not in weights]
    if missing:
        raise DamagedError(f"the entry '{min(missing)}' is missing ({len(missing)} of {len(rows)} weights are)")
    return weights, moments
