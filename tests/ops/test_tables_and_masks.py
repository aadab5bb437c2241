"""glasslm.ops: tables, masks and constants against their formulas, and the engine's own kernel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from glasslm import ops
from glasslm.engines.numpy import attention as engine_attention

T, H, Q = 7, 3, 4


def draw(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("window", [0, 1, 3, T, 2 * T])
def test_the_causal_mask_shows_the_keys_of_the_window(window: int) -> None:
    mask = ops.causal_mask(T, window)
    assert mask.dtype == np.bool_
    for i in range(T):
        for j in range(T):
            assert mask[i, j] == (j <= i and (not window or j > i - window))


@pytest.mark.parametrize("scale", [1.0, 12.0])  # 12: the engine subtracts the maximum
@pytest.mark.parametrize("K", [1, H])
def test_attention_with_a_mask_or_a_bias_equals_the_kernel_of_the_engine(
    scale: float, K: int
) -> None:
    q, k, v = scale * draw(2, T, H, Q), scale * draw(2, T, K, Q, seed=1), draw(2, T, K, Q, seed=2)
    dy = draw(2, T, H, Q, seed=3)
    bias = ops.alibi_bias(H, T, np.float64)
    for options, engine_bias, window in (
        ({"mask": ops.causal_mask(T)}, None, 0),
        ({"mask": ops.causal_mask(T, 3)[None, None]}, None, 3),
        ({"bias": bias}, bias, 0),
        ({"bias": bias, "mask": ops.causal_mask(T, 3)}, bias, 3),
        ({"bias": np.where(ops.causal_mask(T), 0.0, -np.inf)}, None, 0),
    ):
        y, backward = ops.attention(q, k, v, **options)
        qk = np.concatenate([q, k], axis=2)
        expected, engine_back = engine_attention.attention(
            qk, v, engine_bias, None, np.empty, window
        )
        np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)
        gradients = np.concatenate(backward(dy), axis=2)
        np.testing.assert_allclose(gradients, engine_back(dy.copy()), rtol=1e-8, atol=1e-10)


def test_masks_of_each_shape_that_broadcasts() -> None:
    q, k = draw(2, T, H, Q), draw(2, T, H, Q, seed=1)
    whole = draw(2, H, T, T, seed=2) > 0
    whole |= np.eye(T, dtype=bool)
    for mask in (whole, whole[:1], whole[:, :1], whole[0, 0], whole[:, :, :1] | True):
        y, _ = ops.attention(q, k, k, mask)
        for b, h in np.ndindex(2, H):
            own = np.broadcast_to(mask, (2, H, T, T))[b, h]
            one, _ = ops.scaled_dot_product_attention(q[b, :, h], k[b, :, h], k[b, :, h], own)
            np.testing.assert_allclose(y[b, :, h], one, rtol=1e-12)


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_rope_tables_are_those_of_their_formula(base: float) -> None:
    positions = np.array([[0, 5, 2], [1, 100, 3]], np.uint8)
    for dtype in (np.float32, np.float64):
        cos, sin = ops.rope_tables(positions, Q, base, dtype)
        assert cos.dtype == sin.dtype == dtype
        assert cos.shape == sin.shape == (2, 3, Q // 2)
        for b, t, j in np.ndindex(cos.shape):
            angle = float(positions[b, t]) * base ** (-2 * j / Q)
            assert cos[b, t, j] == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[b, t, j] == pytest.approx(math.sin(angle), abs=1e-6)


def test_rope_makes_scores_relative_and_takes_positions_of_each_row() -> None:
    q, k = draw(1, 1, 1, Q), draw(1, 1, 1, Q, seed=1)

    def score(m: int, n: int) -> float:
        rows = [
            ops.rope(x, *ops.rope_tables([t], Q, dtype=np.float64))[0] for x, t in ((q, m), (k, n))
        ]
        return float((rows[0] * rows[1]).sum())

    assert score(9, 4) == pytest.approx(score(5, 0))
    assert score(9, 4) != pytest.approx(score(4, 9))
    x, positions = draw(2, 3, H, Q), np.array([[0, 5, 2], [1, 7, 3]])
    y, _ = ops.rope(x, *ops.rope_tables(positions, Q, dtype=np.float64))
    for b in range(2):
        one, _ = ops.rope(x[b], *ops.rope_tables(positions[b], Q, dtype=np.float64))
        assert np.array_equal(y[b], one)


def test_sinusoids_and_alibi_are_those_of_their_formulas() -> None:
    for dtype in (np.float32, np.float64):
        table, bias = ops.sinusoidal_positions(T, 6, dtype), ops.alibi_bias(8, T, dtype)
        assert table.dtype == bias.dtype == dtype
        for t, column in np.ndindex(T, 6):
            angle = t / 10_000 ** (2 * (column // 2) / 6)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[t, column] == pytest.approx(expected, abs=1e-6)
        for h, i, j in np.ndindex(8, T, T):
            assert bias[h, i, j] == pytest.approx(-max(0, i - j) * 2.0 ** -(h + 1), rel=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_norms_use_their_eps(eps: float) -> None:
    x, gain = draw(2, 3, 5), draw(5, seed=1)
    y, _ = ops.rms_norm(x, gain, eps)
    expected = gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    y, _ = ops.layer_norm(x, gain, gain, eps)
    centred = x - x.mean(-1, keepdims=True)
    expected = gain * centred / np.sqrt(x.var(-1, keepdims=True) + eps) + gain
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)


def test_dropout_drops_a_share_that_the_seed_chooses() -> None:
    x = np.ones((40, 50, 10), np.float32)
    y, backward = ops.dropout(x, 0.25, 7)
    assert {*np.unique(y).tolist()} == {0.0, float(np.float32(1 / 0.75))}
    assert abs((y == 0).mean() - 0.25) < 0.02
    assert np.array_equal(y, ops.dropout(x, 0.25, 7)[0])
    assert not np.array_equal(y, ops.dropout(x, 0.25, 8)[0])
    assert np.array_equal(backward(x), y)
    assert np.array_equal(ops.dropout(x, 0.0, 7)[0], x)


def test_ignored_targets_have_no_loss_and_no_gradient() -> None:
    logits = draw(2, 3, 5)
    nats, backward = ops.cross_entropy(logits, [[0, -1, 4], [-1, 2, 2]])
    assert (nats == 0).tolist() == [[False, True, False], [True, False, False]]
    assert not backward(1.0)[0, 1].any()
    assert not backward(np.ones((2, 3)))[1, 0].any()
