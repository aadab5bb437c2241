"""What attention heads do: four scores computed from attention weights.

The scores are those of Olsson et al., "In-context Learning and Induction Heads"
(arXiv:2209.11895), and of Wang et al., "Interpretability in the Wild" (arXiv:2211.00593). A score
is the mean weight that a head puts on the keys it is named after, so it lies in 0 to 1.
Letters: B rows, H heads, T positions.

>>> import numpy as np
>>> uniform = np.tril(np.ones((1, 1, 4, 4))) / np.arange(1, 5)[:, None]
>>> scores = head_scores(uniform, np.array([[0, 1, 0, 1]]))
>>> {name: round(float(score[0]), 3) for name, score in scores.items()}
{'previous_token': 0.361, 'first_token': 0.361, 'duplicate_token': 0.292, 'induction': 0.292}
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ScoreName = Literal["previous_token", "first_token", "duplicate_token", "induction"]
SCORE_NAMES: tuple[ScoreName, ...] = (
    "previous_token",
    "first_token",
    "duplicate_token",
    "induction",
)


def head_scores(
    weights: NDArray[Any], tokens: NDArray[np.integer[Any]]
) -> dict[ScoreName, NDArray[np.float64]]:
    """The scores (H,) of the heads with attention weights (B, H, T, T), which read tokens (B, T).

    Row t of a head's weights is what position t attends to. Each score is the mean over the
    positions that have such a key of their summed weight on it:

    previous_token    the position before; positions from 1 on
    first_token       position 0; positions from 1 on
    duplicate_token   earlier positions with the same token
    induction         positions right after an earlier one with the same token, without the position
                      itself

    A score is NaN where no position has such a key.
    """
    assert weights.shape[::2] == tokens.shape
    assert weights.shape[2] == weights.shape[3]
    return {name: _mean_weight(weights, mask) for name, mask in _key_masks(tokens).items()}


def _key_masks(tokens: NDArray[np.integer[Any]]) -> dict[ScoreName, NDArray[np.bool_]]:
    """(B, T, T) for each score: the keys of each position that count."""
    B, T = tokens.shape
    queries, keys = np.arange(T)[:, None], np.arange(T)
    is_earlier = keys < queries
    is_same = (tokens[:, :, None] == tokens[:, None, :]) & is_earlier
    follows_same = np.zeros_like(is_same)
    follows_same[:, :, 1:] = is_same[:, :, :-1] & is_earlier[:, 1:]
    whole = (B, T, T)
    return {
        "previous_token": np.broadcast_to(keys == queries - 1, whole),
        "first_token": np.broadcast_to((keys == 0) & is_earlier, whole),
        "duplicate_token": is_same,
        "induction": follows_same,
    }


def _mean_weight(weights: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(H,) the mean over positions that have a key of mask (B, T, T) of their weight on the keys.

    weights (B, H, T, T); NaN without such a position.
    """
    n_positions = np.count_nonzero(mask.any(-1))
    if not n_positions:
        return np.full(weights.shape[1], np.nan)
    on_keys = np.where(mask[:, None], weights, 0)
    total: NDArray[np.float64] = on_keys.sum(axis=(0, 2, 3), dtype=np.float64)
    return total / n_positions
