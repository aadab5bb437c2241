"""Scores of attention heads on attention that was made by hand."""

import numpy as np
import pytest

from glasslm.inference.head_scores import SCORE_NAMES, head_scores

T = 12
REPEATED = np.tile(np.random.default_rng(0).permutation(T // 2), 2)[None]  # (1, T)


def attend_to(keys: list[int]) -> np.ndarray:
    """Weights (1, 1, T, T) of a head whose position t attends to keys[t] alone."""
    weights = np.zeros((1, 1, len(keys), len(keys)))
    weights[0, 0, np.arange(len(keys)), keys] = 1
    return weights


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("previous_token", [0, *range(T - 1)]),
        ("first_token", [0] * T),
        ("duplicate_token", [0] * (T // 2) + list(range(T // 2))),
        ("induction", [0] * (T // 2) + list(range(1, T // 2 + 1))),
    ],
)
def test_each_score_is_one_for_the_head_that_it_is_named_after(name, keys):
    scores = head_scores(attend_to(keys), REPEATED)
    assert scores[name][0] == 1
    assert tuple(scores) == SCORE_NAMES
    others = {other: score[0] for other, score in scores.items() if other != name}
    assert max(others.values()) < 0.6, others


def test_scores_equal_a_count_position_by_position():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 4, (3, T))
    weights = np.tril(rng.random((3, 2, T, T)))
    weights /= weights.sum(-1, keepdims=True)
    expected = {name: [[], []] for name in SCORE_NAMES}
    for b in range(3):
        for t in range(T):
            same = [k for k in range(t) if tokens[b, k] == tokens[b, t]]
            keys = {
                "previous_token": [t - 1] if t else [],
                "first_token": [0] if t else [],
                "duplicate_token": same,
                "induction": [k + 1 for k in same if k + 1 < t],
            }
            for name, columns in keys.items():
                for h in range(2):
                    if columns:
                        expected[name][h].append(sum(weights[b, h, t, k] for k in columns))
    scores = head_scores(weights, tokens)
    for name in SCORE_NAMES:
        np.testing.assert_allclose(scores[name], [np.mean(x) for x in expected[name]], rtol=1e-12)


def test_a_score_without_positions_is_nan():
    scores = head_scores(attend_to([0, 0, 0]), np.array([[5, 6, 7]]))
    assert np.isnan(scores["induction"]).all()
    assert np.isnan(scores["duplicate_token"]).all()
    assert scores["first_token"][0] == 1
