"""Attention by tiles: against explicit attention, finite differences and autograd; its memory."""

import gc
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasslm.engines.numpy import flash
from glasslm.engines.numpy.attention import alibi_bias, attention
from glasslm.engines.numpy.buffer_pool import ALIGNMENT, BufferPool
from glasslm.engines.numpy.flash import TILE_LENGTH, flash_attention
from glasslm.engines.positions import alibi_slopes
from glasslm.lab.checks.finite_differences import check_gradients

Array = np.ndarray[Any, Any]
WINDOWS = (0, 1, 3, 1000)


def new(shape: tuple[int, ...]) -> Array:
    return np.full(shape, np.nan)


def new32(shape: tuple[int, ...]) -> Array:
    return np.full(shape, np.nan, np.float32)


def draw_inputs(
    B: int, T: int, H: int, K: int, Q: int = 4, scale: float = 1.0
) -> tuple[Array, Array, Array]:
    """qk (B, T, H + K, Q), v (B, T, K, Q) and dout (B, T, H, Q); `scale` makes scores large."""
    rng = np.random.default_rng([B, T, H, K, Q])
    qk = scale * rng.standard_normal((B, T, H + K, Q))
    return qk, rng.standard_normal((B, T, K, Q)), rng.standard_normal((B, T, H, Q))


def visible_mask(T: int, window: int) -> Array:
    distance = np.arange(T)[:, None] - np.arange(T)
    return (distance >= 0) & ((distance < window) | (window == 0))


def explicit_attention(qk: Array, v: Array, slopes: Array | None, window: int) -> Array:
    """Equation 1 of arXiv:1706.03762 with all T x T scores, in float64."""
    T, K, Q = v.shape[1:]
    G = (qk.shape[2] - K) // K
    q, k = qk[:, :, : G * K].astype(np.float64), np.repeat(qk[:, :, G * K :], G, axis=2)
    scores = np.einsum("bihq,bjhq->bhij", q, k) / math.sqrt(Q)
    if slopes is not None:
        scores += slopes[:, None, None] * (np.arange(T) - np.arange(T)[:, None])
    scores = np.where(visible_mask(T, window), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhij,bjhq->bihq", e / e.sum(-1, keepdims=True), np.repeat(v, G, axis=2))


def run_flash(
    qk: Array, v: Array, slopes: Array | None, window: int, dout: Array
) -> tuple[Array, Array]:
    out, backward = flash_attention(qk.copy(), v, slopes, window, new)
    return out, backward(dout.copy())


def run_plain(
    qk: Array, v: Array, slopes: Array | None, window: int, dout: Array
) -> tuple[Array, Array]:
    positions = np.arange(v.shape[1])
    bias = None if slopes is None else alibi_bias(slopes, positions, positions)
    out, backward = attention(qk.copy(), v, bias, None, new, window=window)
    return out, backward(dout.copy())


def assert_equal(actual: Array, expected: Array, rounding: float = 1e-10) -> None:
    assert np.abs(actual - expected).max() <= rounding * max(np.abs(expected).max(), 1e-3)


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 5, TILE_LENGTH, TILE_LENGTH + 1, 2 * TILE_LENGTH + 44])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_it_equals_the_whole_square(T: int, window: int, scale: float) -> None:
    for H, K in ((3, 3), (4, 2)):
        for slopes in (None, alibi_slopes(H, np.float64)):
            qk, v, dout = draw_inputs(2, T, H, K, scale=scale)
            out, dqkv = run_flash(qk, v, slopes, window, dout)
            assert_equal(out, explicit_attention(qk, v, slopes, window))
            assert_equal(dqkv, run_plain(qk, v, slopes, window, dout)[1])


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 30),
    K=st.integers(1, 3),
    G=st.integers(1, 3),
    Q=st.integers(1, 6),
    tile=st.integers(1, 9),
    window=st.integers(0, 35),
    biased=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 12.0, 100.0]),
)
def test_any_shape(
    B: int, T: int, K: int, G: int, Q: int, tile: int, window: int, biased: bool, scale: float
) -> None:
    qk, v, dout = draw_inputs(B, T, G * K, K, Q, scale)
    slopes = alibi_slopes(G * K, np.float64) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "TILE_LENGTH", tile)
        out, dqkv = run_flash(qk, v, slopes, window, dout)
    assert_equal(out, explicit_attention(qk, v, slopes, window))
    assert_equal(dqkv, run_plain(qk, v, slopes, window, dout)[1])


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("scale", "biased"), [(1.0, False), (1.0, True), (12.0, False)])
def test_gradients_equal_finite_differences(
    window: int, scale: float, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "TILE_LENGTH", 3)
    H, K = 4, 2
    qk, v, dout = draw_inputs(2, 7, H, K, scale=scale)
    slopes = alibi_slopes(H, np.float64) if biased else None

    def gradients() -> dict[str, Array]:
        dqkv = run_flash(qk, v, slopes, window, dout)[1]
        return {"qk": dqkv[:, :, : H + K], "v": dqkv[:, :, H + K :]}

    def value() -> float:
        return float(np.sum(flash_attention(qk.copy(), v, slopes, window, new)[0] * dout))

    rng = np.random.default_rng(0)
    finding = check_gradients("flash", {"qk": qk, "v": v}, value, gradients, rng)
    assert finding.passed, finding


@pytest.mark.parametrize("window", [0, 200])
def test_gradients_equal_autograd(window: int) -> None:
    torch = pytest.importorskip("torch")
    T, H, K = 300, 4, 2
    qk, v, dout = draw_inputs(2, T, H, K, scale=3.0)
    slopes = alibi_slopes(H, np.float64)
    inputs = [torch.from_numpy(x.copy()).requires_grad_() for x in (qk[:, :, :H], qk[:, :, H:], v)]
    bias = slopes[:, None, None] * (np.arange(T) - np.arange(T)[:, None])
    mask = torch.from_numpy(np.where(visible_mask(T, window), bias, -np.inf))
    q, k, values = (x.transpose(1, 2) for x in inputs)
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, values, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    y.backward(torch.from_numpy(dout))
    out, dqkv = run_flash(qk, v, slopes, window, dout)
    assert_equal(out, y.detach().numpy())
    assert_equal(dqkv, np.concatenate([x.grad.numpy() for x in inputs], axis=2))


def test_queries_are_scaled_in_place_and_the_rest_is_left_alone() -> None:
    qk, v, dout = draw_inputs(1, 9, 2, 1)
    original_qk, original_v = qk.copy(), v.copy()
    _, backward = flash_attention(qk, v, None, 0, new)
    backward(dout)
    np.testing.assert_array_equal(qk[:, :, :2], original_qk[:, :, :2] / 2)
    np.testing.assert_array_equal(qk[:, :, 2:], original_qk[:, :, 2:])
    np.testing.assert_array_equal(v, original_v)


# -- float32 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 12.0, 300.0])
@pytest.mark.parametrize("H", [2, 32])
def test_float32_does_not_overflow(scale: float, H: int) -> None:
    """With 32 heads the steepest slope spans 107 over a tile, which overflows exp in float32."""
    qk, v, dout = (
        x.astype(np.float32) for x in draw_inputs(1, TILE_LENGTH + 40, H, 1, scale=scale)
    )
    slopes = alibi_slopes(H, np.float32)
    for bias in (None, slopes):
        out, backward = flash_attention(qk.copy(), v, bias, 140, new32)
        # The rounding of a score, which the exponential turns into a relative error.
        rounding = 2e-6 * max(1, scale * scale)
        assert_equal(out, explicit_attention(qk, v, bias, 140), min(rounding, 0.1))
        assert np.isfinite(backward(dout)).all()


class Watched(np.ndarray):
    """An array that checks in every ufunc, products included, that all operands are float32."""

    used: set[str]

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **options: Any
    ) -> Any:
        arrays = [x.view(np.ndarray) if isinstance(x, np.ndarray) else x for x in inputs]
        wrong = [
            x.dtype
            for x in arrays
            if isinstance(x, (np.ndarray, np.generic)) and x.dtype != np.float32
        ]
        assert not wrong, f"{ufunc.__name__} of {wrong}"
        Watched.used.add(ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}")
        if out:
            options["out"] = tuple(x.view(np.ndarray) for x in out)
        y = getattr(ufunc, method)(*arrays, **options)
        assert y.dtype == np.float32
        return out[0] if out else y.view(Watched) if isinstance(y, np.ndarray) else y


def test_every_step_computes_in_float32_and_small_scores_need_no_maximum() -> None:
    for scale in (1.0, 50.0):
        Watched.used = set()
        qk, v, dout = (
            x.astype(np.float32).view(Watched)
            for x in draw_inputs(1, TILE_LENGTH + 10, 4, 2, scale=scale)
        )
        out, backward = flash_attention(
            qk, v, alibi_slopes(4, np.float32), 20, lambda shape: new32(shape).view(Watched)
        )
        assert out.dtype == backward(dout).dtype == np.float32
        assert Watched.used >= {"matmul", "vecdot", "exp", "multiply", "add"}
        assert ("maximum" in Watched.used) == (scale > 1)


def test_what_is_not_finite_stays_visible() -> None:
    qk, v, _ = draw_inputs(2, 7, 2, 2)
    qk[0, 3, 0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        out, _ = flash_attention(qk, v, None, 0, new)
    assert np.isnan(out[0, 3, 0]).all()
    assert np.isnan(out).sum() == out.shape[-1]


# -- visible keys, and memory ----------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
def test_a_query_depends_on_the_keys_that_it_sees(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "TILE_LENGTH", 3)
    T = 11
    qk, v, _ = draw_inputs(1, T, 1, 1)
    _, backward = flash_attention(qk, v, None, window, new)
    for t in range(T):
        dout = np.zeros((1, T, 1, 4))
        dout[0, t] = 1
        dv = backward(dout)[0, :, 2]
        np.testing.assert_array_equal(np.abs(dv).max(-1) > 0, visible_mask(T, window)[t])


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 600), window=st.integers(0, 700))
def test_tiles_cover_the_visible_keys_once_and_few_others(T: int, window: int) -> None:
    times = np.zeros((T, T), int)
    for queries, tiles in flash.TileMask(None, window, TILE_LENGTH).tiles(T):
        assert tiles[0].start <= queries.start, "every query has a visible key in the first tile"
        assert tiles[0].stop == queries.stop
        for keys in tiles:
            assert queries.stop - queries.start <= TILE_LENGTH
            assert keys.stop - keys.start <= TILE_LENGTH
            times[queries, keys] += 1
    assert times.max() == 1
    assert times[visible_mask(T, window)].all()
    assert times.sum() <= visible_mask(T, window).sum() + T * TILE_LENGTH


def peak_bytes(T: int, H: int, Q: int, scale: float) -> int:
    """Peak bytes of Python and NumPy during a forward and backward pass, without its inputs."""
    qk, v, dout = (x.astype(np.float32) for x in draw_inputs(1, T, H, H, Q, scale))
    gc.collect()
    tracemalloc.start()
    try:
        _, backward = flash_attention(qk, v, alibi_slopes(H, np.float32), 0, BufferPool(np.float32))
        backward(dout)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_memory_grows_with_the_length_and_not_with_its_square(scale: float) -> None:
    H, Q = 2, 16
    peak_bytes(TILE_LENGTH, H, Q, scale)  # fills the caches of masks
    short_bytes, long_bytes = (peak_bytes(T, H, Q, scale) for T in (1024, 2048))
    assert long_bytes < 2.1 * short_bytes
    # H Q numbers a token each: out 1, dqkv 3, dk and dv 2, copies of keys and values 2.
    assert (long_bytes - short_bytes) / 1024 < 10 * 4 * H * Q


def test_what_is_kept_is_the_output_and_a_number_a_query() -> None:
    T, H, Q = 3 * TILE_LENGTH, 2, 16
    qk, v, dout = (x.astype(np.float32) for x in draw_inputs(1, T, H, H, Q))
    pool = BufferPool(np.float32)
    passes = [flash_attention(qk, v, None, 0, pool)]
    after_one = pool.allocated_bytes
    passes.append(flash_attention(qk, v, None, 0, pool))
    kept_bytes = 4 * T * H * (Q + 1)
    assert kept_bytes <= pool.allocated_bytes - after_one <= kept_bytes + 2 * ALIGNMENT
    passes.pop()[1](dout)
    allocated = pool.allocated_bytes
    passes.append(flash_attention(qk, v, None, 0, pool))
    passes.pop()[1](dout)
    assert pool.allocated_bytes == allocated, "memory of the pass before is reused"
