"""Every window once in an epoch, and the batch as a pure function of seed, step and row."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glasslm.data.batch_sampler import BatchSampler
from glasslm.data.permutation import FEISTEL_ROUNDS, permute_indices


@given(
    n_tokens=st.integers(2, 200),
    block=st.integers(1, 40),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 3),
)
def test_an_epoch_visits_every_window_once(
    n_tokens: int, block: int, batch: int, seed: int, first: int
) -> None:
    block = min(block, n_tokens - 1)
    sampler = BatchSampler(n_tokens, block, batch, seed, epochs=True)
    per_epoch = (n_tokens - 1) // block
    samples = np.arange(
        first * per_epoch, (first + 1) * per_epoch
    )  # of one epoch, which steps need not begin
    starts = np.array(
        [sampler.window_starts(int(g) // batch, np.array([g % batch]))[0] for g in samples]
    )
    assert sorted(starts - starts.min()) == [i * block for i in range(per_epoch)]
    assert starts.min() >= 0
    assert starts.max() + block + 1 <= n_tokens


@given(
    n=st.integers(3, 10**7),
    step=st.integers(0, 10**6),
    rows=st.lists(st.integers(0, 15), min_size=1),
    seed=st.integers(0, 2**63),
    epochs=st.booleans(),
)
def test_a_row_depends_on_nothing_but_seed_step_and_row(
    n: int, step: int, rows: list[int], seed: int, epochs: bool
) -> None:
    block = min(7, n - 1)
    all_rows = BatchSampler(n, block, 16, seed, epochs).window_starts(step, np.arange(16))
    some_rows = BatchSampler(n, block, 16, seed, epochs).window_starts(step, np.array(rows))
    assert some_rows.tolist() == all_rows[rows].tolist()
    assert all_rows.min() >= 0
    assert all_rows.max() + block + 1 <= n


def test_batches_are_windows_and_their_successors() -> None:
    numbers = np.arange(1000, dtype=np.uint16)
    for epochs in (False, True):
        sampler = BatchSampler(1000, 9, 4, 5, epochs)
        inputs, targets = sampler.batch(numbers, 3, range(4))
        assert inputs.shape == targets.shape == (4, 9)
        assert inputs.dtype == targets.dtype == np.int64
        assert (targets == inputs + 1).all()
        assert (np.diff(inputs) == 1).all()
        assert inputs[:, 0].tolist() == sampler.window_starts(3, np.arange(4)).tolist()
        assert inputs.tolist() != sampler.batch(numbers, 4, range(4))[0].tolist()
        assert (
            inputs.tolist()
            != BatchSampler(1000, 9, 4, 6, epochs).batch(numbers, 3, range(4))[0].tolist()
        )


def test_random_starts_are_uniform_over_every_start() -> None:
    sampler = BatchSampler(14, 4, 1000, 0, epochs=False)
    counts = np.bincount(
        np.concatenate([sampler.window_starts(step, np.arange(1000)) for step in range(20)])
    )
    expected = 20_000 / 10  # starts 0 to 9
    assert len(counts) == 10
    assert (
        ((counts - expected) ** 2) / expected
    ).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_epochs_differ_in_order_and_phase() -> None:
    sampler = BatchSampler(10_007, 10, 10, 0, epochs=True)
    passes = [
        sampler.window_starts(
            0, np.arange(sampler.windows_per_epoch) + e * sampler.windows_per_epoch
        )
        for e in range(8)
    ]
    assert len({tuple(starts) for starts in passes}) == 8
    assert len({int(starts.min()) for starts in passes}) > 1
    for starts in passes:  # neighbours in the text are not neighbours in the order
        assert (np.abs(np.diff(starts)) == 10).mean() < 0.02
        assert abs(np.corrcoef(np.arange(len(starts)), starts)[0, 1]) < 0.15


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permute_indices_is_a_bijection(n: int, seed: int) -> None:
    keys = np.random.Philox(key=[seed, 0]).random_raw(FEISTEL_ROUNDS)
    assert sorted(permute_indices(np.arange(n), n, keys)) == list(range(n))


def test_steps_and_epochs_count_alike() -> None:
    sampler = BatchSampler(1001, 10, 16, 0, epochs=True)  # 100 windows
    assert sampler.steps_for(1) == math.ceil(100 / 16)
    assert sampler.steps_for(1.1) == math.ceil(110 / 16)
    assert sampler.steps_for(0.16) == 1
    assert sampler.steps_for(1.12) == 7
    assert sampler.epoch(25) == 4.0
