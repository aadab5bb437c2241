"""Attention and positions: against a plain loop, as a rotation, and proven causal by gradients."""

import dataclasses
import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.schema import (
    ModelConfig,
    OptimizerConfig,
    Position,
    RopeScaling,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.cache_slots import CacheSlots
from glasslm.engines.dropout import row_keys
from glasslm.engines.numpy import attention as attention_module
from glasslm.engines.numpy.attention import alibi_bias, attention, rope
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.numpy.ops import dropout_mask
from glasslm.engines.positions import alibi_slopes, rope_cos_sin, sinusoids
from glasslm.engines.protocol import Batch
from glasslm.lab.checks.gradient_check import single_switches, small_model
from glasslm.model.parameters import initial_weights

Array = np.ndarray[Any, Any]
B, T, Q = 2, 7, 4


def attention_loop(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    window: int = T,
) -> Array:
    """Equation 1 of arXiv:1706.03762, one query at a time, in float64.

    q (B, T, H, Q), k and v (B, T, K, Q) -> (B, T, H, Q).
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    rows, positions, H, _ = q.shape
    group = H // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(rows):
        for h in range(H):
            for t in range(positions):
                visible = [s for s in range(positions) if t - window < s <= t]
                scores = [
                    q[b, t, h] @ k[b, s, h // group] / math.sqrt(q.shape[-1]) for s in visible
                ]
                if bias is not None:
                    scores = [score + bias[h, t, s] for s, score in zip(visible, scores)]
                e = np.exp(np.array(scores) - max(scores))
                p = e / e.sum()
                if mask is not None:
                    p = p * mask[b, h, t, visible]
                out[b, t, h] = sum(weight * v[b, s, h // group] for s, weight in zip(visible, p))
    return out


def draw_inputs(H: int, K: int, scale: float = 1.0, dtype: Any = np.float64) -> tuple[Array, Array]:
    rng = np.random.default_rng(H + K)
    qk = scale * rng.standard_normal((B, T, H + K, Q))
    return qk.astype(dtype), rng.standard_normal((B, T, K, Q)).astype(dtype)


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, T, T + 2])
def test_it_equals_a_plain_loop(H: int, K: int, biased: bool, window: int) -> None:
    qk, v = draw_inputs(H, K)
    bias = alibi_bias(alibi_slopes(H, np.float64), np.arange(T), np.arange(T)) if biased else None
    y, _ = attention(qk.copy(), v, bias, None, np.empty, window)
    np.testing.assert_allclose(
        y, attention_loop(qk[:, :, :H], qk[:, :, H:], v, bias, window=window or T), atol=1e-13
    )


@pytest.mark.parametrize("window", [0, 3])
def test_dropped_probabilities_equal_a_plain_loop(window: int) -> None:
    qk, v = draw_inputs(4, 2)
    keys = row_keys(0, 1, np.arange(B), 1)
    mask = dropout_mask((B, 4, T, T), 0.4, keys, np.empty)
    y, _ = attention(qk.copy(), v, None, (0.4, keys), np.empty, window)
    np.testing.assert_allclose(
        y, attention_loop(qk[:, :, :4], qk[:, :, 4:], v, mask=mask, window=window or T), atol=1e-13
    )


@pytest.mark.parametrize("scale", [1.0, 5.0, 30.0, 300.0])
@pytest.mark.parametrize("window", [0, 2])
def test_large_scores_in_float32_equal_the_float64_loop(scale: float, window: int) -> None:
    """With scores of 1e5 nothing overflows: the maximum of the visible ones is subtracted first."""
    qk, v = draw_inputs(4, 2, scale, np.float32)
    y, backward = attention(
        qk.copy(), v, None, None, lambda shape: np.full(shape, np.nan, np.float32), window
    )
    # The rounding of a score, which the exponential turns into a relative error.
    rounding = 1e-6 * max(1, scale * scale)
    np.testing.assert_allclose(
        y, attention_loop(qk[:, :, :4], qk[:, :, 4:], v, window=window or T), atol=rounding
    )
    dqkv = backward(np.ones_like(y))
    assert np.isfinite(dqkv).all()
    assert y.dtype == dqkv.dtype == np.float32


@pytest.mark.parametrize("window", [0, 3])
def test_the_two_branches_agree(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    qk, v = draw_inputs(4, 4, 3.0)
    results = []
    for limit in (0.0, 1e9):
        monkeypatch.setattr(attention_module, "MAX_SAFE_EXPONENT", limit)
        y, backward = attention(qk.copy(), v, None, None, np.empty, window)
        results.append((y, backward(np.ones_like(y))))
    for first, second in zip(*results):
        np.testing.assert_allclose(first, second, atol=1e-12)


def test_what_is_not_finite_stays_visible() -> None:
    qk, v = draw_inputs(2, 2)
    qk[0, 3, 0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        y, _ = attention(qk, v, None, None, np.empty)
    assert np.isnan(y[0, 3, 0]).all()
    assert np.isfinite(y[1]).all()


def test_masks_of_many_lengths_do_not_pile_up() -> None:
    """A mask has T² numbers, and a run that reads prompts of all lengths would keep them all."""
    for T in range(1, 40):
        attention(np.ones((1, T, 2, 2)), np.ones((1, T, 1, 2)), None, None, np.empty)
    assert attention_module._mask.cache_info().currsize < 20


# -- positions -------------------------------------------------------------------------------------


def rotate(x: Array, positions: Array) -> Array:
    cos, sin = rope_cos_sin(positions, x.shape[2], x.shape[3], np.float64, "none", 1.0)
    y, _ = rope(x.copy(), cos, sin, np.empty)
    return y


@given(start=st.integers(0, 500), Q=st.sampled_from([2, 8, 32]))
def test_rotation_keeps_norms_and_sees_only_distances(start: int, Q: int) -> None:
    x = np.random.default_rng(Q).standard_normal((1, 6, 2, Q))
    at_zero, shifted = rotate(x, np.arange(6)), rotate(x, np.arange(6) + start)
    np.testing.assert_allclose(
        np.linalg.norm(shifted, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12
    )
    scores = [np.einsum("bthq,bshq->bhts", y, y) for y in (at_zero, shifted)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-10)
    if start:
        assert np.abs(at_zero - shifted).max() > 1e-3


def test_position_zero_is_not_rotated_and_the_pairs_are_split_in_halves() -> None:
    x = np.zeros((1, 2, 1, 4))
    x[0, :, 0, 0] = 1.0  # the first pair is (0, 2), and turns by one radian a position
    y = rotate(x, np.arange(2))
    np.testing.assert_array_equal(y[0, 0], x[0, 0])
    np.testing.assert_allclose(y[0, 1, 0], [math.cos(1), 0, math.sin(1), 0])


def rotation_angles(scaling: RopeScaling, factor: float, positions: Array, Q: int = 16) -> Array:
    """(positions, Q / 2): the angle of each pair, modulo whole turns."""
    cos, sin = rope_cos_sin(positions, 3, Q, np.float64, scaling, factor)
    np.testing.assert_array_equal(cos[:, 0], cos[:, 2])
    return np.arctan2(sin[:, 0, Q // 2 :], cos[:, 0, : Q // 2])


def test_scaled_rope_sees_a_longer_text_as_one_of_the_trained_length() -> None:
    """Linear: all pairs turn as at the position / factor. NTK: only the slowest pair does."""
    factor, short = 4.0, np.arange(20)
    long = 4 * short
    plain_angles = rotation_angles("none", factor, short)
    np.testing.assert_allclose(rotation_angles("linear", factor, long), plain_angles, atol=1e-12)
    ntk = rotation_angles("ntk", factor, long)
    np.testing.assert_allclose(ntk[:, -1], plain_angles[:, -1], atol=1e-12)
    np.testing.assert_allclose(
        ntk[:, 0], rotation_angles("none", 1.0, long)[:, 0], atol=1e-12
    )  # the fastest pair is unchanged
    ratios = (
        rotation_angles("none", 1.0, np.array([1])) / rotation_angles("ntk", factor, np.array([1]))
    )[0]
    assert (np.diff(ratios) > 0).all()
    for scaling in get_args(RopeScaling):
        np.testing.assert_array_equal(rotation_angles(scaling, 1.0, short), plain_angles)
    np.testing.assert_array_equal(
        rotation_angles("ntk", factor, short, Q=2), rotation_angles("none", 1.0, short, Q=2)
    )


def test_tables_are_made_for_any_positions_in_float32_as_in_float64() -> None:
    """At position 1,000,000 the angles are still exact, because they are computed in float64."""
    positions = np.array([[0, 3], [10**6, 7]])
    exact, rounded = (
        rope_cos_sin(positions, 2, 8, dtype, "none", 1.0) for dtype in (np.float64, np.float32)
    )
    for wide, narrow in zip(exact, rounded):
        assert wide.shape == (2, 2, 2, 8)
        assert narrow.dtype == np.float32
        np.testing.assert_allclose(narrow, wide, atol=1e-7)
    cos, sin = rope_cos_sin(np.arange(4), 2, 8, np.float64, "none", 1.0)
    np.testing.assert_array_equal(cos[3], exact[0][0, 1])
    np.testing.assert_array_equal(sin[3], exact[1][0, 1])


def test_sinusoids_of_the_paper() -> None:
    table = sinusoids(50, 16, math.sqrt(0.5), np.float64)
    assert table[7, 4] == pytest.approx(math.sin(7 / 10000 ** (4 / 16)))
    assert table[7, 5] == pytest.approx(math.cos(7 / 10000 ** (4 / 16)))
    assert math.sqrt((sinusoids(50, 16, 0.02, np.float64) ** 2).mean()) == pytest.approx(0.02)


def test_alibi_of_the_paper() -> None:
    np.testing.assert_allclose(alibi_slopes(8, np.float64), [2.0**-i for i in range(1, 9)])
    bias = alibi_bias(alibi_slopes(8, np.float64), np.arange(5), np.arange(5))
    assert bias[0, 4, 1] == -3 * 0.5
    assert bias[7, 2, 2] == 0


# -- slots of a cache ------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 12),
)
def test_a_ring_holds_the_newest_and_shows_each_query_what_it_may_see(
    rows: list[tuple[int, int]], size: int
) -> None:
    """Against lists: the position in each slot, before and after a call, and the visible keys."""
    lengths, counts = (np.array(numbers) for numbers in zip(*rows))
    T = max(1, int(counts.max()))
    # For each row, slot -> the newest position that belongs there.
    rings = [{p % size: p for p in range(length)} for length in lengths.tolist()]
    slots = CacheSlots(lengths, counts, T, size)
    assert slots.end == (lengths + counts).max()
    queries = np.broadcast_to(slots.query_positions, (len(rows), T))
    keys = np.broadcast_to(slots.key_positions, (len(rows), slots.key_count))
    index = slots.write_index
    for b, (start, count) in enumerate(rows):
        np.testing.assert_array_equal(queries[b, :count], np.arange(start, start + count))
        new = dict(enumerate(range(start, start + count)))
        if isinstance(index, slice):
            written = list(enumerate(range(index.start, index.stop)))
        else:
            written = [(column, slot) for row, column, slot in zip(*index) if row == b]
        # No slot is written twice, so that the order of writing does not matter.
        assert len({slot for _, slot in written}) == len(written)
        after = rings[b] | {slot: new[column] for column, slot in written}
        assert after == {p % size: p for p in range(start + count)}
        if count == 0:
            continue
        if slots.prefix is None:
            expected = [after.get(slot, -1) for slot in range(slots.key_count)]
        else:
            expected = [rings[b].get(slot, -1) for slot in range(slots.prefix)]
            expected += [start + column for column in range(T)]
        visible = [p if 0 <= p < start + count else None for p in keys[b].tolist()]
        assert visible == [p if 0 <= p < start + count else None for p in expected]
        needed = {p for q in new.values() for p in range(max(0, q - size + 1), q + 1)}
        assert needed <= set(visible)


# -- causality -------------------------------------------------------------------------------------


def build_engine(config: ModelConfig) -> NumpyEngine:
    no_extra_terms = OptimizerConfig(balance_loss=0.0, router_z_loss=0.0)
    run = RunConfig(
        model=config, optimizer=no_extra_terms, train=TrainConfig(batch_size=1, micro_batch_size=1)
    ).resolve()
    engine = NumpyEngine(run, 11, threads=1, dtype=np.float64)
    rng = np.random.default_rng(0)
    engine.load(
        (name, w + 0.3 * rng.standard_normal(w.shape))
        for name, w in initial_weights(engine.table, 0)
    )
    return engine


@pytest.mark.parametrize(("name", "config"), list(single_switches()))
def test_no_loss_depends_on_a_later_token(name: str, config: ModelConfig) -> None:
    """The loss at position t has gradients by the embeddings of tokens up to t, and no others.

    With a window W, each window layer reaches W - 1 tokens back, and with documents none before its
    own. Each position has a token of its own, so that a row of the gradient of the embedding
    belongs to one position.
    """
    clear = {"tie_embeddings": False, "dropout": 0.0, "attention_dropout": 0.0, "lora_rank": 0}
    config = dataclasses.replace(config, **clear)  # type: ignore[arg-type]
    windows = [config.kind_window(config.layer_kind(i)) for i in range(config.n_layers)]
    reach = sum(window - 1 if window else 6 for window in windows)
    engine = build_engine(config)
    tokens = np.arange(6)[None]
    for t in range(6):
        targets = np.full((1, 6), -1)
        targets[0, t] = 9
        gradient = engine.gradients(Batch(tokens, targets, 0, np.arange(1)), 1.0)[
            "embedding.weight"
        ]
        visible = np.abs(gradient[:6]).max(1) > 0
        first = t - reach
        if config.document_attention and t >= config.document_end_id:  # token i is at position i
            first = max(first, config.document_end_id)
        np.testing.assert_array_equal(visible, (np.arange(6) <= t) & (np.arange(6) >= first))


@pytest.mark.parametrize("position", get_args(Position))
def test_order_matters_where_there_are_positions(position: str) -> None:
    """Without positions, one block cannot tell the order of the tokens before the last."""
    engine = build_engine(dataclasses.replace(small_model(), n_layers=1, position=position))  # type: ignore[arg-type]
    tokens = np.array([[1, 2, 3, 4], [3, 1, 2, 4]])
    last = engine.losses(tokens, np.array([[-1, -1, -1, 5]] * 2))[:, 3]
    assert (abs(last[0] - last[1]) < 1e-12) == (position == "none")
