"""The pairs or prompts of a step: each one once in a pass, in an order of the pass's own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glasslm.data.permutation import draw_keys, permute_indices


def items_of_step(seed: int, step: int, count: int, total: int) -> NDArray[np.int64]:
    """(count,) indices below `total`: a pure function of (seed, step). Steps count from 0."""
    passes, places = np.divmod(step * count + np.arange(count), total)
    items = np.empty(count, np.int64)
    for number in np.unique(passes).tolist():
        in_pass = passes == number
        items[in_pass] = permute_indices(places[in_pass], total, draw_keys(seed, number))
    return items
