"""Rows of new tokens: near the mean, each from its own generator, in a tied and an untied head."""

import numpy as np

from glasslm.model.vocabulary_growth import NOISE, add_token_rows

V, D = 50, 400
RNG = np.random.default_rng(0)
WEIGHTS = {
    "embedding.weight": RNG.normal(0.1, 0.02, (V, D)).astype(np.float32),
    "head.weight": RNG.normal(0.0, 0.05, (V, D)).astype(np.float32),
    "norm.weight": np.ones(D, np.float32),
}


def test_a_new_row_is_the_mean_with_little_noise_and_old_rows_stay() -> None:
    grown = add_token_rows(WEIGHTS, {V: "<a>", V + 1: "<b>"}, seed=1)
    for name in ("embedding.weight", "head.weight"):
        old, new = WEIGHTS[name], grown[name]
        assert new.shape == (V + 2, D)
        assert new.dtype == np.float32
        assert np.array_equal(new[:V], old)
        z = (new[V:] - old.mean(0)) / old.std(0)
        assert abs(z.std() - NOISE) < 0.1 * NOISE
        assert not np.array_equal(new[V], new[V + 1])
    assert grown["norm.weight"] is WEIGHTS["norm.weight"]


def test_the_noise_depends_on_seed_name_and_token_alone() -> None:
    both = add_token_rows(WEIGHTS, {V: "<a>", V + 1: "<b>"}, seed=1)["embedding.weight"]
    alone = add_token_rows(WEIGHTS, {V: "<b>"}, seed=1)["embedding.weight"]
    assert np.array_equal(both[V + 1], alone[V])
    other_seed = add_token_rows(WEIGHTS, {V: "<b>"}, seed=2)["embedding.weight"]
    assert not np.array_equal(other_seed[V], alone[V])
