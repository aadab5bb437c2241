"""A law with small losses, and runs that follow it, with noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from glasslm.lab.scaling.law import Law, Observation

SMALL = Law(alpha=0.34, beta=0.28, A=60, B=40, E=1.2)  # losses of 1.8 to 3.7 nats on GRID
GRID = [(N, D) for N in np.geomspace(1e5, 1e7, 5) for D in np.geomspace(2e5, 2e7, 4)]


def runs(
    law: Law, cells: Sequence[tuple[float, float]] = GRID, noise: float = 0, seed: int = 0
) -> list[Observation]:
    rng = np.random.default_rng(seed)
    return [
        Observation(N, D, law.loss(N, D) * math.exp(noise * float(rng.standard_normal())))
        for N, D in cells
    ]
