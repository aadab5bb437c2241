"""Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300), on policy.

Several answers to a prompt are sampled from the current weights, and each is compared with its
group: no model of values is needed. There is one update for each batch of answers, so the ratio of
probabilities in the paper's objective is 1 and its clipping has no effect. docs/backward.md derives
the weights. Letters: N groups, G answers of a group, B = N G rows, T positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STD_EPSILON = 1e-4  # is added to the deviation: equal rewards have advantages of exactly 0


def group_advantages(rewards: Floats) -> Floats:
    """rewards (N, G) -> (N, G): (reward - mean) / (std + STD_EPSILON) within each group.

    Dividing by the standard deviation weighs up prompts that are nearly always or nearly never
    answered right (Liu et al. 2025, arXiv:2503.20783, section 3.1).

    >>> group_advantages(np.array([[1.0, 0, 0, 1], [1, 1, 1, 1]])).round(3).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    deviations = rewards - rewards.mean(1, keepdims=True)
    advantages: Floats = deviations / (rewards.std(1, keepdims=True) + STD_EPSILON)
    return advantages


def kl_estimates(nats: Floats, first_nats: Floats) -> Floats:
    """The divergence of the current from the first weights, estimated at sampled tokens (...).

    exp(d) - d - 1 with d = log p_first - log p: never negative, and its mean over tokens sampled
    from p is the exact KL(p | p_first) (the k3 of the paper's equation 4).
    """
    d = nats - first_nats
    estimates: Floats = np.expm1(d) - d
    return estimates


def nats_slopes(
    advantages: Floats, nats: Floats, first_nats: Floats, is_answer: NDArray[np.bool_], kl: float
) -> Floats:
    """(B, T): the derivative of the objective with respect to the nats of each token.

    advantages (B,); the others (B, T). The objective is the mean over answers, and in each answer
    over its tokens, of advantage x nats + kl x estimate: an answer better than its group gets
    likelier. A token of a long answer counts less, as in the paper.
    """
    slopes = advantages[:, None] + kl * np.expm1(nats - first_nats)
    return slopes * is_answer / (len(advantages) * is_answer.sum(1, keepdims=True))
