"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): loss and derivatives.

The loss of a pair is -log sigmoid(margin), with margin = beta x (how much likelier the tuned model
has made the chosen answer than the first weights - the same of the rejected answer). It depends on
the weights only through the nats of the answers, so its gradient is a weighted sum of the gradients
of nats. docs/backward.md derives the weights. Letters: P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class PairLosses(NamedTuple):
    """The losses of pairs and their derivatives."""

    losses: Floats  # (P,) nats; ln 2 where the weights are the first ones
    margins: Floats  # (P,) beta x log-ratio: positive where the chosen answer is preferred
    slopes: Floats  # (P,) of each loss with respect to the nats of the chosen answer
    # The slope with respect to the nats of the rejected answer is the opposite number.


def pair_losses(
    chosen: Floats, rejected: Floats, first_chosen: Floats, first_rejected: Floats, beta: float
) -> PairLosses:
    """The losses of P pairs, given the nats (P,) of each answer: now, and under the first weights.

    >>> round(float(pair_losses(*np.ones((4, 1)), beta=0.1).losses[0]), 6)
    0.693147
    """
    margins = beta * ((first_chosen - chosen) - (first_rejected - rejected))
    losses = np.logaddexp(0, -margins)  # -log sigmoid(margin), without overflow
    # sigmoid(-margin): the probability that the model would give to the wrong preference.
    return PairLosses(losses, margins, beta * np.exp(-np.logaddexp(0, margins)))
