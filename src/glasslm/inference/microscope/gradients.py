"""The gradient of one token's loss: how much of it reaches each place, position and weight.

Letters: L layers, T positions, M weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.errors import InputError
from glasslm.inference.microscope.patching import patch_places
from glasslm.inference.microscope.recorded_pass import RecordedPass, make_batch
from glasslm.inference.microscope.sgd_step import targets_at


class GradientNorms(NamedTuple):
    """Euclidean norms of the gradient of the loss (nats) of one token."""

    places: list[str]  # L + 1
    stream: NDArray[np.float64]  # (L + 1, T) by the residual stream at each place and position
    names: list[str]  # M trained weights
    weights: NDArray[np.float64]  # (M,) by each of them
    total: float  # of all weights together


def gradient_norms(recorded: RecordedPass, t: int) -> GradientNorms:
    """The norms for the token after position t. Raises InputError where the text ends there.

    The loss is that of training, with its auxiliary terms if the run has some.
    """
    if t + 1 >= recorded.length:
        raise InputError("the text ends here: there is no token whose loss has a gradient")
    model = recorded.model
    places = patch_places(recorded.config)
    names = [name for name, spec in model.parameters.items() if spec.trained]
    batch = make_batch(recorded.ids, targets_at(recorded, t))
    asked = [GRADIENT_PREFIX + name for name in (*places, *names)]
    arrays = model.engine.inspect(batch, asked)
    stream = [arrays[GRADIENT_PREFIX + place][0] for place in places]
    norms = np.array([_norm(arrays[GRADIENT_PREFIX + name]) for name in names])
    return GradientNorms(
        places,
        np.array([np.sqrt((g.astype(np.float64) ** 2).sum(-1)) for g in stream]),
        names,
        norms,
        float(np.sqrt((norms**2).sum())),
    )


def join_experts(names: Sequence[str], norms: NDArray[np.float64]) -> dict[str, float]:
    """The norms (M,) of weights by name, with those of the same weight of all experts as one.

    The name of such a weight has * for the number of the expert.
    """
    joined: dict[str, float] = {}
    for name, norm in zip(names, norms.tolist()):
        key = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
        joined[key] = math.hypot(joined.get(key, 0.0), norm)
    return joined


def _norm(gradient: NDArray[Any]) -> float:
    return float(np.sqrt((gradient.astype(np.float64) ** 2).sum()))
